"""Two-layer experts with per-sample gates: contract, checks, operators and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..experts import MLPExperts
from ..reference.expert_mlp import expert_mlp as reference_expert_mlp
from ..routes import Routes
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
from .dispatch import check_given_schedule, check_schedule, schedule_of
from .route_pairs import route_pairs
from .routed_mlp import routed_mlp

_OPERATION = operation("expert_mlp", native=("cpu",), triton=True, dtypes=KERNEL_DTYPES)


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
    schedule: Tensor | None = None,
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
        expert_gate: their gates, ``[B, k]``; computed with in float32.
        schedule: of :func:`dispatch` for this ``expert_index``, which saves the kernels a launch. On a GPU
            nobody checks that it is.
        gated: SwiGLU, ``SiLU(a) * b`` of the two halves (arXiv 2002.05202), instead of GELU (tanh).
        backend: ``auto``, ``triton`` (CUDA; on a CPU in Triton's interpreter only), ``native`` (CPU) or
            ``reference`` (plain PyTorch, any device, also float64). On CUDA tensors indices are not checked,
            which would wait for the host: the kernels take one out of range for expert 0 with a gate of NaN.

    Returns:
        ``[B, T, D]`` in the type of ``x``, differentiable in all floating arguments. All but the reference
        keep ``x W_in + b_in``, ``[B, k, T, H or 2H]``, for the backward.

    Raises:
        ValueError: a shape, device or index does not fit. TypeError: a type does not.
        RuntimeError: the named backend cannot run here.
    """
    check_tensors(
        x=x, weight_in=weight_in, weight_out=weight_out, expert_index=expert_index, expert_gate=expert_gate
    )
    for name, bias in (("bias_in", bias_in), ("bias_out", bias_out)):
        if bias is not None:
            check_tensors(**{name: bias})
    x, weight_in, bias_in, weight_out, bias_out = cast(
        autocast_dtype(x.device), x, weight_in, bias_in, weight_out, bias_out
    )
    if not torch.compiler.is_compiling() and expert_index.is_inference() and torch.is_grad_enabled():
        expert_index = expert_index.clone()  # else it could not be saved for the backward
    path = choose(_OPERATION, backend, x, weight_in)
    experts = MLPExperts(weight_in, bias_in, weight_out, bias_out, expert_index, expert_gate)
    if path == "reference" or has_values(expert_index):  # else the operator checks all but the indices
        _check(x, experts, gated)
        check_range("expert_index", expert_index, len(weight_in), "the experts")
    if path == "reference":
        return reference_expert_mlp(x, experts._replace(expert_gate=as_gate(expert_gate, x)), gated)
    check_given_schedule(schedule, expert_index, len(weight_in))
    if path == "native":
        return _of_rows(x, experts, gated)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *experts))
    out: Tensor = _ExpertMLP.apply(x, *experts, schedule, gated, keep)
    return out


