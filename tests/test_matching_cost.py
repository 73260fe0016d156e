"""matching_cost on every backend: exact at every size and type, bad input, opcheck."""

from __future__ import annotations

import pytest
import torch

from switch_moe import DiffusionPrior
from switch_moe.ops import matching_cost
from switch_moe.reference.diffusion_prior import prior_table

BACKENDS = ["native", "reference"]


def exact_cost(
    selected: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """As the official code adds it up, in integers."""
    first, second = selected.long()[:, rows], table.long()[:, columns]
    return (first[:, :, None] - second[:, None, :]).abs().sum(0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("timesteps", "slots"), [(1, 1), (3, 12), (63, 5), (64, 36), (65, 9), (1000, 84), (3000, 12)]
)
def test_exact(timesteps: int, slots: int, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    table = prior_table(timesteps, slots, max(1, 2 * slots // 3), 4.0)
    for ones in (0.0, 0.3, 1.0):
        selected = (torch.rand(timesteps, slots) < ones).to(dtype)
        order = torch.rand(2, slots).argsort(-1)
        found = matching_cost(selected, table, *order, backend=backend)
        assert found.dtype == torch.int64
        assert torch.equal(found, exact_cost(selected, table, *order))


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_in_reduced_precision(backend: str) -> None:
    """Where products of float32 are rounded to bfloat16, and under autocast."""
    torch.manual_seed(0)
    table, order = prior_table(3000, 12, 8, 4.0), torch.rand(2, 12).argsort(-1)
    selected = (torch.rand(3000, 12) < 0.6).float()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = matching_cost(selected, table, *order, backend=backend)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, exact_cost(selected, table, *order))


def test_strided_tables() -> None:
    torch.manual_seed(0)
    table, order = prior_table(100, 12, 8, 4.0), torch.rand(12, 2).argsort(0).t()
    selected = (torch.rand(12, 100) < 0.5).float().t()
    assert torch.equal(matching_cost(selected, table, *order), exact_cost(selected, table, *order))


def test_no_columns_or_rows() -> None:
    assert matching_cost(torch.ones(5, 0), torch.ones(5, 0), *torch.ones(2, 0).long()).shape == (0, 0)
    order = torch.arange(3).repeat(2, 1)
    assert not matching_cost(torch.ones(0, 3), torch.ones(0, 3), *order).any()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"table": torch.ones(5, 4)}, ValueError, r"table has shape \(5, 4\); it must be \[6, 4\]"),
        ({"rows": torch.zeros(3).long()}, ValueError, r"rows has shape \(3,\); it must be \[4\]"),
        ({"columns": torch.zeros(4)}, TypeError, "columns is torch.float32; it must be torch.int64"),
        ({"columns": torch.full((4,), 4)}, ValueError, r"columns holds 4 to 4; it must stay in \[0, 4\)"),
        ({"rows": torch.full((4,), -1)}, ValueError, r"rows holds -1 to -1; it must stay in \[0, 4\)"),
        ({"backend": "triton"}, RuntimeError, "matching_cost cannot run: it has no Triton kernel"),
    ],
)
def test_bad_input(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {"selected": torch.ones(6, 4), "table": torch.ones(6, 4)}
    arguments |= {"rows": torch.arange(4), "columns": torch.arange(4)}
    with pytest.raises(error, match=message):
        matching_cost(**{**arguments, **changed})


def test_opcheck_and_fullgraph() -> None:
    prior = DiffusionPrior(4, 3, 2, num_timesteps=100)
    order = torch.rand(2, 12).argsort(-1)
    arguments = ((torch.rand(100, 12) < 0.5).float(), prior.table, *order)
    torch.library.opcheck(torch.ops.switch_moe.matching_cost.default, arguments)
    compiled = torch.compile(matching_cost, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), matching_cost(*arguments, backend="reference"))
