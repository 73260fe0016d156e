"""linear_assignment, and the matching around it, against scipy at the sizes of S, XL and larger models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.timing import interleaved_medians
from switch_moe import DiffusionPrior
from switch_moe.ops import linear_assignment


def make_cost(slots: int) -> torch.Tensor:
    """Integers up to N = 1000, as the matching's."""
    return torch.from_numpy(np.random.default_rng(slots).integers(0, 1000, (slots, slots)))


@pytest.mark.parametrize("slots", [36, 84, 300, 1024])
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


def choose_experts(kind: str, depth: int) -> torch.Tensor:
    """Top 2 of 3 experts at 1000 timesteps, 0/1 ``[1000, 3 * depth]``: of untrained routers, which choose the
    same ones at all timesteps; of routers whose choice moves smoothly with the timestep; at random.
    """
    generator = torch.Generator().manual_seed(depth)
    if kind == "untrained":
        logits = torch.randn(1, depth, 3, generator=generator).expand(1000, -1, -1)
    elif kind == "smooth":
        frequency = torch.exp(-torch.arange(16) / 3)
        wave = torch.sin(torch.arange(1000)[:, None] * frequency)
        logits = (wave @ torch.randn(16, 3 * depth, generator=generator)).view(1000, depth, 3)
    else:
        logits = torch.randn(1000, depth, 3, generator=generator)
    chosen = torch.zeros(1000, depth, 3).scatter_(-1, logits.topk(2).indices, 1.0)
    return chosen.flatten(1)


@pytest.mark.parametrize("kind", ["untrained", "smooth", "random"])
@pytest.mark.parametrize("depth", [12, 24, 28])
def test_match(benchmark, ratios: list[str], kind: str, depth: int) -> None:
    """From the two 0/1 tables to the permutation; the official code builds the [1000, n, n] differences."""
    optimize = pytest.importorskip("scipy.optimize")
    prior, selected, slots = DiffusionPrior(depth, 3, 2), choose_experts(kind, depth), 3 * depth

    def official() -> torch.Tensor:
        of_model, of_table = torch.randperm(slots), torch.randperm(slots)
        model, table = selected[:, of_model], prior.table[:, of_table]
        cost = (model[:, :, None] - table[:, None, :]).abs().sum(0)
        found = torch.from_numpy(optimize.linear_sum_assignment(cost.numpy())[1])
        return torch.empty_like(found).index_copy_(0, of_model, of_table[found])

    def total(assignment: torch.Tensor) -> float:
        return float((selected - prior.table[:, assignment]).abs().sum())

    assert total(prior.match(selected)) == total(official())
    benchmark.group = f"match {slots} columns"
    benchmark(prior.match, selected)
    prices = torch.zeros(slots, dtype=torch.int64)
    medians = interleaved_medians(
        {
            "ours": lambda: prior.match(selected),
            "from the last prices": lambda: prior.match(selected, prices),
            "official": official,
        },
        rounds=51,
    )
    times = ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in medians.items())
    ratio = medians["official"] / medians["ours"]
    ratios.append(f"match {slots} columns, {kind}: {ratio:.1f} times as fast as the official way ({times})")
