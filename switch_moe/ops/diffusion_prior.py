"""The loss of the diffusion prior, with its gradient from the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switch_moe.ops._dispatch import (
    check_device,
    check_dtype,
    check_shape,
    choose,
    register,
    register_autocast,
)
from switch_moe.reference.diffusion_prior import jensen_shannon

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
    path = choose("diffusion_prior_loss", backend, probs.device, native_devices=(), triton=True)
    if path == "reference" or probs.numel() == 0 or table.numel() == 0:
        with torch.autocast(probs.device.type, enabled=False):
            prior = table[t][:, assignment].float() / active
            return jensen_shannon(probs.float() / depth, prior)
    loss: Tensor = _DiffusionPriorLoss.apply(probs, table, t, assignment, depth, active)
    return loss


class _DiffusionPriorLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, probs: Tensor, table: Tensor, t: Tensor, assignment: Tensor, depth: int, active: int
    ) -> Tensor:
        loss: Tensor
        loss, grad = torch.ops.switch_moe.diffusion_prior_loss(probs, table, t, assignment, depth, active)
        ctx.save_for_backward(grad)
        ctx.dtype = probs.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad_loss * grad).to(ctx.dtype), None, None, None, None, None


def _fake(
    probs: Tensor, table: Tensor, t: Tensor, assignment: Tensor, depth: int, active: int
) -> tuple[Tensor, Tensor]:
    return probs.new_empty((), dtype=torch.float32), probs.new_empty(probs.shape, dtype=torch.float32)


@register(
    "diffusion_prior_loss(Tensor probs, Tensor table, Tensor t, Tensor assignment, int depth, int active) -> "
    "(Tensor, Tensor)",
    _fake,
)
def _forward(
    probs: Tensor, table: Tensor, t: Tensor, assignment: Tensor, depth: int, active: int
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in float32, by the Triton kernel; the reference needs no operator."""
    from switch_moe.kernels import diffusion_prior as kernels

    return kernels.forward(
        probs.contiguous(), table.contiguous(), t.contiguous(), assignment.contiguous(), depth, active
    )


def _float32_inside(*arguments: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    """Under autocast: the arguments as they are, since the kernel computes in float32 whatever comes in."""
    return arguments


register_autocast("diffusion_prior_loss", _float32_inside)
