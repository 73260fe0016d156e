"""The linear assignment problem (Hungarian matching) on the device of its costs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..cpu import linear_assignment as compiled
from ..reference.linear_assignment import linear_assignment as reference_linear_assignment
from ._backend import choose, operation
from ._checks import FLOATS, check_device, check_dtype, check_shape, check_tensors
from ._operator import operator

_OPERATION = operation("linear_assignment", native=("cpu", "cuda"), differentiable=False)
REAL = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NO_FINITE_TOTAL, _NOT_A_NUMBER, _TOO_LARGE = 1, 2, 3  # AssignmentStatus of csrc/linear_assignment_core.h


def linear_assignment(cost: Tensor, *, prices: Tensor | None = None, backend: str = "auto") -> Tensor:
    """The assignment of rows to columns at the least total cost.

    Bids and shortest augmenting paths, O(n^3): Jonker and Volgenant, Computing 38, 1987. Integer costs are
    solved exactly, floating costs in float64.

    Args:
        cost: ``[n, n]``, floating or a signed or 8-bit integer type. +inf forbids a pair.
        prices: where to start, ``[n]`` on the device of ``cost``, int64 for integer costs and float64 for
            floating ones; updated in place. Begin with zeros and pass the same tensor again: a problem like
            the last one is solved in a fraction of the time. Any prices are allowed and the total is the
            least, but which of several equal optima is found depends on them. Prices too far from the costs
            to help, NaN among them, are replaced.
        backend: ``auto``, ``native`` (compiled; up to 1,024 rows on a GPU) or ``reference`` (plain PyTorch).
            Where the GPU kernels are not built, ``auto`` solves on the CPU, and waits for it.

    Returns:
        int64 ``[n]`` on the device of ``cost``: the column of each row. Equal optima: any one of them, the
        same every time; CPU and GPU find the same one.

    Raises:
        ValueError: ``cost`` is not square, holds NaN or -inf, has no finite assignment, or holds integers so
            large that sums overflow int64; ``prices`` has another shape or device, or is not contiguous. A
            compiled GPU solve does not wait for the host: it cannot raise for the values of ``cost``, and
            returns -1 everywhere instead.
        TypeError: ``cost`` or ``prices`` has another type.
        RuntimeError: the named backend cannot run here.
    """
    check_tensors(cost=cost)
    if cost.dim() != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(f"cost has shape {tuple(cost.shape)}; it must be square, [n, n]")
    if cost.dtype not in REAL:
        raise TypeError(f"cost is {cost.dtype}; it must be a real floating or signed or 8-bit integer type")
    cost = cost.detach()
    if prices is not None:
        check_tensors(prices=prices)
        check_dtype("prices", prices, _exact_dtype(cost))
        check_shape("prices", prices, (cost.shape[0],))
        check_device("prices", prices, cost.device)
        if not prices.is_contiguous():
            raise ValueError("prices is not contiguous; it is updated in place, so pass a contiguous tensor")
        prices = prices.detach()
    if choose(_OPERATION, backend, cost) == "native":
        return _solve(cost, prices)
    if backend == "auto" and cost.device.type != "cpu" and native.cpu.reason is None:
        on_cpu = None if prices is None else prices.cpu()
        column = _solve(cost.cpu(), on_cpu).to(cost.device)
        if prices is not None and on_cpu is not None:
            prices.copy_(on_cpu)
        return column
    _check_values(cost)
    return reference_linear_assignment(cost, prices)


def _exact_dtype(cost: Tensor) -> torch.dtype:
    return torch.float64 if cost.is_floating_point() else torch.int64


def _check_values(cost: Tensor) -> None:
    if cost.numel() == 0:
        return
    if cost.is_floating_point():
        if bool((cost.isnan() | cost.isneginf()).any()):
            raise ValueError("cost holds NaN or -inf; every cost must be a number or +inf")
    else:
        largest = max(abs(int(bound)) for bound in cost.aminmax())
        if largest > torch.iinfo(torch.int64).max // 8 // cost.shape[0]:
            raise ValueError(
                f"cost holds {largest}; sums over {cost.shape[0]} rows overflow int64, scale it down"
            )


def _solve(cost: Tensor, prices: Tensor | None) -> Tensor:
    column: Tensor = _without_prices(cost) if prices is None else _from_prices(cost, prices)
    return column


def _fake(cost: Tensor, *_: Tensor) -> Tensor:
    return cost.new_empty(cost.shape[0], dtype=torch.int64)


# There are two operators because torch.compile of 2.13 fails on one whose argument is both optional and
# changed in place.
@operator("linear_assignment", fake=_fake)
def _without_prices(cost: Tensor) -> Tensor:
    return _compiled(cost, None)


@operator("linear_assignment_from", fake=_fake, mutates=("prices",))
def _from_prices(cost: Tensor, prices: Tensor) -> Tensor:
    return _compiled(cost, prices)


def _compiled(cost: Tensor, prices: Tensor | None) -> Tensor:
    exact = cost.to(_exact_dtype(cost)).contiguous()
    if cost.is_cuda:
        from ..kernels import linear_assignment as kernels

        return kernels.solve(exact, prices)
    column, status = compiled.solve(exact, prices)
    if status in (_NOT_A_NUMBER, _TOO_LARGE):
        _check_values(cost)
    if status == _NO_FINITE_TOTAL:
        raise ValueError("cost has no assignment of finite total cost")
    return column
