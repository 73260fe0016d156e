"""Looks inside a model: which experts are used when, what timesteps share, and how near the prior is.

    python models/inspect_routing.py

looks at the digits model that is in here, and

    python models/inspect_routing.py --run runs/digits

at that of a run.

It prints a table and writes four pictures and routing.json, which has all numbers; README.md in this folder
says how to read them. In the folder of a run they take the place of those that training wrote, and the run's
report shows them. It needs no data: experts are chosen by the timestep alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from switch_dit.inspection import inspect_model
from switch_dit.pipeline import load_pipeline
from switch_dit.report import write_report
from switch_dit.routing_plots import write_routing
from switch_dit.schedulers import objective_of
from switch_dit.settings import TrainConfig, settings_of

SHIPPED = Path(__file__).parent / "pretrained" / "digits"


@dataclass
class InspectConfig:
    """Show how a model routes timesteps to experts."""

    run: Path = SHIPPED
    """The folder of the run, as the training command prints it, or of a saved pipeline."""
    output: Path | None = None
    """The folder to write to, made where it is missing. By default it is that of the run; for a saved
    pipeline, and for other weights than the run's report is about, it is the folder routing in this one."""
    weights: Literal["ema", "model"] = "ema"
    """Whether to look at the moving average of the weights (ema) or at the last ones (model)."""
    weights_folder: str = "weights"
    """The folder of the run that holds the weights, such as one that average_weights.py has written."""


def run(config: InspectConfig) -> Path:
    """Writes pictures and numbers, prints a table and returns the folder. Wrong settings raise first."""
    source = Path(config.run)
    if not source.is_dir():
        raise FileNotFoundError(f"run is {source}; there is no such folder")
    if not any((source / name).exists() for name in (config.weights_folder, "model_index.json")):
        raise FileNotFoundError(
            f"run is {source}; it must be the folder of a run, with {config.weights_folder} in it, or of a "
            "saved pipeline"
        )
    pipeline = load_pipeline(source, config.weights, config.weights_folder)
    model = pipeline.transformer
    if model.routing != "switch":
        raise ValueError(
            f"run is {source}, whose model has routing {model.routing!r} and so no table of "
            "timesteps and experts; it must be one that was trained with --routing switch"
        )
    folder = _folder(config)
    continuous = objective_of(pipeline.scheduler, model.learn_sigma).continuous
    inspection = inspect_model(model, continuous=continuous)
    folder.mkdir(parents=True, exist_ok=True)
    paths = write_routing(folder, inspection)
    print(f"{source}\n\n{inspection.describe()}\n\nwritten to {folder}/:")
    for path in paths:
        print(f"  {path.name}")
    if folder == source and (folder / "config.json").is_file():
        print(f"the run's report shows them: {write_report(folder, settings_of(TrainConfig()))}")
    return folder


def _folder(config: InspectConfig) -> Path:
    """Where to write; what a run's report shows stays about the weights in the run's folder weights."""
    source, own = Path(config.run), (config.weights, config.weights_folder) == ("ema", "weights")
    is_run = own and not (source / "model_index.json").is_file()
    folder = Path(config.output or (source if is_run else "routing"))
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output is {folder}; it is a file and no folder")
    return folder


def main() -> None:
    config = tyro.cli(InspectConfig, description=__doc__)
    try:
        run(config)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
