"""The compiled matching on a CPU: the costs, counted in bits, and their assignment in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..native import address


def match_columns(
    selected: Tensor, table: Tensor, rows: Tensor, columns: Tensor, prices: Tensor | None
) -> tuple[Tensor, bool]:
    """The column of ``table`` for each of ``selected``, int64 ``[S]``, and whether the arguments fit: orders
    must be permutations, tables hold 0 and 1.

    Shapes as in :func:`switch_moe.ops.match_columns`; ``prices`` are updated in place.
    """
    steps, slots = table.shape
    tables = [selected.float().contiguous(), table.float().contiguous()]
    orders = [rows.contiguous(), columns.contiguous()]
    match = torch.empty(slots, dtype=torch.int64, device=rows.device)
    fits = native.cpu.require().match_columns(
        steps, slots, *(address(tensor, torch.float32, steps * slots) for tensor in tables),
        *(address(order, torch.int64, slots) for order in (*orders, prices, match)),
    )  # fmt: skip
    return match, bool(fits)
