"""Draws images: a grid, a folder of PNG files, or an .npz file as the evaluations of ADM read it.

python models/sample_switch_dit.py                                   # digits, by the model that is in here
python models/sample_switch_dit.py --run runs/digits --labels 3 5 --scheduler dpm-solver++ --steps 20
python models/sample_switch_dit.py --run runs/digits --weights-folder weights-sigma0.070
torchrun --nproc_per_node=8 models/sample_switch_dit.py --run runs/digits --images 50000 --output digits.npz

Image i has the seed --seed + i, so on a CPU it is the same to the bit whatever else is drawn. Typed again,
the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from switch_dit import pipeline as pipelines
from switch_dit.autoencoder import load_autoencoder
from switch_dit.devices import resolve_device
from switch_dit.pipeline import SwitchDiTPipeline
from switch_dit.plots import check_picture, plot_samples
from switch_dit.sampling import create_scheduler, group_size
from switch_dit.schedulers import objective_of
from tqdm import tqdm

from switch_moe.ops._checks import check_integers, check_positive

SHIPPED = Path(__file__).parent / "pretrained" / "digits"


@dataclass
class SampleConfig:
    """Draw samples of a trained model."""

    run: Path = SHIPPED
    """The folder of the run, as the training command prints it, or of a saved pipeline."""
    labels: tuple[int, ...] = ()
    """The classes to draw, a row of the grid each. By default all are drawn."""
    count: int = 10
    """Each class gets this many samples in a grid."""
    images: int = 0
    """A folder or an .npz file gets this many samples, of the classes in turn. By default it is --count of
    each."""
    steps: int = 50
    """The scheduler takes this many steps."""
    scheduler: Literal["auto", "ddim", "ddpm", "dpm-solver++", "unipc", "euler"] = "auto"
    """auto takes that of a saved pipeline, euler for a flow, which takes dpm-solver++ and unipc besides, and
    ddim for the other objectives. ddpm uses the learned variance and wants more steps."""
    guidance: float = 1.5
    """The samples are drawn with this guidance; 1 is none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """The times within which there is guidance, from 0, data, to 1, noise."""
    guidance_channels: int | None = None
    """The number of channels that are guided. By default all are; the published DiT guides 3 of 4."""
    guide: Path | None = None
    """A second run, smaller or less trained, whose prediction takes the place of the one without a label."""
    top_k: int | None = None
    """Each block chooses this many experts. By default it is as many as in training; sweep_top_k.py measures
    others."""
    seed: int = 0
    """The first image has this seed, and each image the next one."""
    weights: Literal["ema", "model"] = "ema"
    """Whether to sample with the moving average of the weights (ema) or with the last ones (model)."""
    weights_folder: str = "weights"
    """The folder of the run that holds the weights, such as one that average_weights.py has written."""
    vae: str | None = None
    """Latents are decoded by this AutoencoderKL: a name on the Hugging Face hub, or a folder."""
    batch_size: int = 64
    """This many images are drawn at a time."""
    device: str = "auto"
    """auto takes cuda where there is one, else cpu."""
    output: Path | None = None
    """The picture or .npz file to write, which must not exist, or the folder for PNG files. By default a
    picture goes to the run's folder, or to this one where there is no run."""


def run(config: SampleConfig, rank: int = 0, world_size: int = 1) -> Path:
    """Draws, prints and returns the path of what it wrote. Wrong settings raise first."""
    check_integers(count=config.count, steps=config.steps, batch_size=config.batch_size)
    check_integers(0, images=config.images, seed=config.seed)
    check_positive(guidance=config.guidance)
    device = resolve_device(config.device)
    path = _free_path(config)
    is_grid = bool(path.suffix) and path.suffix != ".npz"
    if is_grid and (config.images or world_size > 1):
        what = f"images is {config.images}" if config.images else f"there are {world_size} processes"
        raise ValueError(f"{what}; output must then be a folder or an .npz file, and is {path}")
    pipeline = load_pipeline(config).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if config.top_k is not None:
        pipeline.transformer.set_top_k(config.top_k)
    classes = _classes(config, pipeline.transformer.num_classes)
    if is_grid:
        return _draw_grid(config, pipeline, classes, path)
    return _draw_many(config, pipeline, classes, path, rank, world_size)


