"""Linear experts with per-sample gates: contract, checks, operators and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cpu import expert_linear as compiled
from ..experts import LinearExperts
from ..kernels import expert_linear_hopper
from ..kernels.measured import fastest
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
from ._operator import autocast_dtype, cast, contiguous, operator, without_autocast
from .dispatch import check_given_schedule, check_schedule, schedule_of
from .merge_experts import merge_experts

_OPERATION = operation(
    "expert_linear", native=("cpu",), triton=True, dtypes=KERNEL_DTYPES, cuda=expert_linear_hopper.DTYPES
)
_ON_GPU = ("triton", "cuda")


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_index: Tensor,
    expert_gate: Tensor,
    modulate: bool = False,
    *,
    schedule: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``m(x_b) = sum_j gate_bj (x_b W_index_bj + b_index_bj)``: linear experts, gated per sample.

    Switch-DiT (arXiv 2403.09176), the mixture at the start of a block. Experts are linear and gates belong to
    a sample, so the mixture is one product with ``V_b = sum_j gate_bj W_j``; its backward takes two more
    products. For few tokens a CPU groups the samples by expert instead.

    Args:
        x: tokens, ``[B, T, Din]`` float32, bfloat16 or float16.
        weight: experts, ``[M, Din, Dout]`` in the type of ``x``. Under autocast both are cast; with backend
            ``cuda`` the gradient of a float32 weight is formed in float32 all the same, but for one route
            for all.
        bias: ``[M, Dout]`` in the type of ``x``, or None.
        expert_index: chosen experts, ``[B, k]`` int32 (int64 is converted), each in ``[0, M)``; or ``[1, k]``
            for all samples alike: then the experts merge once, before one plain product.
        expert_gate: their gates, of the same shape; computed with in float32.
        modulate: return ``x * (1 + m(x))`` instead of ``m(x)``; needs Din = Dout.
        schedule: of :func:`dispatch` for this ``expert_index``, which saves the kernels a launch. On a GPU
            nobody checks that it is.
        backend: ``auto``, ``triton`` (CUDA; on a CPU in Triton's interpreter only), ``cuda`` (compiled, for
            compute capability 9.0, half types, Din and Dout multiples of 8, k up to 4; no GPU has run it),
            ``native`` (compiled, CPU) or ``reference`` (plain PyTorch, any device, also float64). On CUDA
            tensors indices are not checked, which would wait for the host: the kernels take one out of range
            for expert 0 with a gate of NaN, so its sample becomes NaN, and with it the gradients of expert 0.
            On a GPU ``auto`` is ``triton``, and ``cuda`` for shapes where that was measured to be faster.

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
    given, autocast = (weight, bias), autocast_dtype(x.device)
    x, weight, bias = cast(autocast, x, weight, bias)
    if not torch.compiler.is_compiling() and expert_index.is_inference() and torch.is_grad_enabled():
        expert_index = expert_index.clone()  # else it could not be saved for the backward
    path = choose(_OPERATION, backend, x, weight)
    experts = LinearExperts(weight, bias, expert_index, expert_gate)
    if x.dim() == 3 and expert_index.dim() == 2 and expert_index.shape[0] == 1 != x.shape[0]:
        _check(x, experts, modulate, rows=1)
        return _shared(x, experts, modulate, path)
    if path == "triton" and backend == "auto":
        path, _ = fastest(x, experts, modulate)
    # Operators check what they are given; indices only where compiled code reads them.
    if path == "reference" or (path in _ON_GPU and has_values(expert_index)):
        _check(x, experts, modulate)
        check_range("expert_index", expert_index, weight.shape[0], "the experts")
    if path == "reference":
        return reference_expert_linear(x, experts._replace(expert_gate=as_gate(expert_gate, x)), modulate)
    if path in _ON_GPU:
        check_given_schedule(schedule, expert_index, weight.shape[0])
    before: tuple[Tensor | None, ...] = ()
    if path == "cuda" and autocast and any(map(_has_single_gradient, given)):
        # The kernels write the gradients of float32 weights as they have summed them, so these go past the
        # cast. Where one of weight and bias has another type, autograd rounds its gradient to that.
        before = given
        experts = experts._replace(weight=weight.detach(), bias=None if bias is None else bias.detach())
    out: Tensor = _ExpertLinear.apply(x, *experts, schedule, modulate, path, *before)
    return out


def _has_single_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and tensor.dtype == torch.float32


def _shared(x: Tensor, experts: LinearExperts, modulate: bool, path: str) -> Tensor:
    """A batch of one route: one product of all its tokens with one matrix."""
    weight, bias, index, gate = experts
    if path not in _ON_GPU:  # there the samples become one of many tokens
        rows = x.reshape(1, x.shape[0] * x.shape[1], x.shape[2])
        out = expert_linear(rows, weight, bias, index, gate, modulate, backend=path)
        return out.view(*x.shape[:2], weight.shape[2])
    merged, shift = merge_experts(weight, bias, index, gate)
    with without_autocast(x.device):
        mixture = torch.matmul(x, merged[0])
        if shift is not None:
            mixture = mixture + shift[0]
        return torch.addcmul(x, x, mixture) if modulate else mixture


def _check_kernels(x: Tensor, experts: LinearExperts, backend: str) -> None:
    """``RuntimeError`` for what the CUDA kernels do not take; Triton's take everything."""
    if backend == "cuda" and (reason := expert_linear_hopper.reason(x, experts)) is not None:
        raise RuntimeError(f"backend 'cuda' of expert_linear cannot run: {reason}")


