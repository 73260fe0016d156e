"""Encodes images by an autoencoder, once, so that a training run reads latents.

    python models/encode_latents.py --data images:DIR --output LATENTS --vae NAME_OR_PATH
    python models/train_switch_dit.py --data latents:LATENTS

NAME_OR_PATH is any AutoencoderKL of diffusers, from the hub or from a folder. On several GPUs:

    torchrun --nproc_per_node=8 models/encode_latents.py ...

The same command again goes on where the last one stopped, with any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import save
from switch_dit.autoencoder import load_autoencoder
from switch_dit.data import Data, load_data, loaded
from switch_dit.data.latents import FORMAT
from switch_dit.devices import resolve_device
from switch_dit.files import checksum, to_disk
from torch import Tensor
from tqdm import tqdm

from switch_moe.ops._checks import check_choice, check_flags, check_integers


@dataclass
class EncodeConfig:
    """Encode images into latents."""

    data: str
    """What to encode: images:DIR, hf:NAME_OR_PATH or whatever else train_switch_dit.py takes."""
    output: Path
    """The folder for the latents; it is made."""
    vae: str
    """An AutoencoderKL of diffusers: its name on the hub or its folder. That of a whole pipeline does too."""
    image_size: int = 256
    """Images of images:DIR and hf:NAME are cropped to this many pixels; other data has its own size."""
    flips: bool = True
    """Whether the mirrored images are encoded too, for training with --flip."""
    dtype: Literal["float16", "float32"] = "float16"
    """Means and standard deviations are stored in this type."""
    shard_size: int = 1024
    """A file holds this many images, and an interrupted run loses at most one file of each process."""
    batch_size: int = 32
    """The autoencoder takes this many images at a time."""
    unreadable: Literal["fail", "skip"] = "fail"
    """Whether an image that cannot be read is an error, or the next one of its class takes its place."""
    workers: int = 2
    """This many processes read images ahead."""
    device: str = "auto"
    """auto takes cuda where there is one, else cpu."""

    def validate(self) -> None:
        """Raises ``ValueError`` that names the setting, its value and what would be right."""
        check_integers(image_size=self.image_size, shard_size=self.shard_size, batch_size=self.batch_size)
        check_integers(0, workers=self.workers)
        check_flags(flips=self.flips)
        check_choice("dtype", self.dtype, ("float16", "float32"))
        check_choice("unreadable", self.unreadable, ("fail", "skip"))
        if self.data.startswith("latents:"):
            raise ValueError(f"data is {self.data!r}; these are latents already")


def run(config: EncodeConfig, rank: int = 0, world_size: int = 1) -> None:
    """Encodes the shards ``rank``, ``rank + world_size`` and so on; who finishes last writes index.json.

    Raises ``ValueError``, ``OSError`` or ``ModuleNotFoundError`` that says what does not fit.
    """
    config.validate()
    own_size = not config.data.startswith(("images:", "hf:"))
    data = load_data(
        config.data, image_size=0 if own_size else config.image_size, unreadable=config.unreadable
    )
    device = resolve_device(config.device)
    vae = load_autoencoder(config.vae, data.channels).to(device)
    shards = Shards(config, data, vae, rank)
    todo = [number for number in range(rank, shards.count, world_size) if not shards.done(number)]
    images = sum(len(shards.rows(number)) for number in todo)
    with tqdm(total=images, desc="encoding", unit="image", disable=rank != 0) as bar:
        for number, moments in encoded(config, data, vae, shards, todo, bar):
            shards.write(number, moments)
    shards.finish()


def encoded(
    config: EncodeConfig, data: Data, vae: Any, shards: Shards, todo: list[int], bar: Any
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Shard numbers of ``todo`` with mean and std [n, 1 or 2, C, h, w] and labels [n], on the CPU."""
    pieces = [(number, piece) for number in todo for piece in shards.rows(number).split(config.batch_size)]
    plan = [(piece, torch.zeros(len(piece), dtype=torch.bool)) for _, piece in pieces]
    pin = vae.device.type == "cuda"
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    dtype = getattr(torch, config.dtype)
    for (number, piece), (x, labels) in zip(pieces, loaded(data, plan, config.workers, pin), strict=True):
        images = data.scale(x.to(vae.device, non_blocking=True))
        with torch.inference_mode():
            views = [vae.encode(view).latent_dist for view in [images, images.flip(-1)][: shards.views]]
        moments = [torch.stack([getattr(view, name) for view in views], dim=1).to(dtype).cpu()
                   for name in ("mean", "std")]  # fmt: skip
        for name, values in zip(("mean", "std"), moments, strict=True):
            if not bool(values.isfinite().all()):
                raise ValueError(
                    f"dtype is {config.dtype!r}; a {name} of images {int(piece[0])} to {int(piece[-1])} is "
                    "not finite in it" + ("; float32 may hold it" if config.dtype == "float16" else "")
                )
        found.append((*moments, labels))
        bar.update(len(labels))
        if int(piece[-1]) == int(shards.rows(number)[-1]):
            mean, std, label = (torch.cat(parts) for parts in zip(*found, strict=True))
            yield number, {"mean": mean, "std": std, "labels": label}
            found = []


