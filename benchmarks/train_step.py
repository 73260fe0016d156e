"""A whole training step of Switch-DiT and of DiT in the same loop: eager, compiled and as one CUDA graph.

    python -m benchmarks.train_step --output benchmarks/results       # S/2 and XL/2 on a GPU, tiny/4 on a CPU

Random latents of 32 x 32 x 4. The modes of a model take turns, so that drift of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from switch_dit.data import Images
from switch_dit.train import TrainConfig, Trainer

WARM_UP = 6  # steps; a graph is captured in the fourth
MODES = {"eager": {}, "compiled": {"compile": True}, "graphed": {"cuda_graph": True}}


def random_images(count: int, size: int, channels: int, classes: int) -> Images:
    """Latents of noise, the held-out ones few."""
    images, labels = torch.randn(count, channels, size, size), torch.randint(classes, (count,))
    return Images(images, labels, images[:classes], labels[:classes], classes)


def synchronize(device: torch.device) -> None:
    """Waits for the device, where it runs on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_step(config: TrainConfig, images: Images) -> Callable[[], None]:
    """A function that runs the next training step."""
    trainer = Trainer(config, images)
    trainer.model.train()
    number = 0

    def step() -> None:
        nonlocal number
        trainer.step(number, torch.randint(len(images.train), (config.batch_size,)))
        number += 1

    for _ in range(WARM_UP):
        step()
    synchronize(trainer.device)
    return step


def seconds_of(step: Callable[[], None], device: torch.device, steps: int) -> float:
    """Seconds for each of some steps that run on without a pause."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - started) / steps


def measure(
    model: str, batch: int, modes: list[str], device: torch.device, turns: int = 7
) -> list[dict[str, Any]]:
    """Rows of one model: routing switch and none in every mode."""
    images = random_images(4 * batch, 32 if device.type == "cuda" else 8, 4, 10)
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    rows = []
    for routing in ("switch", "none"):
        for mode in modes:
            row = {"model": model, "batch": batch, "routing": routing, "mode": mode}
            try:
                settings = {"model": model, "batch_size": batch, "routing": routing, "lr": 1e-4}
                config = TrainConfig(**settings, device=str(device), **MODES[mode])
                steps[routing, mode] = make_step(config, images)
            except Exception as error:  # one mode that fails must not hide the others
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(row)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(turns):
        for key, step in steps.items():
            times[key].append(seconds_of(step, device, 5))
    for row in rows:
        if (key := (row["routing"], row["mode"])) in times:
            row["milliseconds"] = 1e3 * statistics.median(times[key])
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: milliseconds a step, and switch over none in the same mode."""
    lines = ["| model | batch | mode | switch, ms | none, ms | switch / none |", "|---|---|---|---|---|---|"]
    for row in (row for row in rows if row["routing"] == "switch"):
        same = ("model", "batch", "mode")
        dense = next(r for r in rows if r["routing"] == "none" and all(r[k] == row[k] for k in same))
        ours, theirs = row.get("milliseconds"), dense.get("milliseconds")
        ratio = f"{ours / theirs:.2f}" if ours and theirs else "not measured"
        shown = [f"{t:.2f}" if t else "not measured" for t in (ours, theirs)]
        lines.append(
            f"| {row['model']} | {row['batch']} | {row['mode']} | {shown[0]} | {shown[1]} | {ratio} |"
        )
    lines += [
        f"{row['model']} {row['routing']} {row['mode']}: {row['error']}" for row in rows if "error" in row
    ]
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", help="sizes with patch, for example S/2 XL/2")
    parser.add_argument("--batch", type=int, help="images a step (default 64 on a GPU, 16 on a CPU)")
    parser.add_argument("--turns", type=int, default=7, help="times each mode is timed, over 5 steps each")
    parser.add_argument("--output", type=Path, help="folder for train_step_<device>.json")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modes = list(MODES) if device.type == "cuda" else ["eager"]
    models = options.models or (["S/2", "XL/2"] if device.type == "cuda" else ["tiny/4"])
    batch = options.batch or (64 if device.type == "cuda" else 16)
    rows = [row for model in models for row in measure(model, batch, modes, device, options.turns)]
    print("\n".join(table(rows)))
    if options.output:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"train_step_{name.lower().replace(' ', '_')}.json"
        path.write_text(
            json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