def _check(x: Tensor, experts: LinearExperts, modulate: bool, rows: int | None = None) -> None:
    """Raises for arguments that do not fit; expert_index and expert_gate have ``rows`` rows, B by default."""
    weight, bias, expert_index, expert_gate = experts
    check_shape("x", x, ("B", "T", "Din"))
    check_dtype("x", x, *FLOATS)
    check_shape("weight", weight, ("M", x.shape[2], "Dout"))
    num_experts, d_in, d_out = weight.shape
    if bias is not None:
        check_shape("bias", bias, (num_experts, d_out))
    rows = x.shape[0] if rows is None else rows
    check_experts(x, rows, expert_index, expert_gate, {"weight": weight, "bias": bias})
    if modulate and d_in != d_out:
        raise ValueError(f"modulate needs square experts; weight has shape {tuple(weight.shape)}")


class _ExpertLinear(torch.autograd.Function):
    """Saves x, the experts and, with modulate, m(x). The backward forms the merged weights again.

    The last arguments may be the weight and the bias before autocast cast them. Then these have the
    gradients, which are not rounded to the type of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        *experts, schedule, modulate, backend = arguments[:7]
        keep = modulate and ctx.needs_input_grad[0]
        if schedule is None and backend == "triton":
            schedule = schedule_of(experts[2], experts[0].shape[0])
        out: Tensor
        out, mixture = _forward(x, *experts, modulate, keep, backend, schedule)
        ctx.modulate, ctx.backend = modulate, backend
        ctx.save_for_backward(x, *experts, mixture if keep else None, schedule, *arguments[7:])
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[:5])
        x, weight, bias, index, gate, mixture, schedule, *before = ctx.saved_tensors
        experts = weight, bias, index, gate
        if before:
            needed[1:3] = ctx.needs_input_grad[8:]
        if create_graph():

            def function(x: Tensor, *experts: Any) -> Tensor:
                weights = cast(x.dtype if before else None, *experts[:2])
                return reference_expert_linear(x, LinearExperts(*weights, *experts[2:]), ctx.modulate)

            inputs = [x, *(before or experts[:2]), *experts[2:]]
            grads = differentiable_gradients(function, inputs, [grad_out], needed)
        else:
            wanted = [*needed[:3], needed[4]]
            options = ctx.modulate, wanted, ctx.backend, schedule, bool(before)
            found = _backward(grad_out, x, *experts, mixture, *options)
            grads = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
            grads.insert(3, None)
        if before:
            return grads[0], None, None, *grads[3:], None, None, None, *grads[1:3]
        return *grads, None, None, None


def _converted(x: Tensor, experts: LinearExperts) -> LinearExperts:
    """The experts with indices and gates of the types that all backends read."""
    index, gate = as_int32(experts.expert_index, experts.weight.shape[0]), as_gate(experts.expert_gate, x)
    return experts._replace(expert_index=index, expert_gate=gate)


def _fake_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    experts, (modulate, keep, backend) = LinearExperts(*arguments[:4]), arguments[4:7]
    _check(x, experts, modulate)
    _check_kernels(x, experts, backend)
    return experts.empty_outputs(x, keep)


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
    experts, backend = LinearExperts(*arguments[:4]), arguments[6]
    product, top_k = _product(x, experts), int(experts.expert_index.shape[1])
    if _is_grouped(x, experts, backend, forward=True):
        return top_k * (product + product // x.shape[2])  # the second is the sum weighted by gates
    return product


def _flops_backward(_grad: Tensor, x: Tensor, *arguments: Any) -> int:
    experts, (of_x, of_weight, of_bias, of_gate), backend = LinearExperts(*arguments[:4]), *arguments[6:8]
    weight, bias, expert_index, _ = experts
    product, top_k = _product(x, experts), expert_index.shape[1]
    if backend in _ON_GPU:
        each = weight.shape[0] > 4  # MAX_ACCUMULATORS of Triton's kernels: above, a product for each pair
        if backend == "cuda":
            each &= not expert_linear_hopper.forms_gradients(experts)
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
    backend: str, schedule: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and, where kept, the mixture m(x), else an empty tensor."""
    experts = LinearExperts(weight, bias, index, gate)
    _check(x, experts, modulate)
    _check_kernels(x, experts, backend)
    experts = _converted(x, experts)
    if backend in _ON_GPU:
        check_schedule(schedule, experts.expert_index, weight.shape[0])
        x, schedule, *read = contiguous(x, schedule, *experts, aligned=True)
        if backend == "cuda":
            return expert_linear_hopper.forward(x, LinearExperts(*read), modulate, keep)
        from ..kernels import expert_linear as kernels

        return kernels.forward(x, LinearExperts(*read), modulate, keep, schedule)
    check_range("expert_index", index, weight.shape[0], "the experts")
    x, *read = contiguous(x, *experts)
    return compiled.forward(x, LinearExperts(*read), modulate, keep)


