"""Derives switch_moe/kernels/measured.json: of which shapes a result file shows the CUDA kernels faster.

A file counts where `make gpu` wrote it from committed sources, after it had run the tests of the CUDA kernels
that are here now. For each shape both passes must have been timed, with CUDA graphs, beside Triton's kernels
in the same rounds. The CUDA kernels are faster where in nine of ten rounds they take at least 2% less time in
either pass, and calls without graphs take no longer: a gain within the noise of the rounds does not count.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.case import BOTH, FORWARD, MODULATED, SWITCH_MOE, WITH_CUDA

MARGIN = 1.02  # Triton's time over that of the CUDA kernels
ROUNDS = 0.9  # share of the rounds that must show it
CONTENDERS = {SWITCH_MOE: False, MODULATED: True}  # Triton's, and whether they modulate
TESTS = "tests.test_expert_linear_hopper"
Row = dict[str, Any]


def kernels(root: Path) -> int:
    """A number for the sources of the CUDA kernels: what was measured is what is here, or does not count."""
    left = [*root.glob("csrc/expert_linear*.cu"), root / "switch_moe" / "kernels" / "expert_linear_hopper.py"]
    found: dict[Path, bytes] = {}
    while left:
        path = left.pop()
        if path not in found and path.exists():  # what the emulation includes lies elsewhere
            found[path] = path.read_bytes()
            included = re.findall(rb'^#include "(.+)"', found[path], re.MULTILINE)
            left += [path.parent / name.decode() for name in included]
    total = 0
    for path in sorted(found):
        total = zlib.crc32(path.name.encode() + b"\0" + found[path], total)
    return total


def tested(counts: dict[str, dict[str, int]]) -> bool:
    """Whether the tests of the CUDA kernels ran, from the outcomes of each test file."""
    of_kernels = [count for name, count in counts.items() if name.startswith(TESTS)]
    passed = sum(count.get("passed", 0) for count in of_kernels)
    return passed > 0 and passed == sum(sum(count.values()) for count in of_kernels)  # none was skipped


def fault(machine: dict[str, Any], root: Path) -> str | None:
    """Why no row of a result file counts, or None."""
    if machine.get("cuda_kernels") is None:
        return "it has no CUDA kernels of expert_linear"
    if machine["cuda_kernels"] != kernels(root):
        return "the CUDA kernels of expert_linear were others than those here; run `make gpu` again"
    if machine.get("dirty") or machine.get("quick"):
        return "it is of uncommitted changes" if machine.get("dirty") else "it is a quick run"
    if not tested(machine.get("tests", {})):
        return "the tests of the CUDA kernels did not all run before it; `make gpu` runs them"
    return None


def rows(name: str, machine: dict[str, Any], lines: list[Any], root: Path) -> Iterator[Row]:
    """A row for each shape of a result file, from its lines of expert_linear."""
    if fault(machine, root) is not None:
        return
    passes: dict[str, dict[str, Any]] = {}
    for line in lines:
        passes.setdefault(f"{line.first['dtype']} {line.first['shape']}", {})[line.first["pass"]] = line
    for of_shape in passes.values():
        for triton, modulate in CONTENDERS.items():
            ratios = {which: ratio(line.contenders, triton) for which, line in of_shape.items()}
            found = {which: over for which, over in ratios.items() if over is not None}
            if not {FORWARD, BOTH} <= set(found):
                continue
            first = of_shape[BOTH].first
            shape = first["shape"]
            faster = all(wins for _, wins in found.values())
            yield {
                "architecture": machine["architecture"], "dtype": first["dtype"], "Din": shape["D"],
                "Dout": shape["D"], "M": shape["M"], "k": shape["k"], "modulate": modulate, "B": shape["B"],
                "T": shape["T"], FORWARD: found[FORWARD][0], BOTH: found[BOTH][0],
                "backend": "cuda" if faster else "triton", "results": name, "commit": machine["commit"],
            }  # fmt: skip


def ratio(contenders: dict[str, Row], triton: str) -> tuple[float, bool] | None:
    """The time of the CUDA kernels over Triton's, the median over rounds, and whether they are faster."""
    mine, theirs = contenders.get(triton + WITH_CUDA), contenders.get(triton)
    if not mine or not theirs or mine["failure"] or theirs["failure"]:
        return None
    if mine.get("method") != "graph" or theirs.get("method") != "graph":
        return None
    over = [a / b for a, b in zip(mine["samples"], theirs["samples"], strict=True)]
    eager = [a / b for a, b in zip(mine.get("eager", []), theirs.get("eager", []), strict=True)]
    won = sum(one <= 1 / MARGIN for one in over) >= math.ceil(ROUNDS * len(over))
    wins = won and bool(eager) and statistics.median(eager) <= 1
    return float(f"{statistics.median(over):.3g}"), wins


def merge(found: list[Row]) -> list[Row]:
    """One row for each shape and architecture: the worst for the CUDA kernels of what its GPUs showed."""
    worst: dict[Any, Row] = {}
    names = ("architecture", "dtype", "Din", "Dout", "M", "k", "modulate", "B", "T")
    for row in found:
        key = tuple(row[name] for name in names)
        if key not in worst or badness(row) > badness(worst[key]):
            worst[key] = row
    return [worst[key] for key in sorted(worst)]


def badness(row: Row) -> tuple[bool, float]:
    return (row["backend"] == "triton", row[BOTH])


def text(found: list[Row]) -> str:
    """The file: a row on each line."""
    return "[" + ",".join("\n" + json.dumps(row) for row in found) + ("\n]\n" if found else "]\n")
