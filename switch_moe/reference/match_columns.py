"""Specification of :func:`switch_moe.ops.match_columns`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def matching_cost(selected: Tensor, table: Tensor) -> Tensor:
    """``C[a, b] = sum_t |selected[t, a] - table[t, b]|``, int64 ``[S, S]``, exact.

    By ``sum(A) + sum(U) - 2 A^T U = sum(U) + A^T (1 - 2 U)`` for 0/1 tables A and U. Zeros and signs survive
    TF32 and bfloat16 products.
    """
    with torch.autocast(selected.device.type, enabled=False):
        table = table.float()
        product = selected.float().t() @ (1 - 2 * table) + table.sum(0)
    return product.to(torch.int64)


def match_columns(
    selected: Tensor,
    table: Tensor,
    rows: Tensor,
    columns: Tensor,
    prices: Tensor | None,
    solve: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """See the operation. ``solve(cost, prices)`` is the linear assignment."""
    cost = matching_cost(selected, table).index_select(0, rows).index_select(1, columns)
    permuted = None if prices is None else prices[columns]
    found = solve(cost, permuted)
    if prices is not None and permuted is not None:
        prices.index_copy_(0, columns, permuted)
    return torch.empty_like(found).index_copy_(0, rows, columns.index_select(0, found))
