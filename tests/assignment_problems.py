"""Problems that the assignment solvers are tested on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def problems(count: int, largest: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Square float64 costs: random, negative, tied, equal, low rank, banded with +inf, padded."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        n = int(rng.integers(1, largest + 1))
        kind = i % 8
        if kind == 0:
            yield rng.random((n, n))
        elif kind == 1:
            yield rng.normal(size=(n, n)) * 10.0 ** rng.integers(-3, 7)
        elif kind == 2:
            yield rng.integers(0, 3, (n, n)).astype(float)
        elif kind == 3:
            yield np.full((n, n), float(rng.integers(-5, 5)))
        elif kind == 4:
            yield np.outer(rng.integers(0, 4, n), rng.integers(0, 4, n)).astype(float)
        elif kind == 5:  # infeasible pairs, with a permutation that stays feasible
            cost = rng.random((n, n))
            cost[rng.random((n, n)) < 0.6] = np.inf
            cost[np.arange(n), rng.permutation(n)] = rng.random(n)
            yield cost
        elif kind == 6:  # a rectangle of m x n made square with rows of zeros
            cost = np.zeros((n, n))
            rows = int(rng.integers(0, n + 1))
            cost[:rows] = rng.integers(0, 50, (rows, n))
            yield cost
        else:
            yield rng.integers(-1000, 1000, (n, n)).astype(float)


def starts(cost: np.ndarray, seed: int = 0) -> Iterator[np.ndarray]:
    """Prices that a solve of ``cost`` may start from: none, random, lopsided, useless, out of range."""
    rng = np.random.default_rng(seed)
    n, integer = len(cost), cost.dtype == np.int64
    finite = np.abs(cost[np.isfinite(cost)])
    scale = finite.max() if finite.size else 1
    kinds = [np.zeros(n), scale * rng.uniform(-1, 1, n), 4 * scale * rng.choice([-1, 1], n)]
    kinds += [np.full(n, -scale), cost.min(0), 1000 * scale * rng.uniform(-1, 1, n)]
    for prices in kinds:
        yield np.nan_to_num(prices, posinf=0).astype(cost.dtype)
    for extreme in (-(2**63), 2**63 - 1) if integer else (np.nan, np.inf, -np.inf, 1e308):
        prices = np.zeros(n, cost.dtype)
        prices[n // 2 :] = extreme
        yield prices


def total(cost: np.ndarray, column: np.ndarray) -> float:
    """The cost of an assignment, after checking that it is one."""
    assert sorted(column.tolist()) == list(range(len(cost))), "not a permutation"
    return float(cost[np.arange(len(cost)), column].sum())
