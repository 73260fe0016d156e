"""linear_assignment against scipy, at the sizes of Switch-DiT S, L, XL and above."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import SWITCH_MOE, Case, Contender, Inputs, Outputs
from switch_moe.ops import linear_assignment


def cases(device: str, quick: bool) -> Iterator[Case]:
    for rows in (36, 84) if quick else (36, 84, 300, 1024):
        yield assignment_case(device, rows)


def test_linear_assignment(bench, case, which) -> None:
    bench.measure(case, which)


def assignment_case(device: str, rows: int) -> Case:
    """Random integers up to 1,000, as the matching has."""

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        return {"cost": torch.randint(1000, (rows, rows), generator=generator, device=device)}

    def scipy(i: Inputs) -> Outputs:
        return (best_columns(i["cost"]),)

    def exact(i: Inputs, outputs: Outputs) -> Outputs:
        return (if_best(i["cost"], outputs[0]),)

    contenders = [
        Contender(SWITCH_MOE, lambda i: (linear_assignment(i["cost"]),), exact, (), ("cost",), True),
        Contender("scipy", scipy, exact, (), ("cost",)),
    ]
    shape: dict[str, int | str] = {"n": rows}
    outputs = {"assignment": ""}
    return Case("linear_assignment", shape, torch.float32, make, contenders, outputs, exact_by_inputs=False)


def best_columns(cost: Tensor) -> Tensor:
    """scipy's assignment, solved on the host."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(cost.cpu())[1]).to(cost.device)


def if_best(cost: Tensor, columns: Tensor) -> Tensor:
    """``columns`` in float64, or NaN unless they are a permutation of the least total cost: any such one is
    right.
    """
    rows = torch.arange(len(cost), device=cost.device)
    permutation = torch.equal(columns.sort().values, rows)
    if permutation and cost[rows, columns].sum() == cost[rows, best_columns(cost)].sum():
        return columns.double()
    return torch.full_like(columns, torch.nan, dtype=torch.float64)
