"""Makes a grid of samples from the checkpoint of a run.

python models/sample_switch_dit.py --run runs/digits
python models/sample_switch_dit.py --run runs/digits --labels 3 5 --scheduler dpm-solver++ --steps 20
python models/sample_switch_dit.py --run runs/digits --weights-folder weights-sigma0.070
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from switch_dit.checkpoint import load_checkpoint
from switch_dit.devices import resolve_device
from switch_dit.plots import check_picture, plot_samples
from switch_dit.sampling import SCHEDULERS, sample

from switch_moe.ops._checks import check_integers, check_positive


@dataclass
class SampleConfig:
    """Draw samples of a trained model."""

    run: Path
    """The folder of the run, as the training command prints it."""
    labels: tuple[int, ...] = ()
    """The classes to draw, a row of the grid each. By default all are drawn."""
    count: int = 10
    """Each class gets this many samples."""
    steps: int = 50
    """The scheduler takes this many steps."""
    scheduler: Literal["auto", "ddim", "ddpm", "dpm-solver++", "euler"] = "auto"
    """auto takes euler for a flow, which takes dpm-solver++ besides, and ddim for the other objectives. ddpm
    uses the learned variance and wants more steps."""
    guidance: float = 1.5
    """The samples are drawn with this classifier-free guidance; 1 is none."""
    seed: int = 0
    """The same seed on the same machine gives the same images."""
    weights: Literal["ema", "model"] = "ema"
    """Whether to sample with the moving average of the weights (ema) or with the last ones (model)."""
    weights_folder: str = "weights"
    """The folder of the run that holds the weights, such as one that average_weights.py has written."""
    device: str = "auto"
    """auto takes cuda where there is one, else cpu."""
    output: Path | None = None
    """The picture to write, which must not exist. By default it goes to the run's folder."""


def run(config: SampleConfig) -> Path:
    """Samples, writes the grid, prints and returns its path. Wrong settings raise first."""
    check_integers(count=config.count, steps=config.steps)
    check_integers(0, seed=config.seed)
    check_positive(guidance=config.guidance)
    device = resolve_device(config.device)
    path = _free_path(config)
    model, objective = load_checkpoint(Path(config.run) / config.weights_folder, config.weights)
    scheduler = SCHEDULERS[objective.name][0] if config.scheduler == "auto" else config.scheduler
    model.to(device)
    if model.num_classes:
        classes = list(config.labels) or list(range(model.num_classes))
        labels = torch.tensor(classes, device="cpu").repeat_interleave(config.count)
    elif config.labels:
        raise ValueError(f"labels is {config.labels}; the model was trained without classes")
    else:
        labels = None
    images = sample(
        model,
        objective,
        labels,
        count=config.count,
        steps=config.steps,
        scheduler=scheduler,
        guidance=config.guidance,
        generator=torch.Generator("cpu").manual_seed(config.seed),
    )
    name = Path(config.run).name
    if config.weights_folder != "weights":
        name += f"/{config.weights_folder}"
    title = f"{name}: {scheduler}, {config.steps} steps, guidance {config.guidance:g}"
    plot_samples(path, images.cpu(), None if labels is None else labels.tolist(), config.count, title)
    print(f"{len(images)} samples in {path}")
    return path


def _free_path(config: SampleConfig) -> Path:
    if config.output is not None:
        output = Path(config.output)
        check_picture("output", output)
        if output.exists():
            raise FileExistsError(f"output is {output}; it exists, choose another")
        if not output.parent.is_dir():
            raise FileNotFoundError(f"output is {output}; its folder does not exist")
        return output
    taken = (Path(config.run) / f"samples-{number}.png" for number in range(1, 10_000))
    return next(path for path in taken if not path.exists())


def main() -> None:
    config = tyro.cli(SampleConfig, description=__doc__)
    try:
        run(config)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
