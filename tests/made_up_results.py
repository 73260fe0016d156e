"""Result files of benchmarks/ that no machine measured."""

from __future__ import annotations

import random
import statistics
from typing import Any

BOTH = "forward+backward"
# Times as multiples of the dense layer's; ours loses to grouped_mm in bfloat16.
SPEEDS = {
    "float32": {"F.linear": 1.0, "switch_moe": 1.2, "expert loop": 2.6, "grouped_mm": 2.4},
    "bfloat16": {"F.linear": 1.0, "switch_moe": 1.9, "expert loop": 3.0, "grouped_mm": 1.6},
}
SHAPES = ({"D": 384, "B": 32, "T": 256}, {"D": 768, "B": 16, "T": 256}, {"D": 1152, "B": 8, "T": 256})
GROWTH = {
    "B": (4, 8, 16, 32), "T": (64, 128, 256, 512), "D": (192, 384, 768, 1152), "M": (2, 3, 4, 8, 16),
    "k": (1, 2, 4, 8), "L": (1, 2, 4, 8),
}  # fmt: skip


def row(group: str, case: str, contender: str, microseconds: float | None, **changes: Any) -> dict[str, Any]:
    """A row with what all rows have."""
    found = {
        "group": group, "case": f"{group} {case}", "note": "", "shape": {}, "dtype": "float32",
        "device": "cpu", "pass": BOTH, "contender": contender, "ours": contender.startswith("switch_moe"),
        "microseconds": microseconds, "samples": [microseconds] * 9 if microseconds else [], "error": 1e-7,
        "allowed": 1e-5, "failure": None,
    }  # fmt: skip
    return found | changes


def rows() -> list[dict[str, Any]]:
    """All kinds of rows."""
    found = []
    for dtype, speeds in SPEEDS.items():
        for shape in SHAPES:
            sizes = shape | {"M": 3, "k": 2}
            case = " ".join(f"{key}={value}" for key, value in sizes.items())
            dense = shape["D"] ** 2 * shape["B"] * 0.01
            for name, speed in speeds.items():
                found.append(row("expert_linear", case, name, dense * speed, dtype=dtype, shape=sizes))
                saved = {"saved_bytes": int(speed * 2**24), "peak_bytes": int(speed * 2**25)}
                found.append(row("layer", case, name, dense * speed * 1.1, dtype=dtype, shape=sizes, **saved))
            with_table = dense * 1.15 * speeds["switch_moe"]
            found.append(row("layer", case, "switch_moe + table", with_table, dtype=dtype, shape=sizes))
            found.append(
                row("layer", case, "official", dense * 2.9, dtype=dtype, shape=sizes, saved_bytes=2**27)
            )
    gate = {"D": 384, "N": 1032}
    for name, time in (("reference", 900.0), ("switch_moe", 300.0)):
        found.append(row("gate", "D=384 N=1032", name, time, shape=gate, **{"pass": "forward"}))
    found.append(row("gate", "D=384 N=1032", "broken", None, failure="wrong: 1.0 off", **{"pass": "forward"}))
    for name, time in (("dense DiT", 1e5), ("switch_moe", 1.2e5), ("official structure", 2e5)):
        step = {
            "model": "tiny/4", "note": "eager", "batch": 32, "images_per_second": 32e6 / time, "mfu": 0.41,
            "moe_share": 0.11, "operators": 812, "host_waits": 0, "peak_bytes": 2**28, "pass": "train",
        }  # fmt: skip
        found.append(row("train_step", "", name, time, **step) | {"case": "tiny/4 B=32"})
    default = {"B": 16, "T": 256, "D": 384, "M": 4, "k": 2, "L": 1}
    powers = {
        "switch_moe": {"B": 1, "T": 1, "D": 1.9, "M": 0.1, "k": 0.02, "L": 1},
        "F.linear": {"B": 1, "T": 1, "D": 1.8, "M": 0, "k": 0, "L": 1},
        "expert loop": {"B": 1, "T": 1, "D": 1.8, "M": 0.05, "k": 0.9, "L": 1},
    }
    for axis, sizes in GROWTH.items():
        for size in sizes:
            shape = default | {axis: size}
            for name, exponents in powers.items():
                factor = (size / default[axis]) ** exponents[axis]
                time, peak = 4e3 * SPEEDS["float32"][name] * factor, int(2**24 * factor)
                case = f"{axis}={size}"
                found.append(row("growth", case, name, time, note=axis, shape=shape, peak_bytes=peak))
    return found


def report(found: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """A result file."""
    machine = {"cpu": "Made Up 1", "cpu_family": "family 0, model 0", "cores": 2, "memory_bytes": 2**33,
               "isa": "none", "threads": 2, "gpu": None}  # fmt: skip
    return {
        "format": 1, "machine": machine, "versions": {"torch": "0.0"}, "commit": "0" * 40, "dirty": False,
        "date": "never", "quick": False, "peers": {"official": "available", "Liger": "not importable"},
        "rows": rows() if found is None else found,
    } | changes  # fmt: skip


def noisy(found: list[dict[str, Any]], seed: int, noise: float, rounds: int = 15) -> list[dict[str, Any]]:
    """The rows with samples that spread by ``noise`` (relative) around their times."""
    generator = random.Random(seed)
    changed = []
    for entry in found:
        time = entry["microseconds"]
        samples = [time * generator.gauss(1, noise) for _ in range(rounds)] if time else []
        changed.append(
            entry | {"samples": samples, "microseconds": statistics.median(samples) if time else None}
        )
    return changed
