"""Linear experts with per-sample gates: contract, checks, operators and gradient."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..cpu import expert_linear as compiled
from ..experts import LinearExperts
from ..reference.expert_linear import expert_linear as reference_expert_linear
from ._backend import KERNEL_DTYPES, choose, operation
from ._checks import (
    FLOATS,
    as_gate,
    as_int32,
    check_dtype,
    check_experts,
    check_flags,
    check_like,
    check_range,
    check_shape,
    check_tensors,
    has_values,
)
from ._gradient import create_graph, differentiable_gradients
from ._operator import autocast_dtype, cast, contiguous, operator

_OPERATION = operation("expert_linear", native=("cpu",), triton=True, dtypes=KERNEL_DTYPES)


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_index: Tensor,
    expert_gate: Tensor,
    modulate: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """``m(x_b) = sum_j gate_bj (x_b W_index_bj + b_index_bj)``: linear experts, gated per sample.

    Switch-DiT (arXiv 2403.09176), the mixture at the start of a block. Experts are linear and gates belong to
    a sample, so the mixture is one product with ``V_b = sum_j gate_bj W_j``; its backward takes two more
    products. For few tokens a CPU groups the samples by expert instead.

    Args:
        x: tokens, ``[B, T, Din]`` float32, bfloat16 or float16.
        weight: experts, ``[M, Din, Dout]`` in the type of ``x``. Under autocast both are cast.
        bias: ``[M, Dout]`` in the type of ``x``, or None.
        expert_index: chosen experts, ``[B, k]`` int32 (int64 is converted), each in ``[0, M)``.
        expert_gate: their gates, ``[B, k]``; computed with in float32.
        modulate: return ``x * (1 + m(x))`` instead of ``m(x)``; needs Din = Dout.
        backend: ``auto``, ``triton`` (CUDA; on a CPU in Triton's interpreter only), ``native`` (compiled,
            CPU) or ``reference`` (plain PyTorch, any device, also float64). On CUDA tensors indices are not
            checked, which would wait for the host: one out of range makes its sample NaN.

    Returns:
        ``[B, T, Dout]`` in the type of ``x``; differentiable in ``x``, ``weight``, ``bias``, ``expert_gate``.

    Raises:
        ValueError: a shape, device or index does not fit. TypeError: a type does not.
        RuntimeError: the named backend cannot run here.
    """
    check_tensors(x=x, weight=weight, expert_index=expert_index, expert_gate=expert_gate)
    if bias is not None:
        check_tensors(bias=bias)
    check_flags(modulate=modulate)
    x, weight, bias = cast(autocast_dtype(x.device), x, weight, bias)
    if not torch.compiler.is_compiling() and expert_index.is_inference() and torch.is_grad_enabled():
        expert_index = expert_index.clone()  # else it could not be saved for the backward
    path = choose(_OPERATION, backend, x, weight)
    experts = LinearExperts(weight, bias, expert_index, expert_gate)
    # Operators check what they are given; indices only where compiled code reads them.
    if path == "reference" or (path == "triton" and has_values(expert_index)):
        _check(x, experts, modulate)
        check_range("expert_index", expert_index, weight.shape[0], "the experts")
    if path == "reference":
        return reference_expert_linear(x, experts._replace(expert_gate=as_gate(expert_gate, x)), modulate)
    out: Tensor = _ExpertLinear.apply(x, *experts, modulate, path)
    return out


def _check(x: Tensor, experts: LinearExperts, modulate: bool) -> None:
    weight, bias, expert_index, expert_gate = experts
    check_shape("x", x, ("B", "T", "Din"))
    check_dtype("x", x, *FLOATS)
    check_shape("weight", weight, ("M", x.shape[2], "Dout"))
    num_experts, d_in, d_out = weight.shape
    if bias is not None:
        check_shape("bias", bias, (num_experts, d_out))
    check_experts(x, expert_index, expert_gate, {"weight": weight, "bias": bias})
    if modulate and d_in != d_out:
        raise ValueError(f"modulate needs square experts; weight has shape {tuple(weight.shape)}")


class _ExpertLinear(torch.autograd.Function):
    """Saves x, the experts and, with modulate, m(x). The backward forms the merged weights again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        *experts, modulate, backend = arguments
        keep = modulate and ctx.needs_input_grad[0]
        out: Tensor
        out, mixture = _forward(x, *experts, modulate, keep, backend)
        ctx.modulate, ctx.backend = modulate, backend
        ctx.save_for_backward(x, *experts, mixture if keep else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:5]
        *inputs, mixture = ctx.saved_tensors
        if create_graph():

            def function(x: Tensor, *experts: Any) -> Tensor:
                return reference_expert_linear(x, LinearExperts(*experts), ctx.modulate)

            return (*differentiable_gradients(function, inputs, [grad_out], needed), None, None)
        wanted = [*needed[:3], needed[4]]
        found = _backward(grad_out, *inputs, mixture, ctx.modulate, wanted, ctx.backend)
        grads = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
        return (*grads[:3], None, grads[3], None, None)


