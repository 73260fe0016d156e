"""Linear experts merged into one matrix for each route: contract, checks, operator and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cpu import expert_linear as compiled
from ..reference.merge_experts import merge_experts as reference_merge_experts
from ._backend import KERNEL_DTYPES, choose, operation
from ._checks import (
    FLOATS,
    as_gate,
    as_int32,
    check_device,
    check_dtype,
    check_range,
    check_shape,
    check_tensors,
)
from ._gradient import differentiable_gradients
from ._operator import contiguous, operator

_OPERATION = operation("merge_experts", native=("cpu",), triton=True, dtypes=KERNEL_DTYPES)


def merge_experts(
    weight: Tensor,
    bias: Tensor | None,
    expert_index: Tensor,
    expert_gate: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``V_r = sum_j gate_rj W_index_rj``, ``v_r = sum_j gate_rj b_index_rj``: ``m(x) = x V + v``.

    What :func:`expert_linear` computes for a sample of route r is one linear layer with these (Switch-DiT,
    arXiv 2403.09176). While sampling all samples share a route.

    Args:
        weight: experts, ``[M, Din, Dout]`` float32, bfloat16 or float16.
        bias: ``[M, Dout]`` in the type of ``weight``, or None.
        expert_index: chosen experts of each route, ``[R, k]`` int32 (int64 is converted), each in ``[0, M)``.
        expert_gate: their gates, ``[R, k]``; computed with in float32.
        backend: as in :func:`expert_linear`, but for ``cuda``, which merges inside of a product only.

    Returns:
        ``[R, Din, Dout]`` and ``[R, Dout]``, or None without a bias, in the type of ``weight``, summed in
        float32 and rounded once; differentiable in ``weight``, ``bias`` and ``expert_gate``.

    Raises:
        ValueError: a shape, device or index does not fit. TypeError: a type does not.
        RuntimeError: the named backend cannot run here.
    """
    check_tensors(weight=weight, expert_index=expert_index, expert_gate=expert_gate)
    if bias is not None:
        check_tensors(bias=bias)
    path = choose(_OPERATION, backend, weight, expert_index)
    _check(weight, bias, expert_index, expert_gate)
    check_range("expert_index", expert_index, weight.shape[0], "the experts")
    if path == "reference":
        return reference_merge_experts(weight, bias, expert_index, as_gate(expert_gate, weight))
    merged, shift = _MergeExperts.apply(weight, bias, expert_index, expert_gate, path)
    return merged, None if bias is None else shift


def _check(weight: Tensor, bias: Tensor | None, expert_index: Tensor, expert_gate: Tensor) -> None:
    check_shape("weight", weight, ("M", "Din", "Dout"))
    check_dtype("weight", weight, *FLOATS)
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0], weight.shape[2]))
        check_dtype("bias", bias, weight.dtype)
        check_device("bias", bias, weight.device)
    check_shape("expert_index", expert_index, ("R", "k"))
    check_shape("expert_gate", expert_gate, tuple(expert_index.shape))
    check_dtype("expert_index", expert_index, torch.int32, torch.int64)
    check_dtype("expert_gate", expert_gate, *FLOATS)
    check_device("expert_index", expert_index, weight.device)
    check_device("expert_gate", expert_gate, weight.device)
    if expert_index.shape[1] < 1:
        raise ValueError(
            f"expert_index has shape {tuple(expert_index.shape)}; at least one expert must be chosen"
        )


class _MergeExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*arguments[:4])
        ctx.set_materialize_grads(False)
        merged, shift = _forward(*arguments)
        return merged, shift

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        given = grads[:1] if inputs[1] is None else grads

        def function(weight: Tensor, bias: Tensor | None, index: Tensor, gate: Tensor) -> Any:
            merged, shift = reference_merge_experts(weight, bias, index, as_gate(gate, weight))
            return merged if shift is None else (merged, shift)

        return (*differentiable_gradients(function, inputs, given, ctx.needs_input_grad[:4]), None)


def _fake(weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    bias, index, gate, _backend = arguments
    _check(weight, bias, index, gate)
    shape = (index.shape[0], *weight.shape[1:])
    return weight.new_empty(shape), weight.new_empty(shape[::2] if bias is not None else 0)


@operator("merge_experts", fake=_fake)
def _forward(
    weight: Tensor, bias: Tensor | None, index: Tensor, gate: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """The merged matrices and biases; the second empty without a bias."""
    _check(weight, bias, index, gate)
    if backend != "triton":
        check_range("expert_index", index, weight.shape[0], "the experts")
    index, gate = as_int32(index, weight.shape[0]), as_gate(gate, weight)
    weight, bias, index, gate = contiguous(weight, bias, index, gate, aligned=backend == "triton")
    if backend == "triton":
        from ..kernels import merge_experts as kernels

        return kernels.forward(weight, bias, index, gate)
    return compiled.merge_experts(weight, bias, index, gate)
