"""Linear experts with per-sample gates: contract, checks, operators and gradient."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..cpu import expert_linear as compiled
from ..experts import LinearExperts
from ..reference.expert_linear import expert_linear as reference_expert_linear
from ._backend import KERNEL_DTYPES, choose, operation
from ._checks import as_int32, check_dtype, check_expert_index, check_experts, check_shape
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
        expert_gate: their gates, ``[B, k]`` float32.
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
    x, weight, bias = cast(autocast_dtype(x.device), x, weight, bias)
    check_shape("x", x, ("B", "T", "Din"))
    check_dtype("x", x, *KERNEL_DTYPES, torch.float64)
    check_shape("weight", weight, ("M", x.shape[2], "Dout"))
    num_experts, d_in, d_out = weight.shape
    if bias is not None:
        check_shape("bias", bias, (num_experts, d_out))
    check_experts(x, expert_index, expert_gate, {"weight": weight, "bias": bias})
    if modulate and d_in != d_out:
        raise ValueError(f"modulate needs square experts; weight has shape {tuple(weight.shape)}")
    path = choose(_OPERATION, backend, x, weight)
    experts = LinearExperts(weight, bias, as_int32(expert_index, num_experts), expert_gate)
    if path == "reference":
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            check_expert_index(experts.expert_index, num_experts)
        return reference_expert_linear(x, experts, modulate)
    out: Tensor = _ExpertLinear.apply(x, *experts, modulate, path)
    return out


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
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_weight, of_bias, _, of_gate, *_ = ctx.needs_input_grad
        wanted = [of_x, of_weight, of_bias, of_gate]
        found = _backward(grad_out, *ctx.saved_tensors, ctx.modulate, wanted, ctx.backend)
        grads = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
        return (*grads[:3], None, grads[3], None, None)


def _backend_module(backend: str, index: Tensor, num_experts: int) -> ModuleType:
    if backend == "triton":
        from ..kernels import expert_linear as kernels

        return kernels
    check_expert_index(index, num_experts)  # the compiled code checks nothing
    return compiled


def _fake_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *experts, _modulate, keep, _backend = arguments
    return LinearExperts(*experts).empty_outputs(x, keep)


@operator("expert_linear", fake=_fake_forward, autocast=3)
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, gate: Tensor, modulate: bool, keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and, where kept, the mixture m(x), else an empty tensor."""
    module = _backend_module(backend, index, weight.shape[0])
    x, *experts = contiguous(x, weight, bias, index, gate)
    outputs: tuple[Tensor, Tensor] = module.forward(x, LinearExperts(*experts), modulate, keep)
    return outputs


def _fake_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *experts, _mixture, _modulate, wanted, _backend = arguments
    return tuple(LinearExperts(*experts).empty_gradients(x, wanted))


@operator("expert_linear_backward", fake=_fake_backward)
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, gate: Tensor,
    mixture: Tensor | None, modulate: bool, wanted: list[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and gate; an empty tensor stands for one that is not wanted."""
    module = _backend_module(backend, index, weight.shape[0])
    grad, x, *experts, mixture = contiguous(grad, x, weight, bias, index, gate, mixture)
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = module.backward(
        grad, x, LinearExperts(*experts), mixture, modulate, wanted
    )
    return gradients