def _converted(x: Tensor, experts: LinearExperts) -> LinearExperts:
    """The experts with indices and gates of the types that all backends read."""
    index, gate = as_int32(experts.expert_index, experts.weight.shape[0]), as_gate(experts.expert_gate, x)
    return experts._replace(expert_index=index, expert_gate=gate)


def _module(backend: str, experts: LinearExperts) -> ModuleType:
    if backend == "triton":
        from ..kernels import expert_linear as kernels

        return kernels
    check_range("expert_index", experts.expert_index, experts.weight.shape[0], "the experts")
    return compiled


def _fake_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *experts, modulate, keep, _backend = arguments
    _check(x, LinearExperts(*experts), modulate)
    return LinearExperts(*experts).empty_outputs(x, keep)


def _product(x: Tensor, experts: LinearExperts) -> int:
    """FLOPs of a product of every sample and one matrix of its own, the merged weight."""
    return 2 * x.numel() * experts.weight.shape[2]


def _is_grouped(x: Tensor, experts: LinearExperts, backend: str, forward: bool) -> bool:
    if backend != "native":
        return False
    rows: float = x.shape[1]  # of a merged weight; in the forward, samples of one timestep share it
    index, gate = experts.expert_index, experts.expert_gate
    if forward and index.numel() and has_values(index) and has_values(gate):
        shared = compiled.shared_routes(_converted(x, experts).expert_index, as_gate(gate, x).contiguous())
        rows *= 1 if shared is None else x.shape[0] / len(shared.counts)
    return compiled.algorithm(rows, experts) == "grouped"


def _flops_forward(x: Tensor, *arguments: Any) -> int:
    *experts, _modulate, _keep, backend = arguments
    product, top_k = _product(x, LinearExperts(*experts)), int(experts[2].shape[1])
    if _is_grouped(x, LinearExperts(*experts), backend, forward=True):
        return top_k * (product + product // x.shape[2])  # the second is the sum weighted by gates
    return product


def _flops_backward(_grad: Tensor, x: Tensor, *arguments: Any) -> int:
    *given, _mixture, _modulate, (of_x, of_weight, of_bias, of_gate), backend = arguments
    experts = LinearExperts(*given)
    weight, bias, expert_index, _ = experts
    product, top_k = _product(x, experts), expert_index.shape[1]
    if backend == "triton":
        each = weight.shape[0] > 4  # MAX_ACCUMULATORS of the kernels: above, a product for each pair
        of_experts = top_k if each else 1
        return int(product * (of_x + (of_weight or of_bias or of_gate) * of_experts))
    through_bias = 2 * x.shape[0] * weight.shape[0] * weight.shape[2] if of_gate and bias is not None else 0
    if _is_grouped(x, experts, backend, forward=False):
        of_rows = (product + 2 * x.numel()) * (of_x or of_gate)
        return int(top_k * (of_rows + product * of_weight) + through_bias)
    return int(product * (of_x + (of_weight or of_gate)) + through_bias)


@operator("expert_linear", fake=_fake_forward, flops=_flops_forward, autocast=3)
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, gate: Tensor, modulate: bool, keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and, where kept, the mixture m(x), else an empty tensor."""
    experts = LinearExperts(weight, bias, index, gate)
    _check(x, experts, modulate)
    experts = _converted(x, experts)
    x, *read = contiguous(x, *experts, aligned=backend == "triton")
    outputs: tuple[Tensor, Tensor] = _module(backend, experts).forward(
        x, LinearExperts(*read), modulate, keep
    )
    return outputs


def _fake_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *experts, _mixture, modulate, wanted, _backend = arguments
    _check(x, LinearExperts(*experts), modulate)
    return tuple(_converted(x, LinearExperts(*experts)).empty_gradients(x, wanted))


@operator("expert_linear_backward", fake=_fake_backward, flops=_flops_backward, autocast=0)
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, gate: Tensor,
    mixture: Tensor | None, modulate: bool, wanted: list[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and gate; an empty tensor stands for one that is not wanted."""
    experts = LinearExperts(weight, bias, index, gate)
    if backend == "triton":
        _check(x, experts, modulate)
    elif bias is not None:  # the rest goes by native.address or torch's products, which check sizes
        check_shape("bias", bias, (weight.shape[0], weight.shape[2]))
    experts = _converted(x, experts)
    check_like("grad", grad, x, (x.shape[0], x.shape[1], weight.shape[2]))
    if mixture is not None:
        check_like("mixture", mixture, x, tuple(grad.shape))
    grad, x, mixture, *read = contiguous(grad, x, mixture, *experts, aligned=backend == "triton")
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = _module(backend, experts).backward(
        grad, x, LinearExperts(*read), mixture, modulate, wanted
    )
    return gradients
