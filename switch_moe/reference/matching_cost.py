"""Specification of :func:`switch_moe.ops.matching_cost`."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_TIMESTEPS = 2**24  # float32 counts to there


def matching_cost(selected: Tensor, table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """See the operation. By ``sum(A) + sum(U) - 2 A^T U = sum(U) + A^T (1 - 2 U)`` for 0/1 tables A and U.

    Zeros and signs survive TF32 and bfloat16 products.
    """
    with torch.autocast(selected.device.type, enabled=False):
        table = table.float()
        product = selected.float().t() @ (1 - 2 * table) + table.sum(0)
    return product.to(torch.int64).index_select(0, rows).index_select(1, columns)