def _fake_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    experts, modulate, wanted = LinearExperts(*arguments[:4]), *arguments[5:7]
    _check(x, experts, modulate)
    grads = _converted(x, experts).empty_gradients(x, wanted)
    if len(arguments) > 9 and arguments[9]:
        grads[1:3] = [one.float() for one in grads[1:3]]
    return tuple(grads)


@operator("expert_linear_backward", fake=_fake_backward, flops=_flops_backward, autocast=0)
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, gate: Tensor,
    mixture: Tensor | None, modulate: bool, wanted: list[bool], backend: str,
    schedule: Tensor | None = None, single: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and gate; an empty tensor stands for one that is not wanted.

    With ``single``, for backend ``cuda``, those of weight and bias are float32.
    """
    experts = LinearExperts(weight, bias, index, gate)
    if single and backend != "cuda":
        raise ValueError(f"single is True; backend {backend!r} has gradients in the type of x only")
    if backend in _ON_GPU:
        _check(x, experts, modulate)
        _check_kernels(x, experts, backend)
    elif bias is not None:  # the rest goes by native.address or torch's products, which check sizes
        check_shape("bias", bias, (weight.shape[0], weight.shape[2]))
    experts = _converted(x, experts)
    check_like("grad", grad, x, (x.shape[0], x.shape[1], weight.shape[2]))
    if mixture is not None:
        check_like("mixture", mixture, x, tuple(grad.shape))
    if backend in _ON_GPU:
        check_schedule(schedule, experts.expert_index, weight.shape[0])
        grad, x, mixture, schedule, *read = contiguous(grad, x, mixture, schedule, *experts, aligned=True)
        given = grad, x, LinearExperts(*read), mixture, modulate, wanted, schedule
        if backend == "cuda":
            return expert_linear_hopper.backward(*given, single)
        from ..kernels import expert_linear as kernels

        return kernels.backward(*given)
    check_range("expert_index", index, weight.shape[0], "the experts")
    grad, x, mixture, *read = contiguous(grad, x, mixture, *experts)
    return compiled.backward(grad, x, LinearExperts(*read), mixture, modulate, wanted)
