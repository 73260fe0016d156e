"""The linear assignment problem (Hungarian matching) on the device of its costs."""

from __future__ import annotations

import torch
from torch import Tensor

from switch_moe import native
from switch_moe.ops._dispatch import LIBRARY, choose, register
from switch_moe.reference.linear_assignment import linear_assignment as reference_linear_assignment


def linear_assignment(cost: Tensor, *, backend: str = "auto") -> Tensor:
    """The assignment of rows to columns at the least total cost.

    Shortest augmenting paths, O(n^3): Jonker and Volgenant, Computing 38, 1987. Integer costs are solved
    exactly, floating costs in float64.

    Args:
        cost: ``[n, n]``, any real type. +inf forbids a pair.
        backend: ``auto``, ``native`` (compiled; up to 1,024 rows on a GPU) or ``reference`` (plain PyTorch).
            Where the GPU kernels are not built, ``auto`` solves on the CPU, and waits for it.

    Returns:
        int64 ``[n]`` on the device of ``cost``: the column of each row. Equal optima: any one of them, the
        same every time.

    Raises:
        ValueError: ``cost`` is not square, holds NaN or -inf, has no finite assignment, or holds integers so
            large that sums overflow int64. A compiled GPU solve does not wait for the host: it cannot raise,
            and returns -1 everywhere for such costs.
        RuntimeError: the named backend cannot run here.
    """
    if cost.dim() != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(f"cost has shape {tuple(cost.shape)}; it must be square, [n, n]")
    if cost.is_complex() or cost.dtype == torch.bool:
        raise TypeError(f"cost is {cost.dtype}; it must be a real floating or integer type")
    if choose("linear_assignment", backend, cost.device, native_devices=("cpu", "cuda")) == "native":
        column: Tensor = torch.ops.switch_moe.linear_assignment(cost.detach())
    elif backend == "auto" and cost.device.type != "cpu" and native.cpu.reason is None:
        column = torch.ops.switch_moe.linear_assignment(cost.detach().cpu()).to(cost.device)
    else:
        _check_values(cost)
        column = reference_linear_assignment(cost.detach())
    return column


def _check_values(cost: Tensor) -> None:
    if cost.numel() == 0:
        return
    if cost.is_floating_point():
        if bool((cost.isnan() | cost.isneginf()).any()):
            raise ValueError("cost holds NaN or -inf; every cost must be a number or +inf")
    else:
        largest = max(abs(int(bound)) for bound in cost.aminmax())
        if 4 * cost.shape[0] * largest > torch.iinfo(torch.int64).max:
            raise ValueError(
                f"cost holds {largest}; sums over {cost.shape[0]} rows overflow int64, scale it down"
            )


def _fake(cost: Tensor) -> Tensor:
    return cost.new_empty(cost.shape[0], dtype=torch.int64)


@register("linear_assignment(Tensor cost) -> Tensor", _fake, key="CPU")
def _cpu(cost: Tensor) -> Tensor:
    _check_values(cost)
    n = cost.shape[0]
    exact = cost.to(torch.float64 if cost.is_floating_point() else torch.int64).contiguous()
    column = torch.empty(n, dtype=torch.int64, device=cost.device)
    solve = native.cpu.require().linear_assignment
    if not solve(exact.data_ptr(), not cost.is_floating_point(), n, column.data_ptr()):
        raise ValueError("cost has no assignment of finite total cost")
    return column


def _cuda(cost: Tensor) -> Tensor:
    solver = native.cuda.require()
    n = cost.shape[0]
    if n > solver.max_assignment_rows:
        raise ValueError(f"cost has {n} rows; on a GPU there can be at most {solver.max_assignment_rows}")
    exact = cost.to(torch.float64 if cost.is_floating_point() else torch.int64).contiguous()
    column = torch.empty(n, dtype=torch.int64, device=cost.device)
    with torch.cuda.device(cost.device):
        stream = torch.cuda.current_stream().cuda_stream
        solver.linear_assignment(exact.data_ptr(), not cost.is_floating_point(), n, column.data_ptr(), stream)
    return column


LIBRARY.impl("linear_assignment", _cuda, "CUDA")
