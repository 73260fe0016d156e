"""How time and memory grow along each axis alone, from one shape in the middle; forward + backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.case import BOTH, Case
from benchmarks.cases import stack_case
from benchmarks.measure import measure

PASSES = (BOTH,)
MIDDLE = {"B": 8, "T": 256, "D": 384, "M": 8, "k": 2, "L": 1}
AXES = {
    "B": (4, 8, 16, 32, 64),
    "T": (64, 128, 256, 512, 1024),
    "D": (192, 384, 576, 768, 1152),
    "M": (2, 4, 8, 16, 32),
    "k": (1, 2, 4, 8),
    "L": (1, 2, 4, 8),
}


def cases(device: str, quick: bool) -> Iterator[tuple[str, Case]]:
    middle = MIDDLE | ({"B": 64} if device == "cuda" else {})
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for axis, values in AXES.items():
        scale = middle["B"] // MIDDLE["B"] if axis == "B" else 1
        for value in (values[0], values[-2]) if quick else values:
            b, t, d, m, k, depth = (middle | {axis: value * scale}).values()
            yield "growth", stack_case(device, dtype, b, t, d, m, k, depth, note=axis)


def test_growth(benchmark, recorder, measured) -> None:
    measure(measured, benchmark, recorder)
