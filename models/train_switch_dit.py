"""Trains Switch-DiT. Without arguments: the tiny model on handwritten digits, a few minutes on two CPU cores.

On a CPU (bfloat16 where it has AMX, else float32):

    python models/train_switch_dit.py

On a GPU, which it takes where there is one, with the whole step as one CUDA graph:

    python models/train_switch_dit.py --cuda-graph

The same model without experts, and with fixed channel masks, for comparison; samples and measures of each run
are in its folder:

    python models/train_switch_dit.py --routing none --name dense
    python models/train_switch_dit.py --routing dtr --name masks

Images of your own, from an .npz file with images (uint8 [n, H, W, C], H = W) and labels (integers from 0):

    python models/train_switch_dit.py --data my_images.npz --model S/2 --steps 20000 --lr 1e-4 --cuda-graph
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import tyro
from switch_dit.data import load_images
from switch_dit.metrics import evaluate
from switch_dit.plots import plot_loss, plot_routing, plot_samples
from switch_dit.trainer import TrainConfig, Trainer, make_run_folder


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains, writes the run's folder and prints what is in it. Returns the final numbers."""
    config.validate()
    images = load_images(config.data)
    if len(images.train) < config.batch_size:
        raise ValueError(
            f"batch_size is {config.batch_size}; {config.data} has {len(images.train)} training images"
        )
    trainer = Trainer(config, images)
    folder = make_run_folder(config)
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()
    }
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(trainer.device),
    }
    (folder / "config.json").write_text(json.dumps({**settings, "environment": environment}, indent=2) + "\n")
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{config.model} ({config.routing}), {parameters / 1e6:.2f} M parameters, on {trainer.device} in "
        f"{str(trainer.dtype).removeprefix('torch.')}: {len(images.train)} training images of {config.data}",
        flush=True,
    )
    started = time.perf_counter()
    try:
        rows = trainer.fit(folder)
    except KeyboardInterrupt:
        trainer.save(folder)
        raise SystemExit(f"\ninterrupted; the weights so far are in {folder / 'checkpoint'}/") from None
    training_seconds = time.perf_counter() - started
    trainer.save(folder)
    plot_loss(folder / "loss.png", rows)
    if config.routing == "switch":
        plot_routing(folder / "routing.png", trainer.ema)
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
    if config.generated:
        summary |= finish_with_samples(trainer, folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\nwritten to {folder}/:")
    for path in sorted(folder.iterdir()):
        print(f"  {path.name}{'/' if path.is_dir() else ''}")
    print(f"more samples: python {Path(sys.argv[0]).parent / 'sample_switch_dit.py'} --run {folder}")
    return summary


def finish_with_samples(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Generates, draws the grid and measures; the measures need labels."""
    config = trainer.config
    generated, labels = trainer.generate(config.generated)
    classes = trainer.images.num_classes if config.conditional else 10
    shown = generated[: 10 * classes].unflatten(0, (-1, classes)) if len(generated) >= 10 * classes else None
    grid = generated[:100] if shown is None else shown.transpose(0, 1).flatten(0, 1)
    names = [i // 10 for i in range(len(grid))] if shown is not None and labels is not None else None
    title = f"{config.model} ({config.routing}), {config.steps} steps, guidance {config.guidance:g}"
    plot_samples(folder / "samples.png", grid, names, columns=10, title=title)
    if labels is None:
        return {}
    metrics = evaluate(trainer.images, generated, labels)
    print(f"\n{metrics.generated} images, guidance {config.guidance:g}, {config.sample_steps} DDIM steps:")
    print(metrics.describe())
    return asdict(metrics)


def main() -> None:
    config = tyro.cli(TrainConfig, description=__doc__)
    try:
        run(config)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
