"""The routers of all blocks in one call, which see the timestep embedding only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..experts import empty_gradients
from ..reference.timestep_gate import probabilities
from ..reference.timestep_gate import timestep_gate as reference_timestep_gate
from ..torch_compat import exporting_onnx, silu_backward, softmax_backward, transforming
from ._backend import choose, operation
from ._checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_flags,
    check_integers,
    check_like,
    check_shape,
    check_tensors,
    check_top_k,
)
from ._gradient import create_graph, differentiable_gradients
from ._operator import contiguous, operator, without_autocast

_OPERATION = operation("timestep_gate", triton=True)


def timestep_gate(
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    *,
    selected: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
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
    check_tensors(embedding=embedding, weight=weight, bias=bias)
    check_integers(-(2**31), top_k=top_k)
    check_flags(selected=selected)
    path = choose(_OPERATION, backend, embedding, weight)
    if backend == "reference" or transforming() or exporting_onnx():
        _check(embedding, weight, bias, top_k)
        with without_autocast(embedding.device):
            probs, index, gate = reference_timestep_gate(embedding, weight, bias, top_k)
        return (probs, index, gate, selected_experts(probs, index)) if selected else (probs, index, gate)
    probs, index, gate, table = _TimestepGate.apply(embedding, weight, bias, top_k, selected, path)
    return (probs, index, gate, table) if selected else (probs, index, gate)


def _check(embedding: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> None:
    check_shape("embedding", embedding, ("N'", "D"))
    check_shape("weight", weight, ("L", "M", embedding.shape[1]))
    check_shape("bias", bias, tuple(weight.shape[:2]))
    check_dtype("embedding", embedding, *FLOATS)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_dtype(name, tensor, torch.float32)
        check_device(name, tensor, embedding.device)
    check_top_k(top_k, weight.shape[1])


def selected_experts(probs: Tensor, expert_index: Tensor) -> Tensor:
    """0/1 ``[N', L*M]`` in the type of ``probs [L, N', M]``: one where an expert is in ``expert_index``."""
    chosen = torch.zeros_like(probs).scatter(2, expert_index.long(), 1.0)
    return chosen.transpose(0, 1).flatten(1)


class _TimestepGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedding: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        probs, index, gate, table = _forward(embedding, weight, *arguments)
        ctx.save_for_backward(embedding, weight, arguments[0], probs, index)
        ctx.mark_non_differentiable(index, table)
        ctx.set_materialize_grads(False)
        ctx.path = arguments[-1]
        return probs, index, gate, table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_probs, _, grad_gate, _ = grads
        if grad_probs is None and grad_gate is None:
            return (None,) * 6
        embedding, weight, bias, probs, index = ctx.saved_tensors
        if create_graph():

            def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
                found = probabilities(*inputs)
                return found, found.gather(2, index.long())

            inputs, wanted = (embedding, weight, bias), ctx.needs_input_grad[:3]
            again = differentiable_gradients(function, inputs, [grad_probs, grad_gate], wanted)
            return (*again, None, None, None)
        found = _backward(grad_probs, grad_gate, embedding, weight, probs, index, ctx.path)
        return (*found, None, None, None)


def _fake_forward(embedding: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    bias, top_k, selected, _backend = arguments
    _check(embedding, weight, bias, top_k)
    depth, num_experts, _ = weight.shape
    rows = embedding.shape[0]
    return (
        weight.new_empty(depth, rows, num_experts),
        weight.new_empty(depth, rows, top_k, dtype=torch.int32),
        weight.new_empty(depth, rows, top_k),
        weight.new_empty((rows, depth * num_experts) if selected else 0),
    )


def _flops_forward(embedding: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * embedding.shape[0] * weight.numel()


def _flops_backward(_probs: Tensor | None, _gate: Tensor | None, *inputs: Any) -> int:
    return 2 * _flops_forward(*inputs)


@operator("timestep_gate", fake=_fake_forward, flops=_flops_forward, autocast=0)
def _forward(
    embedding: Tensor, weight: Tensor, bias: Tensor, top_k: int, selected: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities, indices, gates and the table of the chosen experts, which is empty unless selected."""
    _check(embedding, weight, bias, top_k)
    if backend == "triton":
        from ..kernels import timestep_gate as kernels

        embedding, weight, bias = contiguous(embedding, weight, bias, aligned=True)
        return kernels.forward(embedding, weight, bias, top_k, selected)
    probs, index, gate = reference_timestep_gate(embedding, weight, bias, top_k)
    table = selected_experts(probs, index) if selected else probs.new_empty(0)
    return probs.contiguous(), index.contiguous(), gate.contiguous(), table


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    _grad_probs, _grad_gate, embedding, weight, *_ = arguments
    return (*empty_gradients((True, True), embedding, weight), weight.new_empty(weight.shape[:2]))


@operator("timestep_gate_backward", fake=_fake_backward, flops=_flops_backward, autocast=0)
def _backward(
    grad_probs: Tensor | None, grad_gate: Tensor | None, embedding: Tensor, weight: Tensor, probs: Tensor,
    index: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of embedding, weight and bias; a gradient that is None counts as zero."""
    check_shape("embedding", embedding, ("N'", "D"))
    check_shape("weight", weight, ("L", "M", embedding.shape[1]))
    check_like("probs", probs, weight, (weight.shape[0], embedding.shape[0], weight.shape[1]))
    check_shape("index", index, (*probs.shape[:2], "k"))
    for name, grad, like in (("grad_probs", grad_probs, probs), ("grad_gate", grad_gate, index)):
        if grad is not None:
            check_like(name, grad, probs, tuple(like.shape))
    if backend == "triton":
        from ..kernels import timestep_gate as kernels

        given = grad_probs, grad_gate, embedding, weight, probs, index
        return kernels.backward(*contiguous(*given, aligned=True))
    total = torch.zeros_like(probs) if grad_probs is None else grad_probs
    if grad_gate is not None:
        total = total.scatter_add(2, index.long(), grad_gate)
    grad_logits = softmax_backward(total, probs)  # [L, N', M]
    hidden = embedding.float()
    grad_weight = torch.einsum("lnm,nd->lmd", grad_logits, F.silu(hidden))
    grad_hidden = torch.einsum("lnm,lmd->nd", grad_logits, weight)
    grad_embedding = silu_backward(grad_hidden, hidden)
    return grad_embedding.to(embedding.dtype), grad_weight.contiguous(), grad_logits.sum(1)
