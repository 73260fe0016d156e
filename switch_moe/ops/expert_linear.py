"""Linear experts with per-sample gates, merged before the product where that is cheaper."""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switch_moe import native
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
from switch_moe.reference.expert_linear import expert_linear as reference_expert_linear

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LANES = {"AVX512": 16, "AVX2": 8}
_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1}  # csrc/elements.h

# A workspace is kept from call to call: fresh memory cost more than what is done in it (12.7 against 2.5 ms
# for the merged weights of a training step, 19 MB). It holds merged weights, or packed tokens and gradients,
# of a round of samples. Every round passes over the experts and their gradients again, so it takes many
# samples for each expert: at (8, 256, 1152) float32, merged apart, 24 MiB took 1.26 times as long as
# nn.Linear, 48 MiB 1.24 times.
_ROUTES_PER_EXPERT = 8
_WORKSPACE_BYTES = 48 << 20
_SUM_BYTES = 1 << 20
_workspaces = threading.local()


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
    products. For few tokens the samples are grouped by expert instead, see :func:`merging_pays`.

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
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(x, weight, bias, expert_index, expert_gate, modulate)
    path = choose("expert_linear", backend, x.device, native_devices=("cpu",), triton=True)
    if path != "reference" and x.dtype not in KERNEL_DTYPES:
        if backend == path:
            check_dtype("x", x, *KERNEL_DTYPES)
        path = "reference"
    if path == "triton":
        check_triton_dtype("expert_linear", x.dtype, x.device)
    if expert_index.dtype != torch.int32:  # out of range stays out of range, where the operator finds it
        expert_index = expert_index.clamp(-1, weight.shape[0]).to(torch.int32)
    if path == "reference" or x.numel() == 0 or weight.numel() == 0:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            check_expert_index(expert_index, weight.shape[0])
        return reference_expert_linear(x, weight, bias, expert_index, expert_gate, modulate)
    out: Tensor = _ExpertLinear.apply(x, weight, bias, expert_index, expert_gate, modulate, path)
    return out


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, expert_index: Tensor, expert_gate: Tensor, modulate: bool
) -> None:
    check_shape("x", x, ("B", "T", "Din"))
    check_dtype("x", x, *KERNEL_DTYPES, torch.float64)
    batch, _, d_in = x.shape
    check_shape("weight", weight, ("M", d_in, "Dout"))
    num_experts, _, d_out = weight.shape
    check_shape("expert_index", expert_index, (batch, "k"))
    check_shape("expert_gate", expert_gate, tuple(expert_index.shape))
    check_dtype("expert_index", expert_index, torch.int32, torch.int64)
    check_dtype(
        "expert_gate", expert_gate, torch.float32, *([torch.float64] if x.dtype == torch.float64 else [])
    )
    same_type = [("weight", weight)]
    if bias is not None:
        check_shape("bias", bias, (num_experts, d_out))
        same_type.append(("bias", bias))
    for name, tensor in same_type:
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and x is {x.dtype}; cast one, or use autocast")
    for name, tensor in [*same_type, ("expert_index", expert_index), ("expert_gate", expert_gate)]:
        check_device(name, tensor, x.device)
    if expert_index.shape[1] < 1:
        raise ValueError(
            f"expert_index has shape {tuple(expert_index.shape)}; at least one expert must be chosen"
        )
    if modulate and d_in != d_out:
        raise ValueError(f"modulate needs square experts; weight has shape {tuple(weight.shape)}")


class _ExpertLinear(torch.autograd.Function):
    """Saves x, the experts and, with modulate, m(x); the merged weights are formed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        gate: Tensor,
        modulate: bool,
        backend: str,
    ) -> Tensor:
        keep = modulate and ctx.needs_input_grad[0]
        out, mixture = torch.ops.switch_moe.expert_linear(
            x, weight, bias, index, gate, modulate, keep, backend
        )
        ctx.modulate, ctx.backend = modulate, backend
        ctx.save_for_backward(x, weight, bias, index, gate, mixture if keep else None)
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, index, gate, mixture = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:3], ctx.needs_input_grad[4]]
        wanted[2] = wanted[2] and bias is not None
        found = torch.ops.switch_moe.expert_linear_backward(
            grad_out, x, weight, bias, index, gate, mixture, ctx.modulate, wanted, ctx.backend
        )
        grads = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
        return (*grads[:3], None, grads[3], None, None)


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    gate: Tensor,
    modulate: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1], weight.shape[2])
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    gate: Tensor,
    mixture: Tensor | None,
    modulate: bool,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, (weight.shape[0], weight.shape[2]), gate.shape)
    like = (x, weight, weight, gate)
    grads = [a.new_empty(shape if want else 0) for a, shape, want in zip(like, shapes, wanted, strict=True)]
    return grads[0], grads[1], grads[2], grads[3]


@register(
    "expert_linear(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor gate, bool modulate, "
    "bool keep_mixture, str backend) -> (Tensor, Tensor)",
    _fake_forward,
)
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    gate: Tensor,
    modulate: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output and, where kept, the mixture m(x), else an empty tensor."""
    x, weight, bias, index, gate = _contiguous(x, weight, bias, index, gate)
    if backend == "triton":
        from switch_moe.kernels import expert_linear as kernels

        return kernels.forward(x, weight, bias, index, gate, modulate, keep)
    mixture = _native_forward(x, weight, bias, index, gate)
    out = torch.addcmul(x, x, mixture) if modulate else mixture.clone() if keep else mixture
    return out, mixture if keep else x.new_empty(0)


