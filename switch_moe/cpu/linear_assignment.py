"""The compiled linear assignment on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..native import address


def solve(cost: Tensor, prices: Tensor | None) -> tuple[Tensor, int]:
    """The column of each row for ``cost [n, n]``, float64 or int64, and an AssignmentStatus of csrc.

    ``prices [n]``, in the type of ``cost``, are updated in place.
    """
    column = torch.empty(len(cost), dtype=torch.int64, device=cost.device)
    n, dtype = len(cost), cost.dtype
    status: int = native.cpu.require().linear_assignment(
        address(cost, dtype, n * n), dtype == torch.int64, n, address(prices, dtype, n),
        address(column, torch.int64, n),
    )  # fmt: skip
    return column, status
