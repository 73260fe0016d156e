"""Products of ``expert_linear`` on Hopper, by the CUDA kernels of ``csrc/expert_linear_hopper.h``.

They form ``m(x_b) = x_b V_b + v_b`` and ``dx_b = dm_b V_b^T``, and for up to two chosen experts the gradients
of weights, biases and gates. No GPU has run them yet, so nothing chooses them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..experts import LinearExperts
from ..native import address
from . import expert_linear as triton_kernels
from ._launch import kind
from .dispatch import dispatch

MAX_TOP_K = 4


def reason(x: Tensor, experts: LinearExperts) -> str | None:
    """Why the kernels cannot form these products, or None. Sizes are those of ``expert_linear``."""
    if native.cuda.module is None:
        return native.cuda.reason
    if "90a" not in native.cuda.module.architectures.split():
        return f"the CUDA module was built for {native.cuda.module.architectures}, not for 90a"
    if torch.cuda.get_device_capability(x.device) != (9, 0):
        return "the kernels are for compute capability 9.0"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels take bfloat16 and float16, not {x.dtype}"
    _, d_in, d_out = experts.weight.shape
    if d_in % 8 or d_out % 8:
        return f"Din and Dout must be multiples of 8, and are {d_in} and {d_out}"
    top_k = experts.expert_index.shape[1]
    return None if top_k <= MAX_TOP_K else f"top_k is {top_k}; the kernels take at most {MAX_TOP_K}"


def forward(x: Tensor, experts: LinearExperts, modulate: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """``(m(x) or x * (1 + m(x)), m(x) where modulated and kept, else empty)``.

    Arguments are contiguous, start at multiples of 16 bytes, and are such that :func:`reason` is None.
    """
    out, mixture = experts.empty_outputs(x, keep)
    if out.numel() == 0:
        return out, mixture
    if x.numel() == 0:
        return out.zero_(), mixture.zero_()
    _launch(x, None, mixture if keep else None, out, experts, modulate, gradient=False)
    return out, mixture


def grad_x(
    grad_mixture: Tensor, grad: Tensor, mixture: Tensor | None, experts: LinearExperts, modulate: bool
) -> Tensor:
    """``dm_b V_b^T``; with ``modulate`` also ``grad (1 + m(x))`` is added. Arguments as in :func:`forward`.

    ``grad_mixture [B, T, Dout]`` is dm: the gradient of the output, ``grad``, or with ``modulate`` its
    product with x.
    """
    d_in = experts.weight.shape[1]
    out = grad_mixture.new_empty((*grad_mixture.shape[:2], d_in))
    if out.numel() == 0:
        return out
    if grad_mixture.numel() == 0:
        return out.zero_()
    _launch(grad_mixture, grad if modulate else None, mixture, out, experts, modulate, gradient=True)
    return out


def backward(
    grad: Tensor, x: Tensor, experts: LinearExperts, mixture: Tensor | None, modulate: bool,
    wanted: list[bool], schedule: Tensor | None = None, single: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, weight, bias and gate; empty where not wanted. ``mixture``: m(x) where modulated.

    With ``single`` those of weight and bias are float32. More than two chosen experts, or more experts than
    the kernel counts, are left to Triton's kernel, which knows no ``single``.
    """
    if x.numel() == 0 or experts.weight.numel() == 0:
        return tuple(one.zero_() for one in experts.empty_gradients(x, wanted))
    grads = experts.empty_gradients(x, [False, *wanted[1:]])
    # dm is the operand of all that follows, and formed once.
    grad_mixture = grad * x if modulate else grad
    if wanted[0]:
        grads[0] = grad_x(grad_mixture, grad, mixture, experts, modulate)
    if any(wanted[1:]):
        if schedule is None:
            schedule = dispatch(experts.expert_index, len(experts.weight))
        if gradients_reason(experts) is None:
            grads[1:] = _grad_experts(grad_mixture, x, experts, schedule, wanted, single)
        else:
            triton_kernels.grad_weight(grad_mixture, x, experts, False, schedule, kind(x), grads, wanted)
    return tuple(grads)


