"""linear_assignment on integer costs of the sizes that S and XL models match, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.timing import interleaved_medians
from switch_moe.ops import linear_assignment


def make_cost(slots: int) -> torch.Tensor:
    """Integers up to N = 1000, as the matching's."""
    return torch.from_numpy(np.random.default_rng(slots).integers(0, 1000, (slots, slots)))


@pytest.mark.parametrize("slots", [36, 84, 1024])
def test_linear_assignment(benchmark, ratios: list[str], slots: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    cost = make_cost(slots)
    benchmark.group = f"{slots} x {slots}"
    benchmark(linear_assignment, cost)
    medians = interleaved_medians(
        {
            "ours": lambda: linear_assignment(cost),
            "scipy": lambda: optimize.linear_sum_assignment(cost.numpy()),
        }
    )
    ratios.append(
        f"linear_assignment of {slots:4} rows: {medians['ours'] / medians['scipy']:.2f} of scipy's time"
    )
