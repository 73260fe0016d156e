"""linear_assignment: equal to scipy in total cost on thousands of problems."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from assignment_problems import problems, starts, total
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


def check_prices(cost: np.ndarray, column: np.ndarray, prices: np.ndarray) -> None:
    """Prices prove an optimum: every row has a column that it prefers, where cost - price is least."""
    assert prices.max() == 0
    preferred = (cost - prices).min(1)
    paid = (cost - prices)[np.arange(len(cost)), column]
    scale = max(np.abs(cost[np.isfinite(cost)]).max(), np.abs(prices).max())
    assert (paid - preferred <= (0 if cost.dtype == np.int64 else 1e-12 * scale)).all()


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "count", "largest"), [("native", 400, 40), ("reference", 24, 12)])
def test_any_start(backend: str, count: int, largest: int) -> None:
    """From useful and useless prices, and those of a similar problem: the same total, and a proof of it."""
    rng = np.random.default_rng(0)
    for i, cost in enumerate(problems(count, largest, seed=4)):
        whole = np.isfinite(cost).all() and (cost == np.round(cost)).all()
        for exact in [cost, cost.astype(np.int64), cost.astype(np.int64) * 2**40] if whole else [cost]:
            for start in starts(exact, i):
                changed, prices = exact, torch.from_numpy(start)
                for _ in range(3):
                    given = torch.from_numpy(changed)
                    column = linear_assignment(given, prices=prices, backend=backend).numpy()
                    assert total(changed, column) == pytest.approx(optimum(changed), rel=1e-9, abs=1e-9)
                    check_prices(changed, column, prices.numpy())
                    changed = np.where(rng.random(exact.shape) < 0.1, exact + abs(changed).min(), exact)


@pytest.mark.parametrize("n", [0, 1, 2, 33, 84, 300])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float32])
def test_sizes_and_repetition(n: int, dtype: torch.dtype) -> None:
    exact = torch.float64 if dtype.is_floating_point else torch.int64
    cost = torch.from_numpy(np.random.default_rng(n).integers(0, 20, (n, n))).to(dtype)
    prices = torch.zeros(n, dtype=exact)
    column = linear_assignment(cost, prices=prices)
    assert total(cost.numpy(), column.numpy()) == optimum(cost.numpy())
    assert torch.equal(linear_assignment(cost), column)
    again = torch.zeros(n, dtype=exact)
    assert torch.equal(linear_assignment(cost, prices=again), column)
    assert torch.equal(again, prices)


@pytest.mark.parametrize("forbidden", [0.5, 0.9])
def test_forbidden_pairs(forbidden: float) -> None:
    rng = np.random.default_rng(1)
    for n in (7, 40, 84):
        cost = np.where(rng.random((n, n)) < forbidden, np.inf, rng.random((n, n)))
        cost[np.arange(n), rng.permutation(n)] = 1.0
        column = linear_assignment(torch.from_numpy(cost)).numpy()
        assert total(cost, column) == pytest.approx(optimum(cost), rel=1e-12)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_prices_stay_where_there_is_no_answer(backend: str) -> None:
    inf = float("inf")
    for cost in ([[inf, inf], [0.0, 0.0]], [[inf, 0.0], [inf, 0.0]], [[1.0, float("nan")], [0.0, 0.0]]):
        prices = torch.tensor([0.0, -1.0], dtype=torch.float64)
        with pytest.raises(ValueError, match="cost h"):
            linear_assignment(torch.tensor(cost), prices=prices, backend=backend)
        assert prices.tolist() == [0.0, -1.0]


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
        (torch.full((4, 4), 2**61), "cost holds 2305843009213693952; sums over 4 rows overflow int64"),
        (torch.full((2, 2), -(2**63)), "cost holds 9223372036854775808; sums over 2 rows overflow int64"),
    ],
)
def test_errors(cost: torch.Tensor, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_assignment(cost, backend=backend)


def test_type_error() -> None:
    with pytest.raises(TypeError, match=r"cost is torch\.complex64; it must be a real"):
        linear_assignment(torch.zeros(2, 2, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("prices", "error", "message"),
    [
        (torch.zeros(4), TypeError, r"prices is torch\.float32; it must be torch\.int64"),
        (torch.zeros(3).long(), ValueError, r"prices has shape \(3,\); it must be \[4\]"),
        (torch.zeros(8).long()[::2], ValueError, "prices is not contiguous"),
        (torch.zeros(4, device="meta").long(), ValueError, "prices is on meta; it must be on cpu"),
    ],
)
def test_price_errors(prices: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_assignment(torch.ones(4, 4).long(), prices=prices)
    with pytest.raises(TypeError, match=r"prices is torch\.int64; it must be torch\.float64"):
        linear_assignment(torch.ones(4, 4), prices=torch.zeros(4).long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_opcheck_and_compile(dtype: torch.dtype) -> None:
    cost = torch.randint(0, 100, (9, 9)).to(dtype)
    prices = torch.zeros(9, dtype=torch.float64 if dtype.is_floating_point else torch.int64)
    torch.library.opcheck(torch.ops.switch_moe.linear_assignment.default, (cost,))
    torch.library.opcheck(torch.ops.switch_moe.linear_assignment_from.default, (cost, prices.clone()))
    compiled = torch.compile(lambda c, p: linear_assignment(c * 2, prices=p) + 1, fullgraph=True)
    assert torch.equal(compiled(cost, None), linear_assignment(cost) + 1)
    expected = prices.clone()
    for _ in range(2):
        assert torch.equal(compiled(cost, prices), linear_assignment(cost * 2, prices=expected) + 1)
        assert torch.equal(prices, expected)
        assert prices.any()