@register(
    "expert_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor gate, "
    "Tensor? mixture, bool modulate, bool[4] wanted, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    gate: Tensor,
    mixture: Tensor | None,
    modulate: bool,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and gate; an empty tensor stands for one that is not wanted."""
    x, weight, bias, index, gate = _contiguous(x, weight, bias, index, gate)
    if backend == "triton":
        from switch_moe.kernels import expert_linear as kernels

        mixture = None if mixture is None else mixture.contiguous()
        return kernels.backward(grad.contiguous(), x, weight, bias, index, gate, mixture, modulate, wanted)
    grad_mixture = grad * x if modulate else grad.contiguous()
    grads = _native_backward(grad_mixture, x, weight, bias, index, gate, wanted)
    if wanted[0] and mixture is not None:
        grads[0].add_(grad).addcmul_(grad, mixture)
    return grads


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *rest


register_autocast("expert_linear", _cast)


def _contiguous(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    bias = None if bias is None else bias.contiguous()
    return x.contiguous(), weight.contiguous(), bias, index.contiguous(), gate.contiguous()


def merging_pays(tokens: float, top_k: int, d_in: int, d_out: int, dtype: torch.dtype, fused: bool) -> bool:
    """Whether one product with merged experts beats ``top_k`` products over samples grouped by expert, on a
    CPU.

    Merging saves k - 1 products of ``tokens`` rows and the gather and scatter around all k. It costs a pass
    over k weights ``[Din, Dout]`` for each sample (or group of samples with the same gates), and, unless it
    is ``fused`` with the product, passes that write and read the merged ones. The constants are fitted to
    ``benchmarks/sweep_merging.py`` on two cores of a Zen 4 server, where k = 1, 2 and 4 broke even at T = 18,
    5 and 4 fused in float32, 30, 10 and 7 fused in bfloat16 for D = 384, at 45, 8 and 7, and 90, 16 and 10
    for D = 1152, and k = 2 apart at T = 18, 18 to 36 and 57 for D = 192, 384 and 1152.
    """
    width = math.sqrt(d_in * d_out)
    if fused:
        return tokens >= 2 + top_k / (top_k - 0.9) * width / (290 if dtype == torch.float32 else 155)
    return tokens - 8 >= (top_k + 1) / (1.2 * top_k - 1) * width / 46


def _native_forward(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, gate: Tensor) -> Tensor:
    check_expert_index(index, weight.shape[0])  # the compiled kernels check nothing
    batch, tokens, d_in = x.shape
    with torch.autocast("cpu", enabled=False):
        if x.dtype == torch.float16:  # torch's float16 products on a CPU are 40 times slower than float32
            bias = None if bias is None else bias.float()
            return _native_forward(x.float(), weight.float(), bias, index, gate).half()
        routes, order, counts = _share_routes(index, gate)
        lanes = _lanes(x.dtype)
        tokens_of_route, top_k = batch * tokens / len(counts), index.shape[1]
        if not merging_pays(tokens_of_route, top_k, d_in, weight.shape[2], x.dtype, lanes > 0):
            return _grouped_forward(x, weight, bias, index, gate)
        shared = 1 < len(counts) < batch
        rows = x.index_select(0, order) if shared else x
        out = _merged_forward(rows, weight, bias, index[routes], gate[routes], counts, lanes)
        return torch.empty_like(out).index_copy_(0, order, out) if shared else out


def _share_routes(index: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Samples that share a timestep share experts and gates, and then a merged weight.

    Returns a sample of each route [R], the samples in the order of their routes [B], and samples per route.
    Where fewer than half of the merges would be saved, every sample is its own route: one batched product
    is faster.
    """
    batch = index.shape[0]
    every = torch.arange(batch, device=index.device)
    bits = gate.view(torch.int32)
    distinct = len(torch.unique(bits[:, 0]))  # at most as many as routes; those take 0.5 ms for 128 samples
    if 2 * distinct > batch > 1:
        return every, every, [1] * batch
    keys = torch.cat([index, bits], dim=1)
    if torch.equal(keys, keys[:1].expand_as(keys)):
        return every[:1], every, [batch]
    _, route, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    if 2 * len(counts) > batch:
        return every, every, [1] * batch
    order = torch.argsort(route, stable=True)
    return order[counts.cumsum(0) - counts], order, counts.tolist()


def _merge(weight: Tensor, index: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """out_r = sum_j gate_rj weight_index_rj: weight [M, ...], index and gate [R, k], out [R, ...]."""
    native.cpu.require().merge_experts(
        weight.data_ptr(), len(weight), weight[0].numel(), index.data_ptr(), gate.data_ptr(), *index.shape,
        _DTYPE_CODE[weight.dtype], torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip
    return out


def _workspace(dtype: torch.dtype, size: int, most: int) -> Tensor:
    """``[n, size]``, kept from call to call: n = most, or what fits _WORKSPACE_BYTES, but at least one."""
    count = max(1, min(most, _WORKSPACE_BYTES // (size * dtype.itemsize)))
    kept: Tensor | None = getattr(_workspaces, str(dtype), None)
    if kept is None or kept.numel() < count * size:
        with torch.inference_mode(False):  # a tensor born in inference mode could not serve training later
            kept = torch.empty(count * size, dtype=dtype, device="cpu")
        setattr(_workspaces, str(dtype), kept)
    return kept[: count * size].view(count, size)


def _merged_buffer(weight: Tensor, routes: int) -> Tensor:
    """Room for the merged weights of one round of routes."""
    found = _workspace(weight.dtype, weight[0].numel(), min(routes, _ROUTES_PER_EXPERT * len(weight)))
    return found.view(-1, *weight.shape[1:])


def _lanes(dtype: torch.dtype) -> int:
    """Floats of a vector of the kernels that merge experts where a product reads them, in cache
    (csrc/merged_product.h); 0 where there are none: another type, an older or another processor. Like torch's
    own kernels they follow the environment variable ATEN_CPU_CAPABILITY. These kernels do not use AMX: where
    it is, bfloat16 is left to torch's products, which do.
    """
    lanes = _LANES.get(torch.backends.cpu.get_cpu_capability(), 0)
    if dtype not in _DTYPE_CODE or not native.cpu.require().merged_product_takes(_DTYPE_CODE[dtype], lanes):
        return 0
    if dtype == torch.bfloat16 and (_has("amx_tile") or not _has("avx512_bf16")):
        return 0
    return lanes


def _has(feature: str) -> bool:
    """Whether torch finds it on this processor; False where it has no such question."""
    ask = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return ask is not None and bool(ask())


def _merged_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    gate: Tensor,
    counts: list[int],
    lanes: int,
) -> Tensor:
    """``counts[r]`` samples of x have the route ``index[r], gate[r]``, in this order."""
    out = x.new_empty(*x.shape[:2], weight.shape[2])
    bias_RO = None if bias is None else _merge(bias, index, gate, bias.new_empty(len(index), bias.shape[1]))
    if lanes:
        _fused_product(x, weight, bias_RO, index, gate, counts, False, lanes, out)
        return out
    buffer = _merged_buffer(weight, len(counts))
    stop = 0
    for r in range(0, len(counts), len(buffer)):
        chunk = slice(r, min(r + len(buffer), len(counts)))
        v_RIO = _merge(weight, index[chunk], gate[chunk], buffer[: chunk.stop - r])
        if len(counts) == len(x):
            torch.bmm(x[chunk], v_RIO, out=out[chunk])
            continue
        for route, v_IO in enumerate(v_RIO, start=r):
            start, stop = stop, stop + counts[route]
            torch.mm(x[start:stop].flatten(0, 1), v_IO, out=out[start:stop].flatten(0, 1))
    if bias_RO is not None:
        if len(counts) < len(x):
            bias_RO = bias_RO.repeat_interleave(torch.tensor(counts), 0)
        out += bias_RO[:, None]
    return out


def _fused_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    gate: Tensor,
    counts: list[int],
    transposed: bool,
    lanes: int,
    out: Tensor,
) -> None:
    """out = x V_r + bias_r, or x V_r^T; arguments as for :func:`_merged_forward`, but bias is [R, Dout]."""
    starts = torch.tensor([0, *itertools.accumulate(counts)]) * x.shape[1]
    native.cpu.require().merged_product(
        x.data_ptr(), *weight.shape, weight.data_ptr(), *index.shape, index.data_ptr(), gate.data_ptr(),
        starts.data_ptr(), 0 if bias is None else bias.data_ptr(), transposed, _DTYPE_CODE[x.dtype], lanes,
        torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip


class _Pairs:
    """(sample, expert) pairs in the order of their experts."""

    def __init__(self, index: Tensor, num_experts: int) -> None:
        flat = index.flatten()
        self.top_k = index.shape[1]
        self.order = torch.argsort(flat, stable=True)  # [B*k]
        self.sample = self.order // self.top_k
        self.sizes: list[int] = torch.bincount(flat, minlength=num_experts).tolist()

    def gather(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` to ``[B*k, T, D]``."""
        return x.index_select(0, self.sample)  # indexing takes six times as long

    def split(self, rows: Tensor) -> list[Tensor]:
        """``[B*k, T, D]`` to the rows ``[n_e*T, D]`` of each expert."""
        return [part.flatten(0, 1) for part in rows.split(self.sizes)]

    def combine(self, rows: Tensor, gate: Tensor) -> Tensor:
        """``[B*k, T, D]`` to their sums weighted by gate, float32 ``[B, T, D]``."""
        by_sample = rows.index_select(0, torch.argsort(self.order)).float()
        total = torch.bmm(gate[:, None], by_sample.view(len(gate), self.top_k, -1))
        return total.view(len(gate), *rows.shape[1:])


def _grouped_forward(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, gate: Tensor) -> Tensor:
    pairs = _Pairs(index, len(weight))
    rows = pairs.gather(x)
    y = rows.new_empty(*rows.shape[:2], weight.shape[2])
    for e, (x_e, y_e) in enumerate(zip(pairs.split(rows), pairs.split(y), strict=True)):
        if bias is None:
            torch.mm(x_e, weight[e], out=y_e)
        else:
            torch.addmm(bias[e], x_e, weight[e], out=y_e)
    return pairs.combine(y, gate).to(x.dtype)


def _native_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    gate: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_expert_index(index, weight.shape[0])
    with torch.autocast("cpu", enabled=False):
        if x.dtype == torch.float16:
            bias = None if bias is None else bias.float()
            found = _native_backward(grad.float(), x.float(), weight.float(), bias, index, gate, wanted)
            return found[0].half(), found[1].half(), found[2].half(), found[3]
        lanes = _lanes(x.dtype)
        _, d_in, d_out = weight.shape
        merged = merging_pays(x.shape[1], index.shape[1], d_in, d_out, x.dtype, lanes > 0)
        compute = _fused_backward if merged and lanes else _merged_backward if merged else _grouped_backward
        grad_x, grad_weight, grad_gate = compute(grad, x, weight, index, gate, wanted)
        grad_bias = x.new_empty(0)
        if bias is not None and (wanted[2] or wanted[3]):
            total_BO = _sum_of_tokens(grad)
            gate_BM = gate.new_zeros(len(gate), len(weight)).scatter_add_(1, index.long(), gate)
            if wanted[2]:
                grad_bias = (gate_BM.t() @ total_BO).to(bias.dtype)
            if wanted[3]:
                grad_gate += (total_BO @ bias.float().t()).gather(1, index.long())
    return grad_x, grad_weight, grad_bias, grad_gate


def _sum_of_tokens(x: Tensor) -> Tensor:
    """``[B, T, D]`` to float32 ``[B, D]``. torch converts before it sums: a few samples at a time, which stay
    in the cache (0.4 to 0.6 ms instead of 0.5 to 0.9 for the shapes of ``benchmarks``).
    """
    if x.dtype == torch.float32:
        return x.sum(1)
    samples = max(1, _SUM_BYTES // max(4 * x[0].numel(), 1))
    return torch.cat([part.sum(1, dtype=torch.float32) for part in x.split(samples)])


def _merged_backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor, gate: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Two products: dx_b = dm_b V_b^T and P_b = x_b^T dm_b; dW_e = sum_b g_be P_b, dg_be = <P_b, W_e>."""
    grad_x = torch.empty_like(x) if wanted[0] else x.new_empty(0)
    grad_weight, grad_gate = torch.empty_like(weight), torch.empty_like(gate)
    buffer = _merged_buffer(weight, len(x))
    rounds = [slice(b, min(b + len(buffer), len(x))) for b in range(0, len(x), len(buffer))]
    carry = torch.empty(weight.shape if len(rounds) > 1 else 0, dtype=torch.float32, device=weight.device)
    for number, chunk in enumerate(rounds):
        v_BIO = buffer[: chunk.stop - chunk.start]
        if wanted[0]:
            _merge(weight, index[chunk], gate[chunk], v_BIO)
            torch.bmm(grad[chunk], v_BIO.transpose(1, 2), out=grad_x[chunk])
        if wanted[1] or wanted[3]:
            p_BIO = torch.bmm(
                x[chunk].transpose(1, 2), grad[chunk], out=v_BIO
            )  # V is used up: P takes its place
            native.cpu.require().merge_experts_backward(
                p_BIO.data_ptr(), weight.data_ptr(), len(weight), weight[0].numel(), index[chunk].data_ptr(),
                gate[chunk].data_ptr(), *index[chunk].shape, number == 0, number + 1 == len(rounds),
                _DTYPE_CODE[weight.dtype], torch.get_num_threads(), carry.data_ptr(), grad_weight.data_ptr(),
                grad_gate[chunk].data_ptr(),
            )  # fmt: skip
    return grad_x, _wanted(grad_weight, wanted[1]), _wanted(grad_gate, wanted[3])


def _fused_backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor, gate: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same two products, with neither V nor P in memory."""
    grad_x, grad_weight, grad_gate = x.new_empty(0), weight.new_empty(0), gate.new_empty(0)
    lanes = _lanes(x.dtype)
    if wanted[0]:
        grad_x = torch.empty_like(x)
        _fused_product(grad, weight, None, index, gate, [1] * len(x), True, lanes, grad_x)
    if wanted[1] or wanted[3]:
        grad_weight, grad_gate = torch.empty_like(weight), torch.empty_like(gate)
        module = native.cpu.require()
        code = _DTYPE_CODE[x.dtype]
        size = module.merged_product_workspace(x.shape[1], *weight.shape, code, lanes)
        packed = _workspace(torch.float32, size // 4, len(x))
        carried = x.dtype != torch.float32 and len(packed) < len(x)
        carry = torch.empty(weight.shape, dtype=torch.float32, device=x.device) if carried else None
        module.merged_product_backward(
            x.data_ptr(), grad.data_ptr(), x.shape[1], *weight.shape, weight.data_ptr(), *index.shape,
            index.data_ptr(), gate.data_ptr(), code, lanes, torch.get_num_threads(), len(packed),
            packed.data_ptr(), 0 if carry is None else carry.data_ptr(), grad_weight.data_ptr(),
            grad_gate.data_ptr(),
        )  # fmt: skip
    return grad_x, _wanted(grad_weight, wanted[1]), _wanted(grad_gate, wanted[3])


def _wanted(grad: Tensor, wanted: bool) -> Tensor:
    return grad if wanted else grad.new_empty(0)


def _grouped_backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor, gate: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Expert e, its samples b: z_b = dm_b W_e^T, dx_b += g_be z_b, dg_be = <x_b, z_b>, dW_e = (g x)^T dm."""
    pairs = _Pairs(index, len(weight))
    grads, rows = pairs.gather(grad), pairs.gather(x)
    grad_x, grad_weight, grad_gate = x.new_empty(0), weight.new_empty(0), gate.new_empty(0)
    if wanted[0] or wanted[3]:
        z = torch.empty_like(rows)
        for e, (grad_e, z_e) in enumerate(zip(pairs.split(grads), pairs.split(z), strict=True)):
            torch.mm(grad_e, weight[e].t(), out=z_e)
        products = torch.linalg.vecdot(z.float().flatten(1), rows.float().flatten(1))
        grad_gate = torch.empty_like(gate).view(-1).index_copy_(0, pairs.order, products).view(gate.shape)
        grad_x = pairs.combine(z, gate).to(x.dtype)
    if wanted[1]:
        grad_weight = torch.empty_like(weight)
        scaled = (rows * gate.flatten()[pairs.order][:, None, None]).to(x.dtype)
        for e, (x_e, grad_e) in enumerate(zip(pairs.split(scaled), pairs.split(grads), strict=True)):
            torch.mm(x_e.t(), grad_e, out=grad_weight[e])
    return _wanted(grad_x, wanted[0]), grad_weight, _wanted(grad_gate, wanted[3])
