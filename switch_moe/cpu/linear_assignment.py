"""The compiled linear assignment on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


def solve(cost: Tensor, prices: Tensor | None) -> tuple[Tensor, int]:
    """The column of each row for ``cost [n, n]``, float64 or int64, and an AssignmentStatus of csrc.

    ``prices [n]``, in the type of ``cost``, are updated in place.
    """
    column = torch.empty(len(cost), dtype=torch.int64, device=cost.device)
    status: int = native.cpu.require().linear_assignment(
        cost.data_ptr(), not cost.is_floating_point(), len(cost), native.address(prices), column.data_ptr()
    )
    return column, status
