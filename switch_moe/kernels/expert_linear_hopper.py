"""Products of ``expert_linear`` on Hopper, by the CUDA kernels of ``csrc/expert_linear_hopper.h``.

They form ``m(x_b) = x_b V_b + v_b`` and ``dx_b = dm_b V_b^T``, and for up to two chosen experts the gradients
of weights, biases and gates; for more of them those are Triton's. No GPU has run them yet, so they run for
``backend="cuda"`` only: see :mod:`switch_moe.kernels.measured`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..experts import LinearExperts
from ..native import address

DTYPES = (torch.bfloat16, torch.float16)
MAX_TOP_K = 4
MAX_GRADIENT_TOP_K, MAX_GRADIENT_EXPERTS = 2, 32  # of the gradients of weights
_device_reasons: dict[torch.device, str | None] = {}  # each device is asked for once


def device_reason(device: torch.device) -> str | None:
    """Why no product can be formed by the kernels on ``device``, or None."""
    if device.type != "cuda":
        return f"the CUDA kernels run on CUDA tensors, not on {device.type} tensors; use backend='auto'"
    if torch.cuda.is_available():  # else the tensor is fake, and stands for one on a GPU
        major, minor = torch.cuda.get_device_capability(device.index or 0)
        if (major, minor) != (9, 0):
            return f"the CUDA kernels are for compute capability 9.0, not {major}.{minor}; use backend='auto'"
    if native.cuda.module is None:
        return native.cuda.reason
    if "90a" not in native.cuda.module.architectures.split():
        return (
            f"{native.cuda.module.__name__} was built for {native.cuda.module.architectures}, not for 90a; "
            "build it with SWITCH_MOE_CUDA_ARCHS=90a"
        )
    return None


def reason(x: Tensor, experts: LinearExperts) -> str | None:
    """Why the kernels cannot form these products, or None. Sizes are those of ``expert_linear``."""
    if x.device not in _device_reasons:
        _device_reasons[x.device] = device_reason(x.device)
    if (why := _device_reasons[x.device]) is not None:
        return why
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; the CUDA kernels take bfloat16 and float16"
    _, d_in, d_out = experts.weight.shape
    if d_in % 8 or d_out % 8:
        return f"Din and Dout are {d_in} and {d_out}; the CUDA kernels take multiples of 8"
    top_k = experts.expert_index.shape[1]
    return None if top_k <= MAX_TOP_K else f"top_k is {top_k}; the CUDA kernels take at most {MAX_TOP_K}"


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
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of x, weight, bias and gate; empty where not wanted. ``mixture``: m(x) where modulated.

    With ``single`` those of weight and bias are float32. ``schedule`` is that of ``dispatch``, which is
    called where there is none.
    """
    grads = experts.empty_gradients(x, [False] * 4)
    # dm is the operand of all that follows, and formed once.
    grad_mixture = grad * x if modulate else grad
    if wanted[0]:
        grads[0] = grad_x(grad_mixture, grad, mixture, experts, modulate)
    if any(wanted[1:]):
        grads[1:] = _grad_experts(grad_mixture, x, experts, wanted[1:], schedule, single)
    return tuple(grads)


def forms_gradients(experts: LinearExperts) -> bool:
    """Whether the gradients of weights, biases and gates are the CUDA kernels', not Triton's."""
    return experts.expert_index.shape[1] <= MAX_GRADIENT_TOP_K and len(experts.weight) <= MAX_GRADIENT_EXPERTS


def _grad_experts(
    grad_mixture: Tensor, x: Tensor, experts: LinearExperts, wanted: list[bool], schedule: Tensor | None,
    single: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of weight, bias and gate. Those that are not wanted are formed all the same, and dropped."""
    weight, bias, _, gate = experts
    dtype = torch.float32 if single else x.dtype
    grads = [
        torch.empty_like(weight, dtype=dtype),
        torch.empty(0 if bias is None else bias.shape, dtype=dtype, device=x.device),
        torch.empty_like(gate),
    ]
    if x.numel() == 0 or weight.numel() == 0:
        for one in grads:
            one.zero_()
    else:
        from .dispatch import dispatch

        if schedule is None:
            schedule = dispatch(experts.expert_index, len(weight))
        if forms_gradients(experts):
            _launch_gradients(grad_mixture, x, experts, schedule, grads)
        else:
            from . import expert_linear as of_triton
            from ._launch import kind

            of_triton.grad_weight(
                grad_mixture, x, experts, False, schedule, kind(x), [x, *grads], [False, True, True, True]
            )
    return [one if want else one.new_empty(0) for one, want in zip(grads, wanted, strict=True)]


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


def _launch_gradients(
    grad_mixture: Tensor, x: Tensor, experts: LinearExperts, schedule: Tensor, grads: list[Tensor]
) -> None:
    weight, bias, index, gate = experts
    (batch, tokens, d_in), (num_experts, _, d_out) = x.shape, weight.shape
    top_k, dtype, of_weights = index.shape[1], x.dtype, grads[0].dtype
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
            is_bfloat16=dtype == torch.bfloat16, single=of_weights == torch.float32, **sizes,
            weight=of(weight, num_experts * d_in * d_out), bias=of(bias, num_experts * d_out),
            order=of(schedule[:batch], batch, torch.int32), index=of(index, batch * top_k, torch.int32),
            gate=of(gate, batch * top_k, torch.float32), x=of(x, batch * tokens * d_in),
            grad=of(grad_mixture, batch * tokens * d_out), workspace=of(workspace, size, torch.uint8),
            weight_grad=of(grads[0], weight.numel(), of_weights),
            bias_grad=of(grads[1], 0 if bias is None else bias.numel(), of_weights),
            gate_grad=of(grads[2], batch * top_k, torch.float32),
            stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