def _of_rows(x: Tensor, experts: MLPExperts, gated: bool) -> Tensor:
    """The tokens as rows of :func:`routed_mlp`, those of a sample with the routes of the sample."""
    _, tokens, size = x.shape
    weight_in, bias_in, weight_out, bias_out, index, gate = experts
    top_k = index.shape[1]
    offsets, pair, slot = route_pairs(index, len(weight_in))
    token = torch.arange(tokens, dtype=torch.int32, device=x.device)
    row = (pair // top_k * tokens)[:, None] + token  # [B*k, T]
    slot = (slot * tokens)[:, None] + token[:, None]  # [B, T, k]
    by_expert = as_gate(gate, x).flatten().index_select(0, pair)  # its gradient adds in a fixed order
    gates = by_expert[:, None].expand(-1, tokens)
    routes = Routes(offsets * tokens, row.flatten(), slot.flatten(0, 1), gates.flatten())
    activation, rows = "swiglu" if gated else "gelu", x.reshape(-1, size)
    out = routed_mlp(rows, weight_in, bias_in, weight_out, bias_out, routes, activation, backend="native")
    return out.view_as(x)


def _check(x: Tensor, experts: MLPExperts, gated: bool) -> None:
    weight_in, bias_in, weight_out, bias_out, expert_index, expert_gate = experts
    check_shape("x", x, ("B", "T", "D"))
    check_dtype("x", x, *FLOATS)
    check_flags(gated=gated)
    size = x.shape[2]
    check_shape("weight_in", weight_in, ("M", size, "2H" if gated else "H"))
    num_experts, _, width = weight_in.shape
    if gated and width % 2:
        raise ValueError(
            f"weight_in has shape {tuple(weight_in.shape)}; with gated its last size must be even"
        )
    check_shape("weight_out", weight_out, (num_experts, width // 2 if gated else width, size))
    for name, bias, columns in (("bias_in", bias_in, width), ("bias_out", bias_out, size)):
        if bias is not None:
            check_shape(name, bias, (num_experts, columns))
    named = {"weight_in": weight_in, "bias_in": bias_in, "weight_out": weight_out, "bias_out": bias_out}
    check_experts(x, x.shape[0], expert_index, expert_gate, named)


class _ExpertMLP(torch.autograd.Function):
    """Saves the arguments and the hidden layer before its activation; expert outputs never exist."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        *experts, schedule, gated, keep = arguments
        if schedule is None:
            schedule = schedule_of(experts[4], experts[0].shape[0])
        out: Tensor
        out, hidden = _forward(x, *experts, gated, keep, schedule)
        ctx.gated = gated
        ctx.save_for_backward(x, *experts, hidden, schedule)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:7]
        *inputs, hidden, schedule = ctx.saved_tensors
        if create_graph():

            def function(x: Tensor, *experts: Any) -> Tensor:
                return reference_expert_mlp(x, MLPExperts(*experts), ctx.gated)

            return (*differentiable_gradients(function, inputs, [grad_out], needed), None, None, None)
        wanted = [*needed[:5], needed[6]]
        found = _backward(grad_out, *inputs, hidden, ctx.gated, wanted, schedule)
        grads = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
        return (*grads[:5], None, grads[5], None, None, None)


def _checked(x: Tensor, experts: MLPExperts, gated: bool) -> MLPExperts:
    """The experts with indices and gates of the types that all backends read."""
    _check(x, experts, gated)
    index, gate = as_int32(experts.expert_index, len(experts.weight_in)), as_gate(experts.expert_gate, x)
    return experts._replace(expert_index=index, expert_gate=gate)


def _fake_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    experts, gated, keep = MLPExperts(*arguments[:6]), *arguments[6:8]
    return _checked(x, experts, gated).empty_outputs(x, keep)


def _flops_forward(x: Tensor, *arguments: Any) -> int:
    experts = MLPExperts(*arguments[:6])
    width_and_hidden = experts.weight_in.shape[2] + experts.weight_out.shape[1]
    return 2 * experts.expert_index.shape[1] * x.numel() * width_and_hidden


def _flops_backward(_grad: Tensor, x: Tensor, *arguments: Any) -> int:
    """The hidden layer's gradient, then one product for each of x and the two weights."""
    experts, wanted = MLPExperts(*arguments[:6]), arguments[8]
    width, hidden = experts.weight_in.shape[2], experts.weight_out.shape[1]
    columns = hidden + width * (wanted[0] + wanted[1]) + hidden * wanted[3]
    return 2 * experts.expert_index.shape[1] * x.numel() * int(columns)


@operator("expert_mlp", fake=_fake_forward, flops=_flops_forward, autocast=5)
def _forward(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None,
    index: Tensor, gate: Tensor, gated: bool, keep: bool, schedule: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and, where kept, the hidden layer before its activation, else an empty tensor."""
    from ..kernels import expert_mlp as kernels

    experts = _checked(x, MLPExperts(weight_in, bias_in, weight_out, bias_out, index, gate), gated)
    check_schedule(schedule, experts.expert_index, len(weight_in))
    x, schedule, *read = contiguous(x, schedule, *experts, aligned=True)
    return kernels.forward(x, MLPExperts(*read), gated, keep, schedule)


def _fake_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    experts, gated, wanted = MLPExperts(*arguments[:6]), *arguments[7:9]
    return tuple(_checked(x, experts, gated).empty_gradients(x, wanted))


@operator("expert_mlp_backward", fake=_fake_backward, flops=_flops_backward, autocast=0)
def _backward(
    grad: Tensor, x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor,
    bias_out: Tensor | None, index: Tensor, gate: Tensor, hidden: Tensor, gated: bool, wanted: list[bool],
    schedule: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight_in, bias_in, weight_out, bias_out, gate; empty where not wanted."""
    from ..kernels import expert_mlp as kernels

    experts = _checked(x, MLPExperts(weight_in, bias_in, weight_out, bias_out, index, gate), gated)
    check_like("grad", grad, x, tuple(x.shape))
    check_like("hidden", hidden, x, experts.hidden_shape(x))
    check_schedule(schedule, experts.expert_index, len(weight_in))
    grad, x, hidden, schedule, *read = contiguous(grad, x, hidden, schedule, *experts, aligned=True)
    return kernels.backward(grad, x, MLPExperts(*read), hidden, gated, wanted, schedule)
