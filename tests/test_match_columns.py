"""match_columns on every backend: optimal and alike at every size and type, bad input, opcheck."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from switch_moe import DiffusionPrior
from switch_moe.ops import linear_assignment, match_columns
from switch_moe.prior import prior_table
from switch_moe.reference.match_columns import matching_cost

BACKENDS = ["native", "reference"]


def exact_cost(selected: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """As the official code adds it up, in integers."""
    return (selected.long()[:, :, None] - table.long()[:, None, :]).abs().sum(0)


def check_optimal(selected: torch.Tensor, table: torch.Tensor, match: torch.Tensor) -> None:
    cost = exact_cost(selected, table)
    assert match.dtype == torch.int64
    assert torch.equal(match.sort().values, torch.arange(len(cost)))
    rows, columns = linear_sum_assignment(cost.numpy())
    assert cost[torch.arange(len(cost)), match].sum() == cost.numpy()[rows, columns].sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("timesteps", "slots"), [(1, 1), (3, 12), (63, 5), (64, 36), (65, 9), (33, 16), (1000, 84), (3000, 17)]
)
def test_optimal_and_alike(timesteps: int, slots: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = prior_table(timesteps, slots, max(1, 2 * slots // 3), 4.0)
    for ones in (0.0, 0.3, 1.0):
        selected = (torch.rand(timesteps, slots) < ones).to(dtype)
        rows, columns = torch.rand(2, slots).argsort(-1)
        for backend in BACKENDS:
            check_optimal(selected, table, match_columns(selected, table, rows, columns, backend=backend))
        # Ties too are those of the solver given the costs in this order: every cost is exact.
        found = linear_assignment(exact_cost(selected, table)[rows][:, columns])
        expected = torch.empty_like(found).index_copy_(0, rows, columns[found])
        assert torch.equal(match_columns(selected, table, rows, columns), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_earlier_prices(backend: str) -> None:
    torch.manual_seed(0)
    table, prices = prior_table(200, 24, 16, 4.0), torch.zeros(24, dtype=torch.int64)
    logits = torch.randn(200, 24)
    for _ in range(10):
        selected = (logits > 0).float()
        order = torch.rand(2, 24).argsort(-1)
        match = match_columns(selected, table, *order, prices=prices, backend=backend)
        check_optimal(selected, table, match)
        reduced = matching_cost(selected, table) - prices  # prices certify it: each row has what it prefers
        assert torch.equal(reduced[torch.arange(24), match], reduced.min(1).values)
        logits += 0.1 * torch.randn_like(logits)
    assert prices.any()


def test_cost_is_exact_in_reduced_precision() -> None:
    """Where products of float32 are rounded to bfloat16, and under autocast."""
    torch.manual_seed(0)
    table = prior_table(3000, 12, 8, 4.0)
    selected = (torch.rand(3000, 12) < 0.6).float()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = matching_cost(selected, table)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, exact_cost(selected, table))


def test_strided_tables() -> None:
    torch.manual_seed(0)
    table, order = prior_table(100, 12, 8, 4.0), torch.rand(12, 2).argsort(0).t()
    selected = (torch.rand(12, 100) < 0.5).float().t()
    check_optimal(selected, table, match_columns(selected, table, *order))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_columns_or_rows(backend: str) -> None:
    nothing = torch.ones(2, 0).long()
    assert match_columns(torch.ones(5, 0), torch.ones(5, 0), *nothing, backend=backend).shape == (0,)
    order = torch.arange(3).repeat(2, 1)
    match = match_columns(torch.ones(0, 3), torch.ones(0, 3), *order, backend=backend)
    assert torch.equal(match.sort().values, torch.arange(3))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"table": torch.ones(5, 4)}, ValueError, r"table has shape \(5, 4\); it must be \[6, 4\]"),
        ({"rows": torch.zeros(3).long()}, ValueError, r"rows has shape \(3,\); it must be \[4\]"),
        ({"columns": torch.zeros(4)}, TypeError, "columns is torch.float32; it must be torch.int64"),
        ({"prices": torch.zeros(4)}, TypeError, "prices is torch.float32; it must be torch.int64"),
        ({"prices": torch.zeros(8).long()[::2]}, ValueError, "prices is not contiguous"),
        ({"backend": "triton"}, RuntimeError, "match_columns cannot run: it has no Triton kernel"),
    ],
)
def test_bad_input(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {"selected": torch.ones(6, 4), "table": torch.ones(6, 4)}
    arguments |= {"rows": torch.arange(4), "columns": torch.arange(4)}
    with pytest.raises(error, match=message):
        match_columns(**{**arguments, **changed})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["rows", "columns"])
@pytest.mark.parametrize("order", [[0, 1, 2, 4], [-1, 1, 2, 3], [0, 1, 1, 3]])
def test_no_permutation(name: str, order: list[int], backend: str) -> None:
    arguments = {"rows": torch.arange(4), "columns": torch.arange(4)} | {name: torch.tensor(order)}
    prices = torch.ones(4).long()
    with pytest.raises(ValueError, match=rf"{name} is \[.*\]; it must be a permutation of 0 to 3"):
        match_columns(torch.ones(6, 4), torch.ones(6, 4), **arguments, prices=prices, backend=backend)
    assert prices.eq(1).all()


def test_opcheck_and_fullgraph() -> None:
    prior = DiffusionPrior(4, 3, 2, num_timesteps=100)
    selected, order = (torch.rand(100, 12) < 0.5).float(), torch.rand(2, 12).argsort(-1)
    arguments = (selected, prior.table, *order)
    operators = torch.ops.switch_moe
    torch.library.opcheck(operators.match_columns.default, arguments)
    torch.library.opcheck(
        operators.match_columns_from.default, (*arguments, torch.zeros(12, dtype=torch.int64))
    )
    compiled = torch.compile(match_columns, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), match_columns(*arguments))
