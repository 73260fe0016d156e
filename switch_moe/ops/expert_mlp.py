"""Two-layer experts with per-sample gates."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switch_moe.ops._dispatch import (
    check_device,
    check_dtype,
    check_expert_index,
    check_shape,
    check_triton_dtype,
    choose,
    register,
    register_autocast,
)
from switch_moe.reference.expert_mlp import expert_mlp as reference_expert_mlp

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expert_mlp(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    expert_index: Tensor,
    expert_gate: Tensor,
    gated: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """``m(x_b) = sum_j gate_bj MLP_index_bj(x_b)``, two-layer experts, gated per sample.

    The routing of Switch-DiT (arXiv 2403.09176) with experts that have a hidden layer.

    Args:
        x: tokens, ``[B, T, D]`` float32, bfloat16 or float16.
        weight_in: ``[M, D, H]``, with ``gated`` ``[M, D, 2H]``. bias_in: ``[M, H or 2H]``, or None.
        weight_out: ``[M, H, D]``. bias_out: ``[M, D]``, or None. All in the type of ``x``; under autocast all
            are cast.
        expert_index: chosen experts, ``[B, k]`` int32 (int64 is converted), each in ``[0, M)``. One that is
            chosen twice counts twice.
        expert_gate: their gates, ``[B, k]`` float32.
        gated: SwiGLU, ``SiLU(a) * b`` of the two halves (arXiv 2002.05202), instead of GELU (tanh).
        backend: ``auto``, ``triton`` (CUDA; on a CPU in Triton's interpreter only) or ``reference`` (plain
            PyTorch, any device, also float64). On CUDA tensors indices are not checked, which would wait for
            the host: the kernels make the sample of one out of range NaN.

    Returns:
        ``[B, T, D]`` in the type of ``x``, differentiable in all floating arguments. The kernels keep
        ``x W_in + b_in``, ``[B, k, T, H or 2H]``, for the backward.

    Raises:
        ValueError: a shape, device or index does not fit. TypeError: a type does not.
        RuntimeError: the named backend cannot run here.
    """
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, weight_in, bias_in, weight_out, bias_out = _cast(
            x, weight_in, bias_in, weight_out, bias_out, dtype=dtype
        )
    _check(x, weight_in, bias_in, weight_out, bias_out, expert_index, expert_gate, gated)
    path = choose("expert_mlp", backend, x.device, native_devices=(), triton=True)
    if path == "triton" and x.dtype not in KERNEL_DTYPES:
        if backend == "triton":
            check_dtype("x", x, *KERNEL_DTYPES)
        path = "reference"
    if path == "triton":
        check_triton_dtype("expert_mlp", x.dtype, x.device)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        check_expert_index(expert_index, weight_in.shape[0])
    if path == "reference" or x.numel() == 0 or weight_in.numel() == 0:
        return reference_expert_mlp(
            x, weight_in, bias_in, weight_out, bias_out, expert_index, expert_gate, gated
        )
    if expert_index.dtype != torch.int32:  # out of range stays out of range, where the kernels find it
        expert_index = expert_index.clamp(-1, weight_in.shape[0]).to(torch.int32)
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight_in, bias_in, weight_out, bias_out, expert_gate)
    )
    return cast(
        Tensor,
        _ExpertMLP.apply(x, weight_in, bias_in, weight_out, bias_out, expert_index, expert_gate, gated, keep),
    )


def _check(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    expert_index: Tensor,
    expert_gate: Tensor,
    gated: bool,
) -> None:
    check_shape("x", x, ("B", "T", "D"))
    check_dtype("x", x, *KERNEL_DTYPES, torch.float64)
    batch, _, size = x.shape
    check_shape("weight_in", weight_in, ("M", size, "2H" if gated else "H"))
    experts, _, width = weight_in.shape
    if gated and width % 2:
        raise ValueError(
            f"weight_in has shape {tuple(weight_in.shape)}; with gated its last size must be even"
        )
    check_shape("weight_out", weight_out, (experts, width // 2 if gated else width, size))
    check_shape("expert_index", expert_index, (batch, "k"))
    check_shape("expert_gate", expert_gate, tuple(expert_index.shape))
    check_dtype("expert_index", expert_index, torch.int32, torch.int64)
    check_dtype(
        "expert_gate", expert_gate, torch.float32, *([torch.float64] if x.dtype == torch.float64 else [])
    )
    same_type = [("weight_in", weight_in), ("weight_out", weight_out)]
    for name, bias, columns in (("bias_in", bias_in, width), ("bias_out", bias_out, size)):
        if bias is not None:
            check_shape(name, bias, (experts, columns))
            same_type.append((name, bias))
    for name, tensor in same_type:
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and x is {x.dtype}; cast one, or use autocast")
    for name, tensor in [*same_type, ("expert_index", expert_index), ("expert_gate", expert_gate)]:
        check_device(name, tensor, x.device)
    if expert_index.shape[1] < 1:
        raise ValueError(
            f"expert_index has shape {tuple(expert_index.shape)}; at least one expert must be chosen"
        )


class _ExpertMLP(torch.autograd.Function):
    """Saves the arguments and the hidden layer before its activation; expert outputs never exist."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        bias_out: Tensor | None,
        index: Tensor,
        gate: Tensor,
        gated: bool,
        keep: bool,
    ) -> Tensor:
        out, pre = torch.ops.switch_moe.expert_mlp(
            x, weight_in, bias_in, weight_out, bias_out, index, gate, gated, keep
        )
        ctx.gated = gated
        ctx.save_for_backward(x, weight_in, weight_out, bias_out, index, gate, pre)
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [*ctx.needs_input_grad[:5], ctx.needs_input_grad[6]]
        found = torch.ops.switch_moe.expert_mlp_backward(grad_out, *ctx.saved_tensors, ctx.gated, wanted)
        grads = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
        return (*grads[:5], None, grads[5], None, None)