def load_pipeline(config: SampleConfig, folder: Path | None = None) -> SwitchDiTPipeline:
    """The pipeline of a run or of a saved one, by default of ``config.run``, with the scheduler asked for."""
    folder = config.run if folder is None else folder
    pipeline = pipelines.load_pipeline(folder, config.weights, config.weights_folder)
    model = pipeline.transformer
    if config.scheduler != "auto":
        objective = objective_of(pipeline.scheduler, model.learn_sigma)
        clip = model.in_channels in (1, 3)
        pipeline.scheduler = create_scheduler(config.scheduler, objective, clip)
    if config.vae is not None:
        pipeline.register_modules(vae=load_autoencoder(config.vae, latents=model.in_channels))
    return pipeline


def _classes(config: SampleConfig, num_classes: int) -> list[int] | None:
    if num_classes:
        return list(config.labels) or list(range(num_classes))
    if config.labels:
        raise ValueError(f"labels is {config.labels}; the model was trained without classes")
    return None


def _draw(
    config: SampleConfig, pipeline: SwitchDiTPipeline, labels: list[int] | None, first: int, count: int,
    guide: Any, output_type: str,
) -> Any:  # fmt: skip
    """Images ``first`` to ``first + count``, each by its own seed."""
    seeds = range(config.seed + first, config.seed + first + count)
    return pipeline(
        labels, config.guidance, config.steps,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type=output_type, num_images=count, guidance_interval=config.guidance_interval,
        guidance_channels=config.guidance_channels, guide=guide, batch_size=config.batch_size,
    ).images  # fmt: skip


def _guide(config: SampleConfig, pipeline: SwitchDiTPipeline) -> Any:
    if config.guide is None:
        return None
    return load_pipeline(config, config.guide).transformer.to(pipeline.transformer.pos_embed.device)


def _draw_grid(
    config: SampleConfig, pipeline: SwitchDiTPipeline, classes: list[int] | None, path: Path
) -> Path:
    labels = None if classes is None else [label for label in classes for _ in range(config.count)]
    count = config.count if labels is None else len(labels)
    decoded = pipeline.vae is not None
    images = _draw(
        config, pipeline, labels, 0, count, _guide(config, pipeline), "pt" if decoded else "latent"
    )
    name = Path(config.run).name
    if config.weights_folder != "weights":
        name += f"/{config.weights_folder}"
    scheduler = type(pipeline.scheduler).__name__.removesuffix("Scheduler")
    title = f"{name}: {scheduler}, {config.steps} steps, guidance {config.guidance:g}"
    title += "" if config.top_k is None else f", k = {config.top_k}"
    images = images * 2 - 1 if decoded else images
    plot_samples(path, images.cpu(), labels, config.count, title)
    print(f"{count} samples in {path}")
    return path


