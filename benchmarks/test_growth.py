"""How time and memory grow along each axis alone, from one shape in the middle; forward + backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks.case import BOTH, Case
from benchmarks.cases import stack_case
from benchmarks.measure import Measured, measure_together

MIDDLE = {"B": 8, "T": 256, "D": 384, "M": 8, "k": 2, "L": 1}
AXES = {
    "B": (4, 8, 16, 32),
    "T": (64, 128, 256, 512),
    "D": (192, 384, 576, 768),
    "M": (2, 4, 8, 16),
    "k": (1, 2, 4, 8),
    "L": (1, 2, 4),
}


def cases(axis: str, device: str, quick: bool) -> list[Case]:
    """The shapes along an axis."""
    larger = 8 if device == "cuda" else 1
    middle = MIDDLE | {"B": larger * MIDDLE["B"]}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    values = AXES[axis][::2] if quick else AXES[axis]
    shapes = [middle | {axis: value * larger if axis == "B" else value} for value in values]
    return [
        stack_case(device, dtype, s["B"], s["T"], s["D"], s["M"], s["k"], s["L"], note=axis) for s in shapes
    ]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_growth(benchmark, recorder, device: str, axis: str) -> None:
    """All shapes of an axis take turns, so that the machine's drift does not bend the line."""
    several = [Measured("growth", case, BOTH, device) for case in cases(axis, device, recorder.quick)]
    measure_together(several, benchmark, recorder)
