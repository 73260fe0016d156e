"""Measures the samples of a trained model when each block chooses another number of experts, k from 1 to M.

    python models/sweep_top_k.py

looks at the digits model that is in here, and

    python models/sweep_top_k.py --run runs/digits

at that of a run. All k draw from the same noise. A router's gates are not renormalised: a larger k than that
of training adds the experts that training left out, a smaller one leaves some out, and the other terms of the
sum stay what they are.

It prints a table and writes top-k.json, which has all numbers, and top-k.png. Draw samples with the k that is
best by sample_switch_dit.py --top-k.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from switch_dit.data import Images, load_data
from switch_dit.devices import resolve_device
from switch_dit.files import write_whole
from switch_dit.metrics import Evaluator, Metrics
from switch_dit.pipeline import SwitchDiTPipeline, load_pipeline
from switch_dit.plots import new_figure, save_figure

from switch_moe.ops._checks import check_integers, check_positive

SHIPPED = Path(__file__).parent / "pretrained" / "digits"


@dataclass
class SweepConfig:
    """Measure samples of a model with other numbers of experts than in training."""

    run: Path = SHIPPED
    """The folder of the run, as the training command prints it, or of a saved pipeline."""
    data: str | None = None
    """The real images, as for training: digits, mnist-5k, fashion-mnist[:DIR]. By default they are those of
    the run."""
    top_k: tuple[int, ...] = ()
    """The numbers of experts to measure. By default it is each from 1 to M."""
    images: int = 1000
    """This many samples are drawn for each k, of the classes in turn."""
    steps: int = 50
    """The scheduler takes this many steps."""
    guidance: float = 1.5
    """The samples are drawn with this guidance; 1 is none."""
    seed: int = 0
    """The first image has this seed, and each image the next one."""
    weights: Literal["ema", "model"] = "ema"
    """Whether to sample with the moving average of the weights (ema) or with the last ones (model)."""
    weights_folder: str = "weights"
    """The folder of the run that holds the weights, such as one that average_weights.py has written."""
    batch_size: int = 250
    """This many images are drawn at a time."""
    device: str = "auto"
    """auto takes cuda where there is one, else cpu."""
    output: Path | None = None
    """The folder to write to, made where it is missing. By default it is that of the run, and for a saved
    pipeline the folder top-k in this one."""


def run(config: SweepConfig) -> dict[int, Metrics]:
    """Draws, measures, prints and writes; returns the measures of each k. Wrong settings raise first."""
    check_integers(2, images=config.images)
    check_integers(steps=config.steps, batch_size=config.batch_size)
    check_integers(0, seed=config.seed)
    check_positive(guidance=config.guidance)
    device = resolve_device(config.device)
    pipeline = load_pipeline(config.run, config.weights, config.weights_folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    model = pipeline.transformer
    numbers = config.top_k or tuple(range(1, model.config.num_experts + 1))
    for k in reversed(numbers):  # a k that does not fit is said before anything is drawn
        model.set_top_k(k)
    images = _real_images(config, model)
    folder = _folder(config)
    evaluator, found = Evaluator(images), {}
    print(f"{'k':>3}  {'accuracy':>8}  {'Frechet distance':>16}  {'MIND':>8}")
    for k in numbers:
        model.set_top_k(k)
        found[k] = evaluator(*_draw(config, pipeline))
        accuracy, distance, mind = found[k].conditional_accuracy, found[k].frechet_distance, found[k].mind
        note = "  as in training" if k == model.config.top_k else ""
        print(f"{k:3}  {accuracy:8.3f}  {distance:16.3f}  {mind:8.4f}{note}", flush=True)
    model.set_top_k(model.config.top_k)
    write(folder, config, found, model.config.top_k)
    print(f"\nwritten to {folder}/: top-k.json, top-k.png")
    return found


def _real_images(config: SweepConfig, model: Any) -> Images:
    """The data set; ``ValueError`` where the measures cannot be taken against it."""
    data = config.data
    if data is None and config.run == SHIPPED:
        data = "digits"
    if data is None:
        settings = Path(config.run) / "config.json"
        data = json.loads(settings.read_text()).get("data") if settings.is_file() else None
        if data is None:
            raise ValueError(f"data is None, and {config.run} has no config.json that says it; give --data")
    images = load_data(data)
    if not isinstance(images, Images) or not len(images.held_out):
        raise ValueError(f"data is {data!r}; it must be a set in memory with images held out from training")
    wanted = (images.channels, images.size, images.num_classes)
    found = (model.in_channels, model.input_size, model.num_classes)
    if found != wanted:
        raise ValueError(
            f"data is {data!r} with channels, size and classes {wanted}; the model has {found} and must have "
            "the same"
        )
    return images


def _draw(config: SweepConfig, pipeline: SwitchDiTPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels, of the noise that sample_switch_dit.py gives image i."""
    labels = torch.arange(config.images) % pipeline.transformer.num_classes
    seeds = range(config.seed, config.seed + config.images)
    drawn = pipeline(
        labels, config.guidance, config.steps,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="latent", batch_size=config.batch_size,
    ).images  # fmt: skip
    return drawn.cpu(), labels


def _folder(config: SweepConfig) -> Path:
    saved = (Path(config.run) / "model_index.json").is_file()
    folder = Path(config.output or ("top-k" if saved else config.run))
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output is {folder}; it is a file and no folder")
    return folder


def write(folder: Path, config: SweepConfig, found: dict[int, Metrics], trained: int) -> None:
    """top-k.json and top-k.png."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(config), default=str))
    for place in ("device", "output", "batch_size", "top_k"):
        del settings[place]
    content = {"settings": settings, "trained_top_k": trained}
    content["top_k"] = {str(k): asdict(metrics) for k, metrics in found.items()}
    write_whole(folder / "top-k.json", (json.dumps(content, indent=1) + "\n").encode())
    figure, (axes,) = new_figure(1, 2, figsize=(8, 3))
    ks, first = sorted(found), next(iter(found.values()))
    for axis, name, real, title in (
        (axes[0], "conditional_accuracy", first.classifier_accuracy, "accuracy; dotted: real images"),
        (axes[1], "frechet_distance", first.frechet_floor, "Frechet distance; dotted: halves of real images"),
    ):
        axis.plot(ks, [getattr(found[k], name) for k in ks], marker="o")
        axis.axhline(real, color="grey", linestyle=":")
        axis.axvline(trained, color="tab:orange", alpha=0.4)
        axis.set_xticks(ks)
        axis.set_xlabel(f"experts in use, k; {trained} in training")
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    save_figure(figure, folder / "top-k.png", dpi=130)


def main() -> None:
    config = tyro.cli(SweepConfig, description=__doc__)
    try:
        run(config)
    except (ValueError, TypeError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
