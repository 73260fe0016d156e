"""Specification of :func:`switch_moe.ops.linear_assignment`: shortest augmenting paths, a step a column."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_assignment(cost: Tensor, prices: Tensor | None = None) -> Tensor:
    """The column of each row at the least total cost: ``cost [n, n]`` to int64 ``[n]``.

    Jonker and Volgenant, Computing 38, 1987. ``prices [n]`` are a start, and updated in place. ``ValueError``
    where every assignment has an infinite cost.
    """
    n = cost.shape[0]
    exact = cost.to(torch.float64 if cost.is_floating_point() else torch.int64)
    unreached = torch.inf if cost.is_floating_point() else torch.iinfo(torch.int64).max
    # Duals: cost - u - v >= 0, with equality on assigned pairs. Any v will do, given the largest such u.
    v = exact.new_zeros(n) if prices is None else _usable(prices, exact)
    u = (exact - v).amin(1) if n else v.clone()
    column_of = torch.full((n,), -1, device=cost.device)
    row_of = torch.full((n,), -1, device=cost.device)
    for start in range(n):
        distance = torch.full_like(v, unreached)
        previous_row = torch.full_like(row_of, -1)
        seen = torch.zeros(n, dtype=torch.bool, device=cost.device)
        row, shortest, seen_rows = start, exact.new_zeros(()), []
        while True:  # Dijkstra over reduced costs, until it reaches a column that no row has
            seen_rows.append(row)
            through = shortest + exact[row] - u[row] - v
            nearer = (through < distance) & ~seen
            distance = torch.where(nearer, through, distance)
            previous_row[nearer] = row
            column = int(torch.where(seen, unreached, distance).argmin())
            shortest = distance[column]
            if seen[column] or shortest == unreached:
                raise ValueError("cost has no assignment of finite total cost")
            seen[column] = True
            if row_of[column] < 0:
                break
            row = int(row_of[column])
        u[start] += shortest
        for row in seen_rows[1:]:
            u[row] += shortest - distance[column_of[row]]
        v[seen] -= shortest - distance[seen]
        while column >= 0:  # flip the path
            row = int(previous_row[column])
            row_of[column] = row
            column, column_of[row] = int(column_of[row]), column
            if row == start:
                break
    if prices is not None and n:
        prices.copy_(v - v.max())
    return column_of


def _usable(prices: Tensor, cost: Tensor) -> Tensor:
    """Prices that neither overflow nor drown the costs in rounding; zeros for others."""
    finite = cost[cost.isfinite()]
    bound = 4 * finite.abs().max() if finite.numel() else finite.new_zeros(())
    if not cost.is_floating_point():
        bound = bound.clamp(max=2**59)
    usable = bool(((prices <= bound) & (prices >= -bound)).all())
    return prices.clone() if usable else torch.zeros_like(prices)