def _fake_forward(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    index: Tensor,
    gate: Tensor,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    pre = (x.shape[0], index.shape[1], x.shape[1], weight_in.shape[2])
    return x.new_empty(x.shape), x.new_empty(pre if keep else 0)


@register(
    "expert_mlp(Tensor x, Tensor weight_in, Tensor? bias_in, Tensor weight_out, Tensor? bias_out, "
    "Tensor index, Tensor gate, bool gated, bool keep_pre) -> (Tensor, Tensor)",
    _fake_forward,
)
def _forward(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    index: Tensor,
    gate: Tensor,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The output and, where kept, the hidden layer before its activation, else an empty tensor."""
    from switch_moe.kernels import expert_mlp as kernels

    return kernels.forward(
        x.contiguous(), weight_in.contiguous(), _contiguous(bias_in), weight_out.contiguous(),
        _contiguous(bias_out), index.contiguous(), gate.contiguous(), gated, keep,
    )  # fmt: skip


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    bias_out: Tensor | None,
    index: Tensor,
    gate: Tensor,
    pre: Tensor,
    gated: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    experts, size, width = weight_in.shape
    shapes = (x.shape, weight_in.shape, (experts, width), weight_out.shape, (experts, size))
    found = [x.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=False)]
    return found[0], found[1], found[2], found[3], found[4], gate.new_empty(gate.shape if wanted[5] else 0)


@register(
    "expert_mlp_backward(Tensor grad, Tensor x, Tensor weight_in, Tensor weight_out, Tensor? bias_out, "
    "Tensor index, Tensor gate, Tensor pre, bool gated, bool[6] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
def _backward(
    grad: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    bias_out: Tensor | None,
    index: Tensor,
    gate: Tensor,
    pre: Tensor,
    gated: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight_in, bias_in, weight_out, bias_out, gate; empty where not wanted."""
    from switch_moe.kernels import expert_mlp as kernels

    return kernels.backward(
        grad.contiguous(), x.contiguous(), weight_in.contiguous(), weight_out.contiguous(),
        _contiguous(bias_out), index.contiguous(), gate.contiguous(), pre.contiguous(), gated, wanted,
    )  # fmt: skip


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _cast(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    *rest: Any,
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    tensors = (x, weight_in, bias_in, weight_out, bias_out)
    return (*(None if t is None else t.to(dtype) for t in tensors), *rest)


register_autocast("expert_mlp", _cast)