def gradients_reason(experts: LinearExperts) -> str | None:
    """Why the gradients of these experts are Triton's, or None."""
    module = native.cuda.require()
    top_k, num_experts = experts.expert_index.shape[1], len(experts.weight)
    if top_k > module.max_gradient_top_k:
        return f"top_k is {top_k}; the kernel takes at most {module.max_gradient_top_k}"
    if num_experts > module.max_gradient_experts:
        return f"there are {num_experts} experts; the kernel takes at most {module.max_gradient_experts}"
    return None


def _grad_experts(
    grad_mixture: Tensor, x: Tensor, experts: LinearExperts, schedule: Tensor, wanted: list[bool],
    single: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of weight, bias and gate. Those that are not wanted are formed all the same, and dropped."""
    weight, bias, index, gate = experts
    (batch, tokens, d_in), (num_experts, _, d_out) = x.shape, weight.shape
    top_k, dtype = index.shape[1], x.dtype
    of_weights = torch.float32 if single else dtype
    grads = [
        torch.empty_like(weight, dtype=of_weights),
        torch.empty(0 if bias is None else bias.shape, dtype=of_weights, device=x.device),
        torch.empty_like(gate),
    ]
    module = native.cuda.require()
    sizes = {
        "batch": batch, "tokens": tokens, "inputs": d_in, "outputs": d_out, "num_experts": num_experts,
        "top_k": top_k,
    }  # fmt: skip

    def of(tensor: Tensor | None, numbers: int, dtype: torch.dtype = dtype) -> int:
        return address(tensor, dtype, numbers, "cuda")

    with torch.cuda.device(x.device):
        size = module.weight_gradient_workspace(**sizes, bias=bias is not None)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        module.weight_gradient(
            is_bfloat16=dtype == torch.bfloat16, single=single, **sizes,
            weight=of(weight, num_experts * d_in * d_out), bias=of(bias, num_experts * d_out),
            order=of(schedule[:batch], batch, torch.int32), index=of(index, batch * top_k, torch.int32),
            gate=of(gate, batch * top_k, torch.float32), x=of(x, batch * tokens * d_in),
            grad=of(grad_mixture, batch * tokens * d_out), workspace=of(workspace, size, torch.uint8),
            weight_grad=of(grads[0], weight.numel(), of_weights),
            bias_grad=of(grads[1], grads[1].numel(), of_weights),
            gate_grad=of(grads[2], batch * top_k, torch.float32),
            stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return [one if want else one.new_empty(0) for one, want in zip(grads, wanted[1:], strict=True)]


def _launch(
    source: Tensor, grad: Tensor | None, mixture: Tensor | None, out: Tensor, experts: LinearExperts,
    modulate: bool, gradient: bool,
) -> None:  # fmt: skip
    weight, bias, index, gate = experts
    (batch, tokens, _), (num_experts, d_in, d_out) = source.shape, weight.shape
    top_k, dtype = index.shape[1], source.dtype
    size = batch * tokens * (d_in if gradient else d_out)

    def of(tensor: Tensor | None, numbers: int, dtype: torch.dtype = dtype) -> int:
        return address(tensor, dtype, numbers, "cuda")

    with torch.cuda.device(source.device):
        native.cuda.require().merged_product(
            is_bfloat16=dtype == torch.bfloat16, gradient=gradient, modulate=modulate, batch=batch,
            tokens=tokens, inputs=d_in, outputs=d_out, num_experts=num_experts, top_k=top_k,
            weight=of(weight, num_experts * d_in * d_out), bias=of(bias, num_experts * d_out),
            index=of(index, batch * top_k, torch.int32), gate=of(gate, batch * top_k, torch.float32),
            input=of(source, source.numel()), grad=of(grad, size), mixture=of(mixture, size),
            output=of(out, size), stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