def _draw_many(
    config: SampleConfig, pipeline: SwitchDiTPipeline, classes: list[int] | None, path: Path, rank: int,
    world_size: int,
) -> Path:  # fmt: skip
    """Batches of images, each written whole; process ``rank`` draws every ``world_size``-th batch."""
    count = config.images or config.count * len(classes or [0])
    group = group_size(pipeline.transformer)
    size = -(-config.batch_size // group) * group  # whole groups: see switch_dit.sampling
    store = Store(path, settings_of(config, classes, count, size))
    guide = _guide(config, pipeline)
    numbers = [number for number in range(-(-count // size)) if number % world_size == rank]
    todo = [number for number in numbers if not store.done(number)]
    for number in tqdm(todo, desc="drawing", unit="batch", disable=rank != 0):
        first, last = number * size, min(count, (number + 1) * size)
        labels = None if classes is None else [classes[i % len(classes)] for i in range(first, last)]
        drawn = _draw(config, pipeline, labels, first, last - first, guide, "np")
        store.write(number, (drawn * 255).round().astype(np.uint8), labels, rank)
    missing = store.finish(-(-count // size))
    if missing:
        print(f"this process is done; {missing} batches are still to come", flush=True)
    else:
        print(f"{count} samples in {path}")
    return path


def settings_of(config: SampleConfig, classes: list[int] | None, count: int, size: int) -> dict[str, Any]:
    """What the images depend on, as JSON holds it. Image i has label ``classes[i % len(classes)]``."""
    place = ("device", "output", "labels", "count", "batch_size")
    found = {name: value for name, value in asdict(config).items() if name not in place}
    found |= {"images": count, "classes": classes, "batch": size}
    return json.loads(json.dumps(found, default=lambda path: str(path.resolve())))


class Store:
    """Where batches of images go: PNG files in a folder, or parts of an .npz file until all are there."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.folder = path.with_name(path.name + ".parts") if path.suffix == ".npz" else path
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "samples.json"
        if not note.exists():
            if any(file.suffix in (".png", ".npy") for file in self.folder.iterdir()):
                raise FileExistsError(f"output is {path}; {self.folder} has other images, choose another")
            self._write(note, (json.dumps(settings, indent=1) + "\n").encode())
            return
        try:
            before = json.loads(note.read_text())
        except ValueError:
            raise ValueError(f"{note} is broken; remove {self.folder} and begin again") from None
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            was = ", ".join(f"{key} was {before.get(key)!r} and is {settings[key]!r}" for key in changed)
            raise ValueError(f"output is {path}; {self.folder} has images of other settings: {was}")

    def done(self, number: int) -> bool:
        return all(file.exists() for file in self._files(number))

    def _files(self, number: int) -> list[Path]:
        if self.path.suffix == ".npz":
            return [self.folder / f"{number:06d}.npy"]
        first = number * self.settings["batch"]
        last = min(self.settings["images"], first + self.settings["batch"])
        return [self.folder / f"{i:06d}.png" for i in range(first, last)]

    def write(self, number: int, images: np.ndarray, labels: list[int] | None, rank: int) -> None:
        """A batch uint8 [n, H, W, C]."""
        files = self._files(number)
        if self.path.suffix == ".npz":
            self._save(files[0], rank, lambda file: np.save(file, images))
            return
        for path, image in zip(files, images.squeeze(-1) if images.shape[-1] == 1 else images, strict=True):
            self._save(path, rank, lambda file, image=image: Image.fromarray(image).save(file, "png"))

    def finish(self, batches: int) -> int:
        """The number of batches that are missing. If there are none, the .npz file is made of its parts."""
        missing = sum(not self.done(number) for number in range(batches))
        if self.path.suffix != ".npz" or (missing and not self.path.exists()):
            return missing
        try:
            images = np.concatenate([np.load(self._files(number)[0]) for number in range(batches)])
        except FileNotFoundError:
            if self.path.exists():  # another process has made it
                return 0
            raise
        arrays = {"arr_0": images}
        if (classes := self.settings["classes"]) is not None:
            arrays["arr_1"] = np.array([classes[i % len(classes)] for i in range(len(images))])
        self._save(self.path, 0, lambda file: np.savez(file, **arrays))
        shutil.rmtree(self.folder, ignore_errors=True)
        return 0

    def _write(self, path: Path, content: bytes) -> None:
        self._save(path, os.getpid(), lambda file: file.write(content))

    def _save(self, path: Path, tag: int, save: Any) -> None:
        """Whole or not at all."""
        draft = path.with_name(f"{path.name}.{tag}.incomplete")
        try:
            with open(draft, "wb") as file:
                save(file)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def _free_path(config: SampleConfig) -> Path:
    if config.output is not None:
        output = Path(config.output)
        is_file = bool(output.suffix)
        if is_file and output.suffix != ".npz":
            check_picture("output", output)
        if is_file and output.exists():
            raise FileExistsError(f"output is {output}; it exists, choose another")
        if not output.parent.is_dir():
            raise FileNotFoundError(f"output is {output}; its folder does not exist")
        if not is_file and output.exists() and not output.is_dir():
            raise FileExistsError(f"output is {output}; it is a file and no folder")
        return output
    folder = Path() if config.run == SHIPPED else Path(config.run)
    taken = (folder / f"samples-{number}.png" for number in range(1, 10_000))
    return next(path for path in taken if not path.exists())


def main() -> None:
    config = tyro.cli(SampleConfig, description=__doc__)
    try:
        run(config, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
