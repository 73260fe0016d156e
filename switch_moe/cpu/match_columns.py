"""The compiled matching on a CPU: the costs, counted in bits, and their assignment in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


def match_columns(
    selected: Tensor, table: Tensor, rows: Tensor, columns: Tensor, prices: Tensor | None
) -> tuple[Tensor, bool]:
    """The column of ``table`` for each of ``selected``, int64 ``[S]``, and whether orders were permutations.

    Shapes as in :func:`switch_moe.ops.match_columns`; ``prices`` are updated in place.
    """
    tensors = [
        selected.float().contiguous(),
        table.float().contiguous(),
        rows.contiguous(),
        columns.contiguous(),
    ]
    match = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    addresses = [tensor.data_ptr() for tensor in tensors]
    fits = native.cpu.require().match_columns(
        *table.shape, *addresses, native.address(prices), match.data_ptr()
    )
    return match, bool(fits)
