"""Two-layer experts over routes: rows that have any number of experts each."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..experts import RoutedExperts
from ..reference.routed_mlp import routed_mlp as reference_routed_mlp
from ..routes import Routes
from ._backend import KERNEL_DTYPES, choose, operation
from ._checks import (
    FLOATS,
    as_gate,
    check_choice,
    check_device,
    check_dtype,
    check_like,
    check_range,
    check_shape,
    check_tensors,
    has_values,
)
from ._gradient import create_graph, differentiable_gradients
from ._operator import autocast_dtype, cast, contiguous, operator

ACTIVATIONS = ("gelu", "gelu_erf", "relu", "swiglu", "swiglu_second")

_OPERATION = operation("routed_mlp", native=("cpu",), dtypes=KERNEL_DTYPES)


def routed_mlp(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    routes: Routes,
    activation: str = "gelu",
    *,
    base: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``out_r = base_r + sum_p gate_p MLP_e(p)(x_r)`` over the pairs p of row r.

    The experts of DiT-MoE (arXiv 2407.11633), EC-DIT (arXiv 2410.02098) and their kin.

    Args:
        x: rows, ``[R, D]`` float32, bfloat16 or float16.
        weight_in: ``[M, D, H]``, for SwiGLU ``[M, D, 2H]``. bias_in: ``[M, H or 2H]``, or None.
        weight_out: ``[M, H, D]``. bias_out: ``[M, D]``, or None. All in the type of ``x``; under autocast all
            are cast.
        routes: which rows go to which experts, of R rows and M experts. A row without an expert gets zeros,
            or its ``base``.
        activation: ``gelu`` (tanh), ``gelu_erf``, ``relu``, or SwiGLU (arXiv 2002.05202) of the halves
            ``[a, b]`` of the hidden layer: ``swiglu`` is ``SiLU(a) * b``, ``swiglu_second`` ``a * SiLU(b)``.
        base: ``[R, D]``, what is added to, for example the output of a shared expert.
        backend: ``auto``, ``native`` (CPU) or ``reference`` (plain PyTorch, any device, also float64: every
            expert on every row). On CUDA tensors routes are not checked, which would wait for the host.

    Returns:
        ``[R, D]`` in the type of ``x``, differentiable in all floating arguments and in ``routes.gate``. Of
        the experts only ``x W_in + b_in``, ``[P, W]``, is kept for the backward.

    Raises:
        ValueError: a shape, device or route does not fit. TypeError: a type does not.
        RuntimeError: the named backend cannot run here.
    """
    if not isinstance(routes, Routes):
        raise TypeError(f"routes is a {type(routes).__name__}; it must be a switch_moe.Routes")
    check_tensors(x=x, weight_in=weight_in, weight_out=weight_out, **routes._asdict())
    for name, given in (("bias_in", bias_in), ("bias_out", bias_out), ("base", base)):
        if given is not None:
            check_tensors(**{name: given})
    x, weight_in, bias_in, weight_out, bias_out, base = cast(
        autocast_dtype(x.device), x, weight_in, bias_in, weight_out, bias_out, base
    )
    path = choose(_OPERATION, backend, x, weight_in)
    experts = RoutedExperts(weight_in, bias_in, weight_out, bias_out, *routes)
    if path == "reference" or has_values(routes.offsets):  # else the operator checks all but the values
        _check(x, experts, base, activation)
        if has_values(routes.offsets):
            _check_values(experts, len(x))
    experts = experts._replace(gate=as_gate(experts.gate, x))
    if path == "reference":
        return reference_routed_mlp(x, experts, base, activation)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *experts))
    out: Tensor = _RoutedMLP.apply(x, *experts, base, activation, keep, path)
    return out


