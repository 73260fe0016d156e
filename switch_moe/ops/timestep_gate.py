"""The routers of all blocks in one call: they see the timestep embedding only."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from switch_moe.ops._dispatch import (
    check_device,
    check_dtype,
    check_shape,
    check_top_k,
    choose,
    register,
    register_autocast,
)
from switch_moe.reference.timestep_gate import selected_experts
from switch_moe.reference.timestep_gate import timestep_gate as reference_timestep_gate


@overload
def timestep_gate(
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    *,
    selected: Literal[False] = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def timestep_gate(
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    *,
    selected: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


@overload
def timestep_gate(
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    *,
    selected: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]: ...


def timestep_gate(
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    *,
    selected: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]:
    """``p = softmax(SiLU(e) W^T + b)`` for every block, and its ``top_k`` largest entries, not renormalised.

    Switch-DiT (arXiv 2403.09176), the timestep-based gating network. Computed in float32 whatever autocast
    says.

    Args:
        embedding: timestep embeddings, ``[N', D]`` of any floating type.
        weight: router weights of the L blocks, ``[L, M, D]`` float32.
        bias: ``[L, M]`` float32.
        top_k: experts chosen per timestep, 1 to M.
        selected: whether to return the table of chosen experts, too.
        backend: ``auto``, ``triton`` or ``reference``. On a CPU ``auto`` is plain PyTorch with its gradient
            written out, ``reference`` plain PyTorch throughout.

    Returns:
        ``probs [L, N', M]`` float32, ``expert_index [L, N', k]`` int32 by falling probability (the lowest
        index wins a tie, NaN comes first) and ``expert_gate [L, N', k]`` float32; with ``selected`` a fourth,
        0/1 float32 ``[N', L*M]``, one where an expert is among the top k. Differentiable from ``probs`` and
        ``expert_gate``.

    Raises:
        ValueError: a shape, device or top_k does not fit. TypeError: a type does not.
        RuntimeError: the named backend does not exist or cannot run here.
    """
    check_shape("embedding", embedding, ("N'", "D"))
    check_shape("weight", weight, ("L", "M", embedding.shape[1]))
    check_shape("bias", bias, tuple(weight.shape[:2]))
    check_dtype("embedding", embedding, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    check_dtype("weight", weight, torch.float32)
    check_dtype("bias", bias, torch.float32)
    check_device("weight", weight, embedding.device)
    check_device("bias", bias, embedding.device)
    check_top_k(top_k, weight.shape[1])
    path = choose("timestep_gate", backend, embedding.device, native_devices=(), triton=True)
    if backend == "reference":
        with torch.autocast(embedding.device.type, enabled=False):
            probs, index, gate = reference_timestep_gate(embedding, weight, bias, top_k)
        return (probs, index, gate, selected_experts(probs, index)) if selected else (probs, index, gate)
    if embedding.numel() == 0 or weight.numel() == 0:
        path = "reference"
    probs, index, gate, table = _TimestepGate.apply(embedding, weight, bias, top_k, selected, path)
    return (probs, index, gate, table) if selected else (probs, index, gate)


class _TimestepGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embedding: Tensor, weight: Tensor, bias: Tensor, top_k: int, selected: bool, path: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        probs, index, gate, table = torch.ops.switch_moe.timestep_gate(
            embedding, weight, bias, top_k, selected, path
        )
        ctx.save_for_backward(embedding, weight, probs, index)
        ctx.mark_non_differentiable(index, table)
        ctx.set_materialize_grads(False)
        ctx.path = path
        return probs, index, gate, table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_probs, _, grad_gate, _ = grads
        if grad_probs is None and grad_gate is None:
            return (None,) * 6
        found = torch.ops.switch_moe.timestep_gate_backward(
            grad_probs, grad_gate, *ctx.saved_tensors, ctx.path
        )
        return (*found, None, None, None)


def _fake_forward(
    embedding: Tensor, weight: Tensor, bias: Tensor, top_k: int, selected: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    depth, num_experts, _ = weight.shape
    rows = embedding.shape[0]
    return (
        weight.new_empty(depth, rows, num_experts),
        weight.new_empty(depth, rows, top_k, dtype=torch.int32),
        weight.new_empty(depth, rows, top_k),
        weight.new_empty((rows, depth * num_experts) if selected else 0),
    )


def _fake_backward(
    grad_probs: Tensor | None,
    grad_gate: Tensor | None,
    embedding: Tensor,
    weight: Tensor,
    probs: Tensor,
    index: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        embedding.new_empty(embedding.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[:2]),
    )


@register(
    "timestep_gate(Tensor embedding, Tensor weight, Tensor bias, int top_k, bool selected, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)
def _forward(
    embedding: Tensor, weight: Tensor, bias: Tensor, top_k: int, selected: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Without ``selected`` the table is empty."""
    if backend == "triton":
        from switch_moe.kernels import timestep_gate as kernels

        return kernels.forward(
            embedding.contiguous(), weight.contiguous(), bias.contiguous(), top_k, selected
        )
    probs, index, gate = reference_timestep_gate(embedding, weight, bias, top_k)
    table = selected_experts(probs, index) if selected else probs.new_empty(0)
    return probs.contiguous(), index.contiguous(), gate.contiguous(), table


@register(
    "timestep_gate_backward(Tensor? grad_probs, Tensor? grad_gate, Tensor embedding, Tensor weight, "
    "Tensor probs, Tensor index, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
def _backward(
    grad_probs: Tensor | None,
    grad_gate: Tensor | None,
    embedding: Tensor,
    weight: Tensor,
    probs: Tensor,
    index: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of embedding, weight and bias; a gradient that is None counts as zero."""
    if backend == "triton":
        from switch_moe.kernels import timestep_gate as kernels

        return kernels.backward(
            None if grad_probs is None else grad_probs.contiguous(),
            None if grad_gate is None else grad_gate.contiguous(),
            embedding.contiguous(),
            weight.contiguous(),
            probs.contiguous(),
            index.contiguous(),
        )
    total = torch.zeros_like(probs) if grad_probs is None else grad_probs
    if grad_gate is not None:
        total = total.scatter_add(2, index.long(), grad_gate)
    grad_logits = torch.ops.aten._softmax_backward_data(total, probs, -1, probs.dtype)  # [L, N', M]
    hidden = embedding.float()
    grad_weight = torch.einsum("lnm,nd->lmd", grad_logits, F.silu(hidden))
    grad_hidden = torch.einsum("lnm,lmd->nd", grad_logits, weight)
    grad_embedding = torch.ops.aten.silu_backward(grad_hidden, hidden)
    return grad_embedding.to(embedding.dtype), grad_weight.contiguous(), grad_logits.sum(1)


def _float32_already(*arguments: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    """Under autocast: the arguments as they are, since gates are computed in float32 whatever comes in."""
    return arguments


register_autocast("timestep_gate", _float32_already)
register_autocast("timestep_gate_backward", _float32_already)
