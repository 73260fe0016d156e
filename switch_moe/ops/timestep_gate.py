"""The routers of all blocks in one call: they see the timestep embedding only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switch_moe.ops._dispatch import check_device, check_dtype, check_shape, check_top_k, choose, register
from switch_moe.reference.timestep_gate import timestep_gate as reference_timestep_gate


def timestep_gate(
    embedding: Tensor, weight: Tensor, bias: Tensor, top_k: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """``p = softmax(SiLU(e) W^T + b)`` for every block, and its ``top_k`` largest entries, not renormalised.

    Switch-DiT (arXiv 2403.09176), the timestep-based gating network. Computed in float32 whatever autocast
    says.

    Args:
        embedding: timestep embeddings, ``[N', D]`` of any floating type.
        weight: router weights of the L blocks, ``[L, M, D]`` float32.
        bias: ``[L, M]`` float32.
        top_k: experts chosen per timestep, 1 to M.
        backend: ``auto`` or ``reference``. Both are plain PyTorch here; ``auto`` has its gradient written
            out.

    Returns:
        ``probs [L, N', M]`` float32, ``expert_index [L, N', k]`` int32 by falling probability (the lowest
        index wins a tie) and ``expert_gate [L, N', k]`` float32. Differentiable from ``probs`` and
        ``expert_gate``.

    Raises:
        ValueError: a shape, device or top_k does not fit. TypeError: a type does not.
        RuntimeError: the named backend does not exist.
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
    if backend == "auto":
        probs, index, gate = _TimestepGate.apply(embedding, weight, bias, top_k)
        return probs, index, gate
    choose("timestep_gate", backend, embedding.device, native_devices=())
    with torch.autocast(embedding.device.type, enabled=False):
        return reference_timestep_gate(embedding, weight, bias, top_k)


class _TimestepGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embedding: Tensor, weight: Tensor, bias: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        probs, index, gate = torch.ops.switch_moe.timestep_gate(embedding, weight, bias, top_k)
        ctx.save_for_backward(embedding, weight, probs, index)
        ctx.mark_non_differentiable(index)
        return probs, index, gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_probs, _, grad_gate = grads
        found = torch.ops.switch_moe.timestep_gate_backward(grad_probs, grad_gate, *ctx.saved_tensors)
        return (*found, None)


def _fake_forward(
    embedding: Tensor, weight: Tensor, bias: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    depth, num_experts, _ = weight.shape
    rows = embedding.shape[0]
    return (
        weight.new_empty(depth, rows, num_experts),
        weight.new_empty(depth, rows, top_k, dtype=torch.int32),
        weight.new_empty(depth, rows, top_k),
    )


def _fake_backward(
    grad_probs: Tensor, grad_gate: Tensor, embedding: Tensor, weight: Tensor, probs: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        embedding.new_empty(embedding.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[:2]),
    )


@register(
    "timestep_gate(Tensor embedding, Tensor weight, Tensor bias, int top_k) -> (Tensor, Tensor, Tensor)",
    _fake_forward,
    key="CompositeExplicitAutograd",
)
def _forward(embedding: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(embedding.device.type, enabled=False):
        probs, index, gate = reference_timestep_gate(embedding, weight, bias, top_k)
    return probs.contiguous(), index.contiguous(), gate.contiguous()


@register(
    "timestep_gate_backward(Tensor grad_probs, Tensor grad_gate, Tensor embedding, Tensor weight, "
    "Tensor probs, Tensor index) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    key="CompositeExplicitAutograd",
)
def _backward(
    grad_probs: Tensor, grad_gate: Tensor, embedding: Tensor, weight: Tensor, probs: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(embedding.device.type, enabled=False):
        total = grad_probs.scatter_add(2, index.long(), grad_gate)
        grad_logits = probs * (total - (total * probs).sum(-1, keepdim=True))  # [L, N', M]
        hidden = embedding.float()
        sigmoid = torch.sigmoid(hidden)
        grad_weight = torch.einsum("lnm,nd->lmd", grad_logits, hidden * sigmoid)
        grad_hidden = torch.einsum("lnm,lmd->nd", grad_logits, weight)
        grad_embedding = grad_hidden * sigmoid * (1 + hidden * (1 - sigmoid))
    return grad_embedding.to(embedding.dtype), grad_weight.contiguous(), grad_logits.sum(1)