class _RoutedMLP(torch.autograd.Function):
    """Saves the arguments and the hidden layer before its activation; expert outputs are not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        *experts, base, activation, keep, path = arguments
        out: Tensor
        out, hidden = _forward(x, *experts, base, activation, keep, path)
        ctx.activation, ctx.path = activation, path
        ctx.save_for_backward(x, *experts, hidden)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        *inputs, hidden = ctx.saved_tensors
        grad_base = grad_out if needed[9] else None
        if create_graph():

            def function(x: Tensor, *experts: Any) -> Tensor:
                return reference_routed_mlp(x, RoutedExperts(*experts), None, ctx.activation)

            again = differentiable_gradients(function, inputs, [grad_out], needed[:9])
            return (*again, grad_base, None, None, None)
        wanted = [*needed[:5], needed[8]]
        if not any(wanted):  # then the hidden layer was not kept
            return (*[None] * 9, grad_base, None, None, None)
        found = _backward(grad_out, *inputs, hidden, ctx.activation, wanted, ctx.path)
        grads = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
        return (*grads[:5], None, None, None, grads[5], grad_base, None, None, None)


def _check(x: Tensor, experts: RoutedExperts, base: Tensor | None, activation: str) -> None:
    weight_in, bias_in, weight_out, bias_out, offsets, row, slot, gate = experts
    check_choice("activation", activation, ACTIVATIONS)
    gated = activation.startswith("swiglu")
    check_shape("x", x, ("R", "D"))
    check_dtype("x", x, *FLOATS)
    rows, size = x.shape
    check_shape("weight_in", weight_in, ("M", size, "2H" if gated else "H"))
    num_experts, _, width = weight_in.shape
    if gated and width % 2:
        raise ValueError(f"weight_in has shape {tuple(weight_in.shape)}; for SwiGLU its last size is even")
    check_shape("weight_out", weight_out, (num_experts, width // 2 if gated else width, size))
    for name, bias, columns in (("bias_in", bias_in, width), ("bias_out", bias_out, size)):
        if bias is not None:
            check_shape(name, bias, (num_experts, columns))
    if base is not None:
        check_shape("base", base, (rows, size))
    named = {
        "weight_in": weight_in, "bias_in": bias_in, "weight_out": weight_out, "bias_out": bias_out,
        "base": base,
    }  # fmt: skip
    for name, tensor in named.items():
        if tensor is not None:
            if tensor.dtype != x.dtype:
                raise TypeError(f"{name} is {tensor.dtype} and x is {x.dtype}; cast one, or use autocast")
            check_device(name, tensor, x.device)
    check_like("routes.offsets", offsets, _int32(x), (num_experts + 1,))
    check_like("routes.row", row, _int32(x), ("P",))
    check_like("routes.slot", slot, _int32(x), (rows, "S"))
    check_shape("routes.gate", gate, tuple(row.shape))
    check_dtype("routes.gate", gate, *FLOATS)
    check_device("routes.gate", gate, x.device)


def _int32(x: Tensor) -> Tensor:
    """An empty tensor whose type and device those of routes are compared with."""
    return torch.empty(0, dtype=torch.int32, device=x.device)


def _check_values(experts: RoutedExperts, rows: int) -> None:
    """``ValueError`` unless the offsets rise from 0 to at most P and rows and slots are in range."""
    offsets, pairs = experts.offsets.tolist(), len(experts.row)
    if offsets[0] != 0 or sorted(offsets) != offsets or offsets[-1] > pairs:
        raise ValueError(f"routes.offsets holds {offsets[:8]}; it must rise from 0 to at most {pairs}")
    check_range("routes.row", experts.row, rows, "the rows of x")
    slot: Any = experts.slot
    if slot.numel():
        low, high = (bound.item() for bound in slot.aminmax())
        if low < -1 or high >= offsets[-1]:
            raise ValueError(
                f"routes.slot holds {low} to {high}; it must stay in [0, {offsets[-1]}), the pairs, or be -1"
            )


def _fake_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    experts, (base, activation, keep, _backend) = RoutedExperts(*arguments[:8]), arguments[8:]
    _check(x, experts, base, activation)
    return experts.empty_outputs(x, keep)


def _flops_forward(x: Tensor, *arguments: Any) -> int:
    experts = RoutedExperts(*arguments[:8])
    width_and_hidden = experts.weight_in.shape[2] + experts.weight_out.shape[1]
    return 2 * experts.row.shape[0] * x.shape[1] * width_and_hidden


def _flops_backward(_grad: Tensor, x: Tensor, *arguments: Any) -> int:
    """The hidden layer's gradient, then one product for each of x and the two weights."""
    experts, wanted = RoutedExperts(*arguments[:8]), arguments[10]
    width, hidden = experts.weight_in.shape[2], experts.weight_out.shape[1]
    columns = hidden + width * (wanted[0] + wanted[1]) + hidden * wanted[3]
    return 2 * experts.row.shape[0] * x.shape[1] * int(columns)


@operator("routed_mlp", fake=_fake_forward, flops=_flops_forward, autocast=5)
def _forward(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None,
    offsets: Tensor, row: Tensor, slot: Tensor, gate: Tensor, base: Tensor | None, activation: str,
    keep: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and, where kept, the hidden layer before its activation, else an empty tensor."""
    experts = RoutedExperts(weight_in, bias_in, weight_out, bias_out, offsets, row, slot, gate)
    _check(x, experts, base, activation)
    x, base, *read = contiguous(x, base, *experts, aligned=True)
    found: tuple[Tensor, Tensor]
    found = _backend_of(backend).forward(x, RoutedExperts(*read), base, activation, keep)
    return found


def _backend_of(name: str) -> Any:
    """The module with the code of a backend."""
    package = "kernels" if name == "triton" else "cpu"
    return importlib.import_module(f"..{package}.routed_mlp", __package__)


def _fake_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(RoutedExperts(*arguments[:8]).empty_gradients(x, arguments[10]))


@operator("routed_mlp_backward", fake=_fake_backward, flops=_flops_backward, autocast=0)
def _backward(
    grad: Tensor, x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor,
    bias_out: Tensor | None, offsets: Tensor, row: Tensor, slot: Tensor, gate: Tensor, hidden: Tensor,
    activation: str, wanted: list[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight_in, bias_in, weight_out, bias_out, gate; empty where not wanted."""
    experts = RoutedExperts(weight_in, bias_in, weight_out, bias_out, offsets, row, slot, gate)
    _check(x, experts, None, activation)
    check_like("grad", grad, x, tuple(x.shape))
    check_like("hidden", hidden, x, experts.hidden_shape())
    grad, x, hidden, *read = contiguous(grad, x, hidden, *experts, aligned=True)
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    found = _backend_of(backend).backward(grad, x, RoutedExperts(*read), hidden, activation, wanted)
    return found
