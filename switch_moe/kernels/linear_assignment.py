"""The linear assignment on a GPU, by the CUDA kernel of ``csrc/linear_assignment.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..native import address


def solve(cost: Tensor, prices: Tensor | None) -> Tensor:
    """The column of each row for ``cost [n, n]``, float64 or int64; -1 everywhere where there is none.

    ``prices [n]``, in the type of ``cost``, are updated in place. Nothing waits for the host.
    """
    solver = native.cuda.require()
    n = len(cost)
    if n > solver.max_assignment_rows:
        raise ValueError(f"cost has {n} rows; on a GPU there can be at most {solver.max_assignment_rows}")
    column = torch.empty(n, dtype=torch.int64, device=cost.device)
    integer = not cost.is_floating_point()
    with torch.cuda.device(cost.device):
        stream = torch.cuda.current_stream().cuda_stream
        solver.linear_assignment(
            address(cost, cost.dtype, n * n, "cuda"), integer, n, address(prices, cost.dtype, n, "cuda"),
            address(column, torch.int64, n, "cuda"), stream,
        )  # fmt: skip
    return column
