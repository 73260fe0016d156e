"""Latents of an autoencoder, in shards that models/encode_latents.py wrote.

index.json                  settings, and for each shard its file, count, bytes and sha256
shard-00000.safetensors     mean and std [n, 1 or 2, C, H, W], before sampling and scaling; labels int64 [n]

Of the second dimension, 0 is the image and 1 the mirrored image.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from switch_dit.files import checksum

FORMAT = "switch_dit latents 1"
_AGAIN = "run models/encode_latents.py again"
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class Latents:
    """Means and standard deviations of latents, mapped from disk and read when they are needed."""

    in_memory = held_out = held_out_labels = None
    needs_noise = threads = True

    def __init__(
        self, data: str, folder: Path, verify: bool = True, rank: int = 0, world_size: int = 1
    ) -> None:
        self.data, self.folder = data, folder
        index = self._read_index()
        self.channels, self.size, self.num_classes = index["channels"], index["size"], index["num_classes"]
        self.scaling, self.shift = float(index["scaling_factor"]), float(index["shift_factor"])
        self.views, self.dtype = 2 if index["flips"] else 1, _DTYPES[index["dtype"]]
        self.shards = index["shards"]
        self.skipped = {int(row): str(name) for row, name in index["skipped"].items()}
        self._check_files(verify, rank, world_size)
        self.ends = np.cumsum([shard["count"] for shard in self.shards])
        self._mapped: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.labels = torch.cat([self._map(number)[2] for number in range(len(self.shards))])
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.num_classes:
            raise ValueError(f"data is {data!r}; its labels are not in [0, {self.num_classes}); {_AGAIN}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}  # another process maps the files itself

    def batch(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """Means, then standard deviations, [B, 2C, H, W] as stored, and labels [B]."""
        if self.views == 1 and bool(flips.any()):
            raise ValueError(f"data is {self.data!r}; it has no mirrored images: flip must be False")
        rows = indices.numpy()
        shards = np.searchsorted(self.ends, rows, side="right").tolist()
        moments = torch.empty(len(rows), 2, self.channels, self.size, self.size, dtype=self.dtype)
        target = moments.numpy()
        for i, (row, shard, view) in enumerate(zip(rows.tolist(), shards, flips.tolist(), strict=True)):
            mean, std = self._mapped.get(shard) or self._map(shard)[:2]
            place = row - int(self.ends[shard])  # from the end of the shard, as negative indices count
            target[i, 0], target[i, 1] = mean[place, int(view)], std[place, int(view)]
        return moments.flatten(1, 2), self.labels[indices]

    def scale(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """``mean + std noise``, float32 [B, C, H, W], shifted and scaled as the autoencoder's config says.

        ``x`` is what :meth:`batch` gave, and ``noise`` [B, C, H, W] is standard normal; without it, the mean.
        """
        mean, std = x.float().chunk(2, dim=1)
        return ((mean if noise is None else torch.addcmul(mean, std, noise)) - self.shift) * self.scaling

    def identity(self) -> str:
        """The checksum of the shards' checksums."""
        return hashlib.sha256("".join(shard["sha256"] for shard in self.shards).encode()).hexdigest()

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / "index.json"
        if not path.is_file():
            started = (self.folder / "encoding.json").is_file()
            text = (
                f"encoding is not finished there; {_AGAIN}"
                if started
                else "models/encode_latents.py writes it"
            )
            raise FileNotFoundError(f"data is {self.data!r}; there is no file {str(path)!r}: {text}")
        try:
            index = json.loads(path.read_text())
            if index["format"] != FORMAT:
                raise ValueError(f"its format is {index['format']!r} and not {FORMAT!r}")
            counts = [index[key] for key in ("channels", "size", "num_classes")]
            counts += [shard[key] for shard in index["shards"] for key in ("count", "bytes")]
            names = [shard[key] for shard in index["shards"] for key in ("file", "sha256")]
            factors = [index["scaling_factor"], index["shift_factor"]]
            if not (
                all(isinstance(count, int) and count > 0 for count in counts)
                and all(isinstance(name, str) and Path(name).name == name for name in names)
                and np.isfinite(np.array(factors, dtype=np.float64)).all()
                and isinstance(index["flips"], bool)
                and isinstance(index["skipped"], dict)
                and all(row.isdecimal() for row in index["skipped"])
                and index["dtype"] in _DTYPES
                and index["shards"]
            ):
                raise ValueError("it holds values that cannot be meant")
        except (ValueError, TypeError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"data is {self.data!r}; {path} is broken ({reason}); {_AGAIN}") from None
        return index

    def _check_files(self, verify: bool, rank: int, world_size: int) -> None:
        """Compares all sizes, as a file cut off kills who maps it, and the checksums of this rank's share."""
        for number, shard in enumerate(self.shards):
            path = self.folder / shard["file"]
            if not path.is_file():
                raise FileNotFoundError(f"data is {self.data!r}; {path} is missing; {_AGAIN}")
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(
                    f"data is {self.data!r}; {path} has {path.stat().st_size} bytes and not "
                    f"{shard['bytes']}; remove index.json and {_AGAIN}"
                )
            if verify and number % world_size == rank and checksum(path) != shard["sha256"]:
                raise ValueError(
                    f"data is {self.data!r}; {path} is damaged: its checksum is not that of index.json; "
                    f"remove index.json and {_AGAIN}"
                )

    def _map(self, number: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """Mean, std and labels of a shard; the arrays are views of the file."""
        shard = self.shards[number]
        shape = (shard["count"], self.views, self.channels, self.size, self.size)
        try:
            with safe_open(self.folder / shard["file"], "pt") as file:
                mean, std, labels = (file.get_tensor(name) for name in ("mean", "std", "labels"))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"data is {self.data!r}; {shard['file']} is broken ({error}); {_AGAIN}"
            ) from None
        for name, tensor in (("mean", mean), ("std", std)):
            if tensor.shape != shape or tensor.dtype != self.dtype:
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ValueError(
                    f"data is {self.data!r}; {name} in {shard['file']} is {found} and not {shape}"
                )
        if labels.shape != shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"data is {self.data!r}; labels in {shard['file']} are {labels.dtype} {labels.shape}"
            )
        self._mapped[number] = mean.numpy(), std.numpy()
        return *self._mapped[number], labels.clone()
