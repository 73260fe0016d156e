"""Trains Switch-DiT. Without arguments: the tiny model on handwritten digits, a few minutes on two CPU cores.

On a CPU (bfloat16 where it has AMX, else float32):

    python models/train_switch_dit.py

On a GPU, which it takes where there is one, with the whole step as one CUDA graph:

    python models/train_switch_dit.py --cuda-graph

The same model without experts, and with fixed channel masks, for comparison; samples and measures of each run
are in its folder:

    python models/train_switch_dit.py --routing none --name dense
    python models/train_switch_dit.py --routing dtr --name masks

Interrupted at any moment, the same command goes on where it was, and ends with the same weights to the bit.

On several GPUs, or processes, with the same batch; --fsdp leaves each a share of the weights:

    torchrun --nproc_per_node=8 models/train_switch_dit.py ...

Images of your own, from a folder with a folder of images for each class, or from an .npz file with images
(uint8 [n, H, W, C], H = W) and labels (integers from 0):

    python models/train_switch_dit.py --data images:DIR --image-size 32 --flip
    python models/train_switch_dit.py --data my_images.npz --model S/2 --steps 20000 --lr 1e-4 --cuda-graph

The settings of a run that is known, and what is given beside it:

    python models/train_switch_dit.py --recipe fashion-mnist

Large images are encoded once, by an autoencoder:

    python models/encode_latents.py --data images:DIR --output LATENTS --vae NAME_OR_PATH
    python models/train_switch_dit.py --data latents:LATENTS --model S/2 --steps 20000 --lr 1e-4 --cuda-graph
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save_file
from switch_dit.data import load_data
from switch_dit.distributed import World, joined
from switch_dit.inspection import inspect_model
from switch_dit.loop import Interrupted, Loop, Rows, rows_until
from switch_dit.metrics import Evaluator
from switch_dit.plots import plot_loss, plot_samples
from switch_dit.recipes import RECIPES
from switch_dit.report import write_report
from switch_dit.resume import locked
from switch_dit.routing_plots import PICTURES, plot_use, write_routing
from switch_dit.settings import TrainConfig, carried_settings, run_folder, settings_of
from switch_dit.trainer import Trainer
from torch import Tensor
from tqdm import tqdm


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains, writes the run's folder and prints what is in it. Returns the final numbers.

    In a process of torchrun it is one of the run's, and the first one writes.
    """
    config.validate()
    with joined(config.device) as world:
        return run_in_world(config, world)


def run_in_world(config: TrainConfig, world: World) -> dict[str, Any]:
    """The part of the run that all of its processes take together."""
    images = load_data(
        config.data, image_size=config.image_size, unreadable=config.unreadable, verify=config.verify_data,
        rank=world.rank, world_size=world.size,
    )  # fmt: skip
    if len(images) < config.batch_size:
        raise ValueError(
            f"batch_size is {config.batch_size}; {config.data} has {len(images)} training images"
        )
    if config.evaluate_every and images.held_out is None:
        raise ValueError(
            f"evaluate_every is {config.evaluate_every}; {config.data} has no held-out images to compare with"
        )
    trainer = Trainer(config, images, world=world, carried=carried_settings(config))
    if world.first:
        print(describe(trainer), flush=True)
    if config.dry_run:
        return {}
    folder = world.on_first(lambda: run_folder(config))
    with contextlib.ExitStack() as held:
        world.on_first(lambda: held.enter_context(locked(folder)) or None)
        evaluator = Evaluator(images)
        loop = Loop(
            trainer, folder,
            draw=lambda *what: draw_on_the_way(loop, *what),
            measure=lambda *what: measure_on_the_way(loop, evaluator, *what),
        )  # fmt: skip
        held.callback(lambda: loop.tracker.close())
        return run_in(folder, config, loop, evaluator)


def describe(trainer: Trainer) -> str:
    """One line: what is trained, where, on what."""
    config, model, size = trainer.config, trainer.model, trainer.world.size
    total, active = sum(p.numel() for p in model.parameters()), model.active_parameters()
    processes = "" if size == 1 else f"{size} processes ({'FSDP' if config.fsdp else 'DDP'}) "
    return (
        f"{config.model} ({config.routing}), {total / 1e6:.2f} M parameters, {active / 1e6:.2f} M of them "
        f"active, {trainer.flops_per_image() / 1e9:.3g} GFLOP to train on an image; on {processes}"
        f"{trainer.device} in {str(trainer.dtype).removeprefix('torch.')}: {len(trainer.images)} training "
        f"images of {config.data}; into {config.output}/"
    )


