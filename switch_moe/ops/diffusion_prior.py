"""The loss of the diffusion prior, with its gradient from the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference.diffusion_prior import diffusion_prior_loss as reference_loss
from ._backend import choose, operation
from ._checks import check_device, check_dtype, check_shape
from ._operator import contiguous, operator

_OPERATION = operation("diffusion_prior_loss", triton=True)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def diffusion_prior_loss(
    probs: Tensor,
    table: Tensor,
    t: Tensor,
    assignment: Tensor,
    depth: int,
    active: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Jensen-Shannon divergence of ``probs / depth`` and ``table[t][:, assignment] / active``.

    Switch-DiT (arXiv 2403.09176), the diffusion prior loss; natural logarithm, 1e-6 inside the logarithms.
    Computed in float32 whatever autocast says.

    Args:
        probs: router probabilities ``[B, S]`` of any floating type, block after block, S = L*M.
        table: the prior, 0/1 of any floating type ``[N, S]``.
        t: timesteps in ``[0, N)``, int32 or int64 ``[B]``.
        assignment: the column of the table of each expert, int32 or int64 ``[S]``.
        depth: blocks, L. active: ones in each row of the table, k*L.
        backend: ``auto``, ``triton`` or ``reference``.

    Returns:
        A float32 scalar, the mean over the batch, differentiable in ``probs``; NaN for an empty batch.

    Raises:
        ValueError: a shape or device does not fit, or depth or active is not positive. TypeError: a type does
            not fit. RuntimeError: the named backend cannot run here. IndexError, from ``reference`` on a CPU:
            a timestep or column is out of range. The Triton kernel does not wait for the host: it cannot
            raise, and takes the nearest timestep or column of the table.
    """
    check_shape("table", table, ("N", "S"))
    check_shape("probs", probs, ("B", table.shape[1]))
    check_shape("t", t, (probs.shape[0],))
    check_shape("assignment", assignment, (table.shape[1],))
    check_dtype("probs", probs, *_FLOATS)
    check_dtype("table", table, *_FLOATS)
    for name, integers in (("t", t), ("assignment", assignment)):
        check_dtype(name, integers, torch.int32, torch.int64)
    for name, tensor in (("table", table), ("t", t), ("assignment", assignment)):
        check_device(name, tensor, probs.device)
    for name, value in (("depth", depth), ("active", active)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    path = choose(_OPERATION, backend, probs, table)
    arguments = (probs, table, t, assignment, depth, active)
    if path == "reference":
        with torch.autocast(probs.device.type, enabled=False):
            return reference_loss(*arguments)
    loss: Tensor = _DiffusionPriorLoss.apply(*arguments)
    return loss


class _DiffusionPriorLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs: Tensor, *arguments: Any) -> Tensor:
        loss: Tensor
        loss, grad = _forward(probs, *arguments)
        ctx.save_for_backward(grad)
        ctx.dtype = probs.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad_loss * grad).to(ctx.dtype), None, None, None, None, None


def _fake_forward(probs: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return probs.new_empty((), dtype=torch.float32), probs.new_empty(probs.shape, dtype=torch.float32)


@operator("diffusion_prior_loss", fake=_fake_forward, autocast=0)
def _forward(
    probs: Tensor, table: Tensor, t: Tensor, assignment: Tensor, depth: int, active: int
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in float32, by the Triton kernel; the reference needs no operator."""
    from ..kernels import diffusion_prior as kernels

    probs, table, t, assignment = contiguous(probs, table, t, assignment)
    return kernels.forward(probs, table, t, assignment, depth, active)
