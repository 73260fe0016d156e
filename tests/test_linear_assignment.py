"""linear_assignment: equal to scipy in total cost on thousands of problems."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from assignment_problems import problems, total
from scipy.optimize import linear_sum_assignment

from switch_moe.ops import linear_assignment


def optimum(cost: np.ndarray) -> float:
    rows, columns = linear_sum_assignment(cost)
    return float(cost[rows, columns].sum())


@pytest.mark.parametrize(("backend", "count", "largest"), [("native", 4000, 40), ("reference", 160, 12)])
def test_equals_scipy(backend: str, count: int, largest: int) -> None:
    for cost in problems(count, largest):
        column = linear_assignment(torch.from_numpy(cost), backend=backend).numpy()
        assert total(cost, column) == pytest.approx(optimum(cost), rel=1e-9, abs=1e-9)
        if np.isfinite(cost).all() and (cost == np.round(cost)).all():
            column = linear_assignment(torch.from_numpy(cost).to(torch.int64), backend=backend).numpy()
            assert total(cost, column) == optimum(cost)


@pytest.mark.parametrize("n", [36, 84, 257, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_large(n: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(n)
    for cost in (rng.integers(0, 1000, (n, n)), rng.integers(0, 3, (n, n))):
        column = linear_assignment(torch.from_numpy(cost).to(dtype)).numpy()
        assert total(cost, column) == optimum(cost)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_smallest(backend: str) -> None:
    empty = linear_assignment(torch.zeros(0, 0), backend=backend)
    assert empty.shape == (0,)
    assert empty.dtype == torch.int64
    assert linear_assignment(torch.tensor([[3.5]]), backend=backend).tolist() == [0]


def test_types_and_strides() -> None:
    cost = torch.randint(0, 100, (20, 20)).t()
    expected = total(cost.numpy(), linear_assignment(cost).numpy())
    for dtype in (torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float64):
        assert total(cost.numpy(), linear_assignment(cost.to(dtype)).numpy()) == expected
    large = torch.tensor([[2**58, 2**58 - 1], [2**58, 2**58]])  # float64 cannot tell them apart
    assert linear_assignment(large).tolist() == [1, 0]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (torch.zeros(2, 3), r"cost has shape \(2, 3\); it must be square"),
        (torch.zeros(4), r"cost has shape \(4,\); it must be square"),
        (torch.tensor([[1.0, float("nan")], [0.0, 0.0]]), "cost holds NaN or -inf"),
        (torch.tensor([[1.0, -float("inf")], [0.0, 0.0]]), "cost holds NaN or -inf"),
        (torch.tensor([[float("inf")] * 2, [0.0, 0.0]]), "no assignment of finite total cost"),
        (torch.full((4, 4), 2**61), "overflow int64"),
    ],
)
def test_errors(cost: torch.Tensor, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_assignment(cost, backend=backend)


def test_type_error() -> None:
    with pytest.raises(TypeError, match=r"cost is torch\.complex64; it must be a real"):
        linear_assignment(torch.zeros(2, 2, dtype=torch.complex64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_opcheck_and_compile(dtype: torch.dtype) -> None:
    cost = torch.randint(0, 100, (9, 9)).to(dtype)
    torch.library.opcheck(torch.ops.switch_moe.linear_assignment.default, (cost,))
    compiled = torch.compile(lambda c: linear_assignment(c * 2) + 1, fullgraph=True)
    assert torch.equal(compiled(cost), linear_assignment(cost) + 1)
