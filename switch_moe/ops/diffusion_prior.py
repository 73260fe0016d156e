"""The loss of the diffusion prior, with its gradient from the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.diffusion_prior import diffusion_prior_loss as reference_loss
from ._backend import choose, operation
from ._checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_integers,
    check_range,
    check_shape,
    check_tensors,
    check_zero_one,
    has_values,
)
from ._gradient import create_graph, differentiable_gradients
from ._operator import contiguous, operator, without_autocast

_OPERATION = operation("diffusion_prior_loss", triton=True)


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
            not fit. RuntimeError: the named backend cannot run here. On a CPU also: a timestep or column is
            out of range, or the table holds other numbers than 0 and 1. On a GPU nothing waits for the host:
            the kernel cannot raise, and takes the nearest timestep or column of the table.
    """
    check_tensors(probs=probs, table=table, t=t, assignment=assignment)
    path = choose(_OPERATION, backend, probs, table)
    arguments = (probs, table, t, assignment, depth, active)
    if path == "reference" or has_values(t):  # else the operator checks all but the values
        _check(*arguments)
        check_range("t", t, len(table), "the timesteps of the table")
        check_range("assignment", assignment, table.shape[1], "the columns of the table")
        check_zero_one("table", table)
    if path == "reference":
        with without_autocast(probs.device):
            return reference_loss(*arguments)
    loss: Tensor = _DiffusionPriorLoss.apply(*arguments)
    return loss


def _check(probs: Tensor, table: Tensor, t: Tensor, assignment: Tensor, depth: int, active: int) -> None:
    check_shape("table", table, ("N", "S"))
    check_shape("probs", probs, ("B", table.shape[1]))
    check_shape("t", t, (probs.shape[0],))
    check_shape("assignment", assignment, (table.shape[1],))
    check_dtype("probs", probs, *FLOATS)
    check_dtype("table", table, *FLOATS)
    for name, integers in (("t", t), ("assignment", assignment)):
        check_dtype(name, integers, torch.int32, torch.int64)
    for name, tensor in (("table", table), ("t", t), ("assignment", assignment)):
        check_device(name, tensor, probs.device)
    check_integers(depth=depth, active=active)


class _DiffusionPriorLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs: Tensor, *arguments: Any) -> Tensor:
        loss: Tensor
        loss, grad = _forward(probs, *arguments)
        *tensors, ctx.depth, ctx.active = arguments
        ctx.save_for_backward(probs, *tensors, grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        probs, *tensors, grad = ctx.saved_tensors
        if create_graph():

            def function(probs: Tensor, table: Tensor, t: Tensor, assignment: Tensor) -> Tensor:
                return reference_loss(probs, table, t, assignment, ctx.depth, ctx.active)

            wanted = [True] + [False] * len(tensors)
            again = differentiable_gradients(function, [probs, *tensors], [grad_loss], wanted)
            return (*again, None, None)
        return (grad_loss * grad).to(probs.dtype), None, None, None, None, None


def _fake_forward(probs: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(probs, *rest)
    return probs.new_empty((), dtype=torch.float32), probs.new_empty(probs.shape, dtype=torch.float32)


@operator("diffusion_prior_loss", fake=_fake_forward, autocast=0)
def _forward(
    probs: Tensor, table: Tensor, t: Tensor, assignment: Tensor, depth: int, active: int
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in float32, by the Triton kernel; the reference needs no operator."""
    from ..kernels import diffusion_prior as kernels

    _check(probs, table, t, assignment, depth, active)
    probs, table, t, assignment = contiguous(probs, table, t, assignment, aligned=True)
    return kernels.forward(probs, table, t, assignment, depth, active)
