"""Averages the weights of a run by another width, after its training.

python models/average_weights.py --run runs/digits --sigma-rel 0.07
python models/sample_switch_dit.py --run runs/digits --weights-folder weights-sigma0.070

The run must have been trained with --power-averages 0.05 0.10, which leaves snapshots in its folder averages.
A wider average forgets slower: sigma_rel is the standard deviation of the times that it counts, as a share of
the training so far (EDM2, arXiv 2312.02696, section 3). The more snapshots there are, the nearer it comes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from switch_dit.averages import PowerAverage, gamma_of
from switch_dit.checkpoint import load_checkpoint, load_settings, save_weights
from switch_dit.snapshots import load_snapshots, width_text

from switch_moe.ops._checks import check_integers


@dataclass
class AverageConfig:
    """Average the weights of a run by another width."""

    run: Path
    """The folder of the run, as the training command prints it."""
    sigma_rel: float
    """The width of the average, in [0.0001, 0.2886]."""
    steps: int | None = None
    """The average is that after this many steps. By default it is the latest."""


def run(config: AverageConfig) -> Path:
    """Writes the folder of weights, prints and returns its path. Wrong settings raise first."""
    gamma_of(config.sigma_rel)
    if config.steps is not None:
        check_integers(steps=config.steps)
    weights = Path(config.run) / "weights"
    snapshots = load_snapshots(Path(config.run) / "averages")
    model, _ = load_checkpoint(weights)
    parameters = dict(model.named_parameters())
    average = PowerAverage.reconstruct(snapshots, config.sigma_rel, config.steps)
    shapes, own = ({name: p.shape for name, p in each.items()} for each in (average, parameters))
    differs = sorted(name for name, _ in shapes.items() ^ own.items())
    if differs:
        raise ValueError(f"the snapshots are of another model than {weights}: {differs[0]} differs")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.requires_grad:  # the others are constants, and the coefficients sum to 1 only nearly
                parameter.copy_(average[name])
    name = f"weights-sigma{width_text(config.sigma_rel)}"
    if config.steps is not None:
        name += f"-step{config.steps}"
    folder = Path(config.run) / name
    save_weights(folder, {"ema": model.state_dict()}, load_settings(weights))
    print(f"the average of width {config.sigma_rel:g}, from {len(snapshots)} snapshots, is in {folder}/")
    print(
        f"samples: python {Path(sys.argv[0]).parent / 'sample_switch_dit.py'} --run {config.run} "
        f"--weights-folder {name}"
    )
    return folder


def main() -> None:
    config = tyro.cli(AverageConfig, description=__doc__)
    try:
        run(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
