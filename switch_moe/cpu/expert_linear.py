"""Linear experts on a CPU: three algorithms, and the rule that chooses among them.

Legend: B samples, T tokens per sample, D hidden size (I inputs, O outputs), M experts, k experts chosen per
sample, R routes (samples with the same experts and gates share one).
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from ..experts import LinearExperts
from ..native import address
from ..torch_compat import cpu_has

# Multiply-adds from which the compiled product of float32 beats torch's; below, its packing does not pay.
COMPILED_FROM = 2**25

_VECTOR_WIDTHS = {"AVX512": 16, "AVX2": 8}  # floats of a vector
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1}  # DType of csrc

# A workspace is kept from call to call: fresh memory cost more than what is done in it (12.7 against 2.5 ms
# for the merged weights of a training step, 19 MB). It holds merged weights, or packed tokens and gradients,
# of a round of samples. Every round passes over the experts and their gradients again, so it takes many
# samples for each expert: at (8, 256, 1152) float32, merged apart, 24 MiB took 1.26 times as long as
# nn.Linear, 48 MiB 1.24 times.
ROUTES_PER_EXPERT = 8
WORKSPACE_BYTES = 48 << 20
_SUM_BYTES = 1 << 20
_workspaces = threading.local()


def algorithm(tokens: float, experts: LinearExperts) -> str:
    """Which algorithm computes ``tokens`` rows per route: 'fused', 'merged' or 'grouped'.

    fused    experts merge inside the product, in cache (``csrc/expert_linear.h``)
    merged   experts merge into memory, then torch multiplies
    grouped  samples are grouped by expert, then torch multiplies once for each expert
    """
    weight = experts.weight
    dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype  # computed in float32
    fused = vector_width(dtype) > 0
    _, d_in, d_out = weight.shape
    if not merging_pays(tokens, experts.expert_index.shape[1], d_in, d_out, dtype, fused):
        return "grouped"
    return "fused" if fused else "merged"


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


@functools.cache
def vector_width(dtype: torch.dtype) -> int:
    """Floats of a vector of the fused products, 0 where there are none: another type, an older or another
    processor.

    Like torch's own kernels they follow the environment variable ATEN_CPU_CAPABILITY. They do not use AMX:
    where a processor has it, bfloat16 is left to torch's products, which do.
    """
    width = _VECTOR_WIDTHS.get(torch.backends.cpu.get_cpu_capability(), 0)
    if dtype not in DTYPE_CODE or not native.cpu.require().fused_product_takes(DTYPE_CODE[dtype], width):
        return 0
    if dtype == torch.bfloat16 and (cpu_has("amx_tile") or not cpu_has("avx512_bf16")):
        return 0
    return width


def forward(x: Tensor, experts: LinearExperts, modulate: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """The output, ``m(x)`` or ``x (1 + m(x))``, and m(x) where kept, else an empty tensor."""
    mixture = _mixture(x, experts)
    out = torch.addcmul(x, x, mixture) if modulate else mixture.clone() if keep else mixture
    return out, mixture if keep else x.new_empty(0)


def backward(
    grad: Tensor,
    x: Tensor,
    experts: LinearExperts,
    mixture: Tensor | None,
    modulate: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and gate; an empty tensor stands for one that is not wanted."""
    grad_mixture = grad * x if modulate else grad
    grads = _backward(grad_mixture, x, experts, wanted)
    if wanted[0] and mixture is not None:
        grads[0].add_(grad).addcmul_(grad, mixture)
    return grads


def _in_float32(experts: LinearExperts) -> LinearExperts:
    bias = None if experts.bias is None else experts.bias.float()
    return experts._replace(weight=experts.weight.float(), bias=bias)


def _mixture(x: Tensor, experts: LinearExperts) -> Tensor:
    """``m(x) [B, T, Dout]``."""
    batch, tokens, _ = x.shape
    if x.dtype == torch.float16:  # torch's float16 products on a CPU are 40 times slower than float32
        return _mixture(x.float(), _in_float32(experts)).half()
    shared = shared_routes(experts.expert_index, experts.expert_gate)
    counts = [1] * batch if shared is None else shared.counts
    chosen = algorithm(batch * tokens / len(counts), experts)
    if chosen == "grouped":
        return _grouped_forward(x, experts)
    compute = _fused_forward if chosen == "fused" else _merged_forward
    if shared is None:
        return compute(x, experts, counts)
    index, gate = experts.expert_index[shared.sample], experts.expert_gate[shared.sample]
    experts = experts._replace(expert_index=index, expert_gate=gate)
    if len(counts) == 1:
        return compute(x, experts, counts)
    out = compute(x.index_select(0, shared.order), experts, counts)
    return torch.empty_like(out).index_copy_(0, shared.order, out)