class Shards:
    """The files of a run: its settings, shards with a note beside each, index.json at the end."""

    def __init__(self, config: EncodeConfig, data: Data, vae: Any, rank: int) -> None:
        self.folder, self.data, self.rank, self.size = config.output, data, rank, config.shard_size
        self.count = math.ceil(len(data) / config.shard_size)
        self.views = 2 if config.flips else 1
        shape = vae.encode(
            torch.zeros(1, data.channels, data.size, data.size, device=vae.device)
        ).latent_dist.mean.shape
        if shape[2] != shape[3]:
            raise ValueError(f"vae is {config.vae!r}; its latents are {tuple(shape[1:])} and not square")
        if "scaling_factor" not in vae.config:
            raise ValueError(f"vae is {config.vae!r}; its config has no scaling_factor")
        self.settings: dict[str, Any] = {
            "format": FORMAT,
            "data": config.data,
            "data_sha256": data.identity(),
            "vae": config.vae,
            "vae_sha256": _identity(vae),
            "images": len(data),
            "image_size": data.size,
            "channels": shape[1],
            "size": shape[2],
            "num_classes": data.num_classes,
            "scaling_factor": vae.config.scaling_factor,
            "shift_factor": vae.config.get("shift_factor") or 0.0,
            "flips": config.flips,
            "dtype": config.dtype,
            "shard_size": config.shard_size,
            "unreadable": config.unreadable,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "encoding.json"
        if path.exists():
            self._compare(path)
        else:
            self._write(path, _as_json(self.settings))

    def _compare(self, path: Path) -> None:
        """``ValueError`` where the folder was begun with other settings."""
        try:
            begun = json.loads(path.read_text())
            changed = [key for key, value in self.settings.items() if begun.get(key) != value]
        except (ValueError, AttributeError):
            raise ValueError(
                f"output is {self.folder}; {path.name} in it is broken: choose another folder"
            ) from None
        # The names may change, as long as what they name is the same.
        changed = [key for key in changed if key not in ("data", "vae")]
        if changed:
            was = ", ".join(f"{key} was {begun.get(key)!r} and is {self.settings[key]!r}" for key in changed)
            raise ValueError(
                f"output is {self.folder}; it was begun with other settings ({was}): choose another"
            )

    def rows(self, number: int) -> Tensor:
        """The images of a shard."""
        return torch.arange(number * self.size, min((number + 1) * self.size, len(self.data)))

    def file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def done(self, number: int) -> bool:
        """Whether the shard is there, and undamaged."""
        note = self._note(number)
        file = self.file(number)
        return note is not None and file.is_file() and checksum(file) == note["sha256"]

    def _note(self, number: int) -> dict[str, Any] | None:
        try:
            note = json.loads(self.file(number).with_suffix(".json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return note if isinstance(note, dict) and "sha256" in note else None

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """The shard, and then its note: a shard without one is encoded again."""
        content = save(tensors)
        mean, std = tensors["mean"].double(), tensors["std"].double()
        rows = self.rows(number)
        note = {
            "file": self.file(number).name,
            "count": len(rows),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "mean": mean.mean().item(),
            "square": (mean.square() + std.square()).mean().item(),
            "skipped": {row: name for row, name in self.data.skipped.items() if row in rows},
        }
        self._write(self.file(number), content)
        self._write(self.file(number).with_suffix(".json"), _as_json(note))

    def _write(self, path: Path, content: bytes) -> None:
        """Whole or not at all, and on the disk before this returns."""
        draft = path.with_name(f"{path.name}.{self.rank}.incomplete")
        try:
            draft.write_bytes(content)
            to_disk(draft)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        draft.rename(path)
        to_disk(path.parent)

    def finish(self) -> None:
        """Writes index.json where all shards are done, by whichever process."""
        notes = [self._note(number) for number in range(self.count)]
        missing = sum(note is None for note in notes)
        if missing:
            print(f"this process is done; {missing} of {self.count} files are still to come", flush=True)
            return
        total = len(self.data)
        scaling, shift = self.settings["scaling_factor"], self.settings["shift_factor"]
        mean = sum(note["mean"] * note["count"] for note in notes) / total
        square = sum(note["square"] * note["count"] for note in notes) / total
        std = math.sqrt(max(square - mean**2, 0)) * scaling
        skipped = {row: name for note in notes for row, name in note["skipped"].items()}
        keys = ("file", "count", "bytes", "sha256")
        index = self.settings | {
            "scaled_mean": (mean - shift) * scaling,
            "scaled_std": std,
            "skipped": skipped,
            "shards": [{key: note[key] for key in keys} for note in notes],
        }
        self._write(self.folder / "index.json", _as_json(index))
        for draft in self.folder.glob("shard-*.incomplete"):  # of runs that were killed
            draft.unlink(missing_ok=True)
        print(f"{total} images in {self.count} files in {self.folder}; standard deviation {std:.3f}")
        if skipped:
            names = ", ".join([*skipped.values()][:3]) + (", ..." if len(skipped) > 3 else "")
            print(f"{len(skipped)} images could not be read, others took their place: {names}")
        if not 0.5 <= std <= 2:
            right = f"{scaling / std:.4g}" if std else "another size"
            warnings.warn(
                f"the latents have a standard deviation of {std:.3g} after scaling by {scaling}; training "
                f"wants about 1, as a scaling_factor of {right} in the config of the autoencoder would give",
                stacklevel=2,
            )


def _identity(vae: Any) -> str:
    """The checksum of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _as_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def main() -> None:
    config = tyro.cli(EncodeConfig, description=__doc__)
    try:
        run(config, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