def run_in(folder: Path, config: TrainConfig, loop: Loop, evaluator: Evaluator) -> dict[str, Any]:
    """The run in its folder, which this process holds the lock of."""
    trainer = loop.trainer
    images, world = trainer.images, trainer.world
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(trainer.device),
    }
    world.on_first(lambda: write_settings(folder, config, images.identity(), environment, trainer.carried))
    started = time.perf_counter()
    try:
        rows = loop.run()
    except Interrupted as interrupted:
        trainer.save(folder)
        if world.first:
            draw(lambda: write_report(folder, settings_of(TrainConfig())))
        said = f"\n{interrupted}; the weights so far are in {folder / 'weights'}/"
        raise SystemExit(said if world.first else 1) from None
    training_seconds = time.perf_counter() - started
    trainer.save(folder)
    if not world.first:
        return {}
    tail = rows[-max(1, len(rows) // 10) :]
    summary: dict[str, Any] = {
        "training_seconds": training_seconds,
        **{name: sum(row[name] for row in tail) / len(tail) for name in ("loss", "mse", "vb", "prior")},
    }
    print(
        f"\ntrained {config.steps} steps in {training_seconds:.0f} s; over the last tenth: "
        + ", ".join(f"{name} {summary[name]:.3f}" for name in ("loss", "mse", "vb", "prior"))
        + "\n  (loss = mse of the predicted noise + variational bound of its variance + weighted prior loss)"
    )
    if images.skipped:
        summary["unreadable"] = list(images.skipped.values())
        names = ", ".join(summary["unreadable"][:3]) + (", ..." if len(images.skipped) > 3 else "")
        print(
            f"{len(images.skipped)} images could not be read, others of their class took their place: {names}"
        )
    write_summary(folder, summary)
    if config.generated:
        generated, labels = trainer.generate(config.generated)
        if labels is not None and images.held_out is not None:
            measured = measure(trainer, evaluator, generated, labels)
            summary |= measured
            write_summary(folder, summary)
            if config.evaluate_every:
                write_evaluation(folder, config.steps, measured)
        if images.channels in (1, 3):
            draw(lambda: draw_samples(trainer, folder / "samples.png", generated, labels, config.steps))
        else:
            save_file({"latents": generated}, folder / "samples.safetensors")
    draw(lambda: plot_loss(folder / "loss.png", rows))
    if config.routing == "switch":
        continuous = trainer.objective.continuous
        draw(lambda: write_routing(folder, inspect_model(trainer.ema, continuous=continuous)))
    numbers = {f"end/{key}": value for key, value in summary.items() if isinstance(value, (int, float))}
    loop.tracker.log(config.steps, numbers)
    pictures = {name: folder / f"{name}.png" for name in ("samples", *PICTURES)}
    loop.tracker.images(config.steps, {name: path for name, path in pictures.items() if path.exists()})
    draw(lambda: write_report(folder, settings_of(TrainConfig())))
    print(f"\nwritten to {folder}/:")
    for path in sorted(folder.iterdir()):
        print(f"  {path.name}{'/' if path.is_dir() else ''}")
    print(f"more samples: python {Path(sys.argv[0]).parent / 'sample_switch_dit.py'} --run {folder}")
    return summary


def write_settings(
    folder: Path,
    config: TrainConfig,
    identity: str,
    environment: dict[str, str],
    carried: dict[str, Any] | None,
) -> None:
    """Writes config.json; ``ValueError`` where the data are not those that the run in the folder had."""
    written = folder / "config.json"
    if written.exists() and json.loads(written.read_text()).get("data_identity", identity) != identity:
        raise ValueError(
            f"data is {config.data!r}; it is not what the run in {folder} was trained on, choose another name"
        )
    draft = folder / "config.incomplete"
    of_run = {**settings_of(config), "data_identity": identity, "environment": environment}
    of_run["carried"] = carried
    draft.write_text(json.dumps(of_run, indent=2) + "\n")
    draft.replace(written)


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def draw(picture: Callable[[], None]) -> None:
    """Draws; a picture that cannot be drawn is said and costs nothing else of the run."""
    try:
        picture()
    except Exception as error:  # whatever matplotlib raises
        print(f"a picture could not be drawn ({type(error).__name__}: {error})", file=sys.stderr)


def draw_on_the_way(loop: Loop, average: torch.nn.Module, step: int, rows: Rows) -> None:
    """Pictures of a run that goes on, in its folder pictures, and the report with them."""
    trainer, folder = loop.trainer, loop.folder
    place, classes = folder / "pictures", trainer.images.num_classes
    place.mkdir(exist_ok=True)
    paths = {name: place / f"step-{step}-{name}.png" for name in ("samples", "routing", "loss")}
    if trainer.images.channels in (1, 3):
        labelled = trainer.config.conditional and classes <= 10
        drawn = trainer.generate(10 * classes if labelled else 100, average)
        draw(lambda: draw_samples(trainer, paths["samples"], *drawn, step))
    if trainer.config.routing == "switch":
        continuous = trainer.objective.continuous
        draw(lambda: plot_use(paths["routing"], inspect_model(average, continuous=continuous)))
    draw(lambda: plot_loss(paths["loss"], rows))
    loop.tracker.images(step, {name: path for name, path in paths.items() if path.exists()})
    draw(lambda: write_report(folder, settings_of(TrainConfig())))


def measure_on_the_way(loop: Loop, evaluator: Evaluator, average: torch.nn.Module, step: int) -> None:
    """Measures samples of a run that goes on: a line of evaluations.jsonl, and one on the screen."""
    generated, labels = loop.trainer.generate(loop.config.generated, average)
    measured = asdict(evaluator(generated, labels))
    write_evaluation(loop.folder, step, measured)
    loop.tracker.log(step, {f"evaluation/{key}": value for key, value in measured.items()})
    names = ("conditional_accuracy", "frechet_distance", "mind")
    told = ", ".join(f"{name.replace('_', ' ')} {measured[name]:.3f}" for name in names)
    tqdm.write(f"step {step}: {told}")


def write_evaluation(folder: Path, step: int, measured: dict[str, float]) -> None:
    """Adds a line to evaluations.jsonl, in the place of those of this step and later ones."""
    path = folder / "evaluations.jsonl"
    rows_until(path, step - 1)
    with open(path, "a") as file:
        file.write(json.dumps({"step": step, **measured}) + "\n")


def draw_samples(trainer: Trainer, path: Path, generated: Tensor, labels: Tensor | None, steps: int) -> None:
    """A grid of ten samples of each of the first ten classes, or of a hundred samples."""
    config, classes = trainer.config, trainer.images.num_classes
    shown, names = generated[:100], None
    if labels is not None and len(generated) >= 10 * classes:
        rows = range(min(classes, 10))
        shown = torch.cat([generated[row : 10 * classes : classes] for row in rows])
        names = [row for row in rows for _ in range(10)]
    title = f"{config.model} ({config.routing}), {steps} steps, guidance {config.guidance:g}"
    plot_samples(path, shown, names, columns=10, title=title)


def measure(trainer: Trainer, evaluator: Evaluator, generated: Tensor, labels: Tensor) -> dict[str, Any]:
    """Measures the samples and prints what was found."""
    config = trainer.config
    metrics = evaluator(generated, labels)
    print(f"\n{metrics.generated} images, guidance {config.guidance:g}, {config.sample_steps} DDIM steps:")
    print(metrics.describe())
    return asdict(metrics)


def defaults_for(arguments: list[str]) -> TrainConfig:
    """The defaults of the recipe that is named among the arguments of the command; ours without one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default="")
    name = parser.parse_known_args(arguments)[0].recipe
    settings = RECIPES[name].settings if name in RECIPES else {}
    return TrainConfig(recipe=name, **settings)


def main() -> None:
    config = tyro.cli(TrainConfig, default=defaults_for(sys.argv[1:]), description=__doc__)
    try:
        run(config)
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        sys.exit(1 if getattr(error, "told", False) else f"error: {error}")


if __name__ == "__main__":
    main()