def _backward(
    grad: Tensor, x: Tensor, experts: LinearExperts, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients from dm, that of the mixture."""
    if x.dtype == torch.float16:
        found = _backward(grad.float(), x.float(), _in_float32(experts), wanted)
        return found[0].half(), found[1].half(), found[2].half(), found[3]
    _, bias, index, gate = experts
    compute = {"fused": _fused_backward, "merged": _merged_backward, "grouped": _grouped_backward}
    grad_x, grad_weight, grad_gate = compute[algorithm(x.shape[1], experts)](grad, x, experts, wanted)
    grad_bias = None
    if bias is not None and (wanted[2] or wanted[3]):
        total_BO = _sum_of_tokens(grad)
        if wanted[2]:  # by index, not by a product with zeros: 0 times infinity is not 0
            pairs = (gate[:, :, None] * total_BO[:, None]).flatten(0, 1)
            grad_bias = gate.new_zeros(bias.shape).index_add_(0, index.flatten(), pairs).to(bias.dtype)
        if wanted[3]:
            grad_gate += (total_BO @ bias.float().t()).gather(1, index.long())
    return grad_x, grad_weight, x.new_empty(0) if grad_bias is None else grad_bias, grad_gate


class _SharedRoutes(NamedTuple):
    """Routes of several samples each."""

    sample: Tensor  # [R], a sample of each route
    order: Tensor  # [B], the samples in the order of their routes
    counts: list[int]  # samples of each route


def shared_routes(index: Tensor, gate: Tensor) -> _SharedRoutes | None:
    """Samples that share a timestep share experts and gates, and then a merged weight.

    None where every sample should be its own route, which is where fewer than half of the merges would be
    saved: one batched product is faster.
    """
    batch = index.shape[0]
    bits = gate.view(torch.int32)
    distinct = torch.unique(bits[:, 0]).shape[0]  # at most as many as routes; those take 0.5 ms for B = 128
    if batch == 1 or 2 * distinct > batch:
        return None
    keys = torch.cat([index, bits], dim=1)
    if torch.equal(keys, keys[:1].expand_as(keys)):
        every = torch.arange(batch, device=index.device)
        return _SharedRoutes(every[:1], every, [batch])
    _, route, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    if 2 * counts.shape[0] > batch:
        return None
    order = torch.argsort(route, stable=True)
    return _SharedRoutes(order[counts.cumsum(0) - counts], order, counts.tolist())


def merge_experts(weight: Tensor, bias: Tensor | None, index: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Merged weights ``[R, Din, Dout]`` and biases ``[R, Dout]``, the second empty without a bias."""
    if weight.dtype == torch.float16:
        found = merge_experts(weight.float(), None if bias is None else bias.float(), index, gate)
        return found[0].half(), found[1].half()
    merged = _merge(weight, index, gate, weight.new_empty(index.shape[0], *weight.shape[1:]))
    shift = _merged_bias(LinearExperts(weight, bias, index, gate))
    return merged, weight.new_empty(0) if shift is None else shift


def _merge(weight: Tensor, index: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """``out_r = sum_j gate_rj weight_index_rj``: weight [M, ...], index and gate [R, k], out [R, ...]."""
    dtype, experts, size, (routes, top_k) = weight.dtype, weight.shape[0], weight[0].numel(), index.shape
    native.cpu.require().merge_experts(
        address(weight, dtype, experts * size), experts, size, *_routes(index, gate), routes, top_k,
        DTYPE_CODE[dtype], torch.get_num_threads(), address(out, dtype, routes * size),
    )  # fmt: skip
    return out


def _routes(index: Tensor, gate: Tensor) -> tuple[int, int]:
    """The addresses of experts and gates, ``[R, k]`` both."""
    count = index.shape[0] * index.shape[1]
    return address(index, torch.int32, count), address(gate, torch.float32, count)


def _merged_bias(experts: LinearExperts) -> Tensor | None:
    """``v_r = sum_j gate_rj bias_index_rj``, ``[R, Dout]``."""
    bias, index = experts.bias, experts.expert_index
    if bias is None:
        return None
    return _merge(bias, index, experts.expert_gate, bias.new_empty(index.shape[0], bias.shape[1]))


def workspace(dtype: torch.dtype, size: int, most: int) -> Tensor:
    """``[n, size]``, kept from call to call: n = most, or what fits WORKSPACE_BYTES, but at least one."""
    count = max(1, min(most, WORKSPACE_BYTES // (size * dtype.itemsize)))
    kept: Tensor | None = getattr(_workspaces, str(dtype), None)
    if kept is None or kept.numel() < count * size:
        with torch.inference_mode(False):  # a tensor born in inference mode could not serve training later
            kept = torch.empty(count * size, dtype=dtype, device="cpu")
        setattr(_workspaces, str(dtype), kept)
    return kept[: count * size].view(count, size)


def _merged_buffer(weight: Tensor, routes: int) -> Tensor:
    """Room for the merged weights of one round of routes, ``[n, I, O]``."""
    rows = workspace(weight.dtype, weight[0].numel(), min(routes, ROUTES_PER_EXPERT * weight.shape[0]))
    return rows.view(-1, *weight.shape[1:])


def _merged_forward(x: Tensor, experts: LinearExperts, counts: list[int]) -> Tensor:
    """``counts[r]`` samples of x have the route ``index[r], gate[r]``, in this order."""
    weight, _, index, gate = experts
    out = experts.empty_outputs(x, keep=False)[0]
    buffer = _merged_buffer(weight, len(counts))
    stop = 0
    for r in range(0, len(counts), buffer.shape[0]):
        chunk = slice(r, min(r + buffer.shape[0], len(counts)))
        v_RIO = _merge(weight, index[chunk], gate[chunk], buffer[: chunk.stop - r])
        if len(counts) == x.shape[0]:
            torch.bmm(x[chunk], v_RIO, out=out[chunk])
            continue
        for route, v_IO in enumerate(v_RIO, start=r):
            start, stop = stop, stop + counts[route]
            torch.mm(x[start:stop].flatten(0, 1), v_IO, out=out[start:stop].flatten(0, 1))
    bias_RO = _merged_bias(experts)
    if bias_RO is not None:
        if len(counts) < x.shape[0]:
            bias_RO = bias_RO.repeat_interleave(torch.tensor(counts), 0)
        out += bias_RO[:, None]
    return out


def _fused_forward(x: Tensor, experts: LinearExperts, counts: list[int]) -> Tensor:
    """The same, with the merged weights in cache only."""
    out = experts.empty_outputs(x, keep=False)[0]
    return fused_product(x, experts, _merged_bias(experts), counts, False, out)


def fused_product(
    x: Tensor, experts: LinearExperts, bias: Tensor | None, counts: list[int], transposed: bool, out: Tensor
) -> Tensor:
    """``out = x V_r + bias_r``, or ``x V_r^T`` if transposed; bias is [R, Dout]."""
    weight, _, index, gate = experts
    dtype, rows = x.dtype, x.shape[0] * x.shape[1]
    (num_experts, d_in, d_out), (routes, top_k) = weight.shape, index.shape
    ends = itertools.accumulate(counts, initial=0)
    starts = torch.tensor([end * x.shape[1] for end in ends], dtype=torch.int64, device="cpu")
    native.cpu.require().fused_product(
        address(x, dtype, rows * (d_out if transposed else d_in)), num_experts, d_in, d_out,
        address(weight, dtype, num_experts * d_in * d_out), routes, top_k, *_routes(index, gate),
        address(starts, torch.int64, routes + 1), address(bias, dtype, routes * d_out), transposed,
        DTYPE_CODE[dtype], vector_width(dtype), torch.get_num_threads(),
        address(out, dtype, rows * (d_in if transposed else d_out)),
    )  # fmt: skip
    return out


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
        total = torch.bmm(gate[:, None], by_sample.view(gate.shape[0], self.top_k, -1))
        return total.view(gate.shape[0], *rows.shape[1:])


def _grouped_forward(x: Tensor, experts: LinearExperts) -> Tensor:
    weight, bias, index, gate = experts
    pairs = _Pairs(index, weight.shape[0])
    rows = pairs.gather(x)
    y = rows.new_empty(*rows.shape[:2], weight.shape[2])
    for e, (x_e, y_e) in enumerate(zip(pairs.split(rows), pairs.split(y), strict=True)):
        if bias is None:
            torch.mm(x_e, weight[e], out=y_e)
        else:
            torch.addmm(bias[e], x_e, weight[e], out=y_e)
    return pairs.combine(y, gate).to(x.dtype)


def _sum_of_tokens(x: Tensor) -> Tensor:
    """``[B, T, D]`` to float32 ``[B, D]``. torch converts before it sums: a few samples at a time, which stay
    in the cache (0.4 to 0.6 ms instead of 0.5 to 0.9 for the shapes of ``benchmarks``).
    """
    if x.dtype == torch.float32:
        return x.sum(1)
    samples = max(1, _SUM_BYTES // max(4 * x[0].numel(), 1))
    return torch.cat([part.sum(1, dtype=torch.float32) for part in x.split(samples)])


def _merged_backward(
    grad: Tensor, x: Tensor, experts: LinearExperts, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Two products: dx_b = dm_b V_b^T and P_b = x_b^T dm_b; dW_e = sum_b g_be P_b, dg_be = <P_b, W_e>."""
    weight, _, index, gate = experts
    dtype = weight.dtype
    grad_x = torch.empty_like(x) if wanted[0] else x.new_empty(0)
    grad_weight, grad_gate = torch.empty_like(weight), torch.empty_like(gate)
    buffer = _merged_buffer(weight, x.shape[0])
    rounds = [slice(b, min(b + buffer.shape[0], x.shape[0])) for b in range(0, x.shape[0], buffer.shape[0])]
    carry = torch.empty(weight.shape if len(rounds) > 1 else 0, dtype=torch.float32, device=weight.device)
    for number, chunk in enumerate(rounds):
        v_BIO = buffer[: chunk.stop - chunk.start]
        if wanted[0]:
            _merge(weight, index[chunk], gate[chunk], v_BIO)
            torch.bmm(grad[chunk], v_BIO.transpose(1, 2), out=grad_x[chunk])
        if wanted[1] or wanted[3]:
            # V is used up: P takes its place.
            p_BIO = torch.bmm(x[chunk].transpose(1, 2), grad[chunk], out=v_BIO)
            numbers, (routes, top_k) = weight.numel(), index[chunk].shape
            native.cpu.require().merge_experts_backward(
                address(p_BIO, dtype, routes * weight[0].numel()), address(weight, dtype, numbers),
                weight.shape[0], weight[0].numel(), *_routes(index[chunk], gate[chunk]), routes, top_k,
                number == 0, number + 1 == len(rounds), DTYPE_CODE[dtype], torch.get_num_threads(),
                address(carry, torch.float32, numbers if len(rounds) > 1 else 0),
                address(grad_weight, dtype, numbers),
                address(grad_gate[chunk], torch.float32, routes * top_k),
            )  # fmt: skip
    return grad_x, _wanted(grad_weight, wanted[1]), _wanted(grad_gate, wanted[3])


def _fused_backward(
    grad: Tensor, x: Tensor, experts: LinearExperts, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same two products, with neither V nor P in memory."""
    weight, _, index, gate = experts
    grad_x = torch.empty_like(x) if wanted[0] else x.new_empty(0)
    of_experts = wanted[1] or wanted[3]
    grad_weight = torch.empty_like(weight) if of_experts else weight.new_empty(0)
    grad_gate = torch.empty_like(gate) if of_experts else gate.new_empty(0)
    if wanted[0]:
        fused_product(grad, experts, None, [1] * x.shape[0], True, grad_x)
    if of_experts:
        module = native.cpu.require()
        code, width = DTYPE_CODE[x.dtype], vector_width(x.dtype)
        size = module.fused_product_workspace(x.shape[1], *weight.shape, code, width)
        packed = workspace(torch.float32, size // 4, x.shape[0])
        samples = packed.shape[0]  # of a round
        carried = x.dtype != torch.float32 and samples < x.shape[0]
        carry = torch.empty(weight.shape, dtype=torch.float32, device=x.device) if carried else None
        (_, d_in, d_out), (routes, top_k) = weight.shape, index.shape
        dtype, rows, numbers = x.dtype, routes * x.shape[1], weight.numel()
        module.fused_product_backward(
            address(x, dtype, rows * d_in), address(grad, dtype, rows * d_out), x.shape[1], *weight.shape,
            address(weight, dtype, numbers), routes, top_k, *_routes(index, gate), code, width,
            torch.get_num_threads(), samples, address(packed, torch.float32, samples * (size // 4)),
            address(carry, torch.float32, numbers), address(grad_weight, dtype, numbers),
            address(grad_gate, torch.float32, routes * top_k),
        )  # fmt: skip
    return grad_x, _wanted(grad_weight, wanted[1]), _wanted(grad_gate, wanted[3])


def _wanted(grad: Tensor, wanted: bool) -> Tensor:
    return grad if wanted else grad.new_empty(0)


def _grouped_backward(
    grad: Tensor, x: Tensor, experts: LinearExperts, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Expert e, its samples b: z_b = dm_b W_e^T, dx_b += g_be z_b, dg_be = <x_b, z_b>, dW_e = (g x)^T dm."""
    weight, _, index, gate = experts
    pairs = _Pairs(index, weight.shape[0])
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
