"""Linear experts, merged on chip: the forward, the gradient of x, and those of weight, bias and gates.

``m(x_b) = x_b V_b + v_b``, ``V_b = sum_j g_bj W_j``: one product per sample whatever k is. The merged tile
is formed in registers in float32, rounded once, and never reaches DRAM. Where Din and Dout are multiples of
8, loads take 16 bytes at a time; other sizes run too, with narrower and so slower loads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..experts import LinearExperts
from . import expert_linear_tiles as tiles
from ._launch import PRECISIONS, Kind, cdiv, kind, launch
from ._tile import chosen, constants, quarters, sum_partials
from .dispatch import dispatch, pairs_of

_UNROLLED = tl.constexpr(tiles.UNROLLED)


def forward(
    x: Tensor, experts: LinearExperts, modulate: bool, keep: bool, schedule: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(m(x) or x * (1 + m(x)), m(x) where modulated and kept, else empty)``; arguments contiguous.

    The schedule is that of ``dispatch``, which is called where there is none.
    """
    weight, bias, index, gate = experts
    (batch, tokens, d_in), (num_experts, _, d_out) = x.shape, weight.shape
    out, mixture = experts.empty_outputs(x, keep)
    if x.numel() == 0 or weight.numel() == 0:
        return out.zero_(), mixture.zero_()
    top_k, of_x = index.shape[1], kind(x)
    tile = tiles.product_tile(of_x, batch, tokens, d_in, d_out, top_k, False)
    launch(
        _forward_kernel, batch * cdiv(tokens, tile.BLOCK_M) * cdiv(d_out, tile.BLOCK_N),
        x, weight, weight if bias is None else bias, index, gate,
        dispatch(index, num_experts) if schedule is None else schedule, out, mixture if keep else out, tokens,
        D_IN=d_in, D_OUT=d_out, M=num_experts, TOP_K=top_k, BIAS=bias is not None, MODULATE=modulate,
        KEEP=keep, PRECISION=PRECISIONS[of_x.precision], **constants(tile),
    )  # fmt: skip
    return out, mixture


def backward(
    grad: Tensor, x: Tensor, experts: LinearExperts, mixture: Tensor | None, modulate: bool,
    wanted: list[bool], schedule: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of x, weight, bias and gate; empty where not wanted. ``mixture``: m(x) where modulated."""
    grads = experts.empty_gradients(x, wanted)
    if x.numel() == 0 or experts.weight.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    if schedule is None:
        schedule = dispatch(experts.expert_index, len(experts.weight))
    of_x = kind(x)
    if wanted[0]:
        _grad_x(grad, x, experts, mixture, modulate, schedule, of_x, grads[0])
    if any(wanted[1:]):
        grad_weight(grad, x, experts, modulate, schedule, of_x, grads, wanted)
    return tuple(grads)


def _grad_x(
    grad: Tensor, x: Tensor, experts: LinearExperts, mixture: Tensor | None, modulate: bool, schedule: Tensor,
    of_x: Kind, grad_x: Tensor,
) -> None:  # fmt: skip
    weight, _, index, gate = experts
    (batch, tokens, d_in), (num_experts, _, d_out) = x.shape, weight.shape
    top_k = index.shape[1]
    tile = tiles.product_tile(of_x, batch, tokens, d_out, d_in, top_k, True)
    launch(
        _grad_x_kernel, batch * cdiv(tokens, tile.BLOCK_M) * cdiv(d_in, tile.BLOCK_N),
        grad, x, x if mixture is None else mixture, weight, index, gate, schedule, grad_x, tokens,
        D_IN=d_in, D_OUT=d_out, M=num_experts, TOP_K=top_k, MODULATE=modulate,
        PRECISION=PRECISIONS[of_x.precision], **constants(tile),
    )  # fmt: skip


def grad_weight(
    grad: Tensor, x: Tensor, experts: LinearExperts, modulate: bool, schedule: Tensor, of_x: Kind,
    grads: list[Tensor], wanted: list[bool],
) -> None:  # fmt: skip
    """Fills the gradients of weight, bias and gate. Those that are not wanted are formed, and left aside."""
    weight, bias, index, gate = experts
    (batch, tokens, d_in), (num_experts, _, d_out) = x.shape, weight.shape
    top_k, device = index.shape[1], x.device
    each = num_experts > tiles.MAX_ACCUMULATORS
    tile = tiles.weight_tile(of_x, num_experts, d_in, d_out)
    count = cdiv(d_in, tile.BLOCK_M) * cdiv(d_out, tile.BLOCK_N)
    samples = cdiv(batch * top_k, num_experts) if each else batch  # of one program, about
    flops = 2.0 * samples * tokens * tile.BLOCK_M * tile.BLOCK_N
    programs = count * num_experts if each else count
    splits = tiles.sample_splits(of_x, programs, samples, flops, weight.numel())
    with_bias = bias is not None
    partial = torch.float32 if splits > 1 else weight.dtype
    weights, biases = grads[1], grads[2]
    if splits > 1 or not wanted[1]:
        weights = torch.empty((splits, *weight.shape), dtype=partial, device=device)
    if with_bias and (splits > 1 or not wanted[2]):
        biases = torch.empty((splits, num_experts, d_out), dtype=partial, device=device)
    gates = torch.empty((count, batch, top_k), dtype=torch.float32, device=device)
    launch(
        _grad_each_weight_kernel if each else _grad_weights_kernel, programs * splits,
        grad, x, weight, bias if with_bias else weight, index, gate, schedule, weights, biases, gates, batch,
        tokens, splits, D_IN=d_in, D_OUT=d_out, M=num_experts, TOP_K=top_k, BIAS=with_bias, MODULATE=modulate,
        PRECISION=PRECISIONS[of_x.precision], **constants(tile),
    )  # fmt: skip
    sum_partials(
        (weights, grads[1]) if splits > 1 and wanted[1] else None,
        (biases, grads[2]) if splits > 1 and wanted[2] and with_bias else None,
        (gates, grads[3]) if wanted[3] else None,
    )


@triton.jit
def _all_chosen(index_ptr, gate_ptr, sample, M: tl.constexpr, TOP_K: tl.constexpr, ALWAYS: tl.constexpr):
    """Experts and gates of a sample as tuples; empty where k is large, but ALWAYS."""
    experts = ()
    gates = ()
    if ALWAYS or TOP_K <= _UNROLLED:
        for j in tl.static_range(TOP_K):
            expert, gate = chosen(index_ptr, gate_ptr, sample * TOP_K + j, M)
            experts = experts + (expert,)  # type: ignore[assignment]  # noqa: RUF005  no unpacking in Triton
            gates = gates + (gate,)  # type: ignore[assignment]  # noqa: RUF005
    return experts, gates


@triton.jit
def _merge(
    ptr, experts, gates, index_ptr, gate_ptr, sample, offset, mask,
    STRIDE: tl.constexpr, M: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """``sum_j gate_j tile_j`` in float32, the tiles ``STRIDE * expert_j`` apart."""
    merged = tl.zeros(offset.shape, tl.float32)
    if TOP_K <= _UNROLLED:
        for j in tl.static_range(TOP_K):
            tile = tl.load(ptr + experts[j] * STRIDE + offset, mask=mask, other=0.0)
            merged += gates[j] * tile.to(tl.float32)
    else:
        for j in range(TOP_K):
            expert, gate = chosen(index_ptr, gate_ptr, sample * TOP_K + j, M)
            tile = tl.load(ptr + expert * STRIDE + offset, mask=mask, other=0.0)
            merged += gate * tile.to(tl.float32)
    return merged


@triton.jit
def _sample_tile(schedule_ptr, tokens, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sample, first token and first of N columns of a program: neighbours share x, then the experts."""
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    rest, column_block = tl.program_id(0) // BLOCKS_N, tl.program_id(0) % BLOCKS_N
    blocks_t = tl.cdiv(tokens, BLOCK_M)
    sample = tl.load(schedule_ptr + rest // blocks_t).to(tl.int64)
    return sample, (rest % blocks_t) * BLOCK_M, column_block * BLOCK_N


@triton.jit
def _grad_mixture(grad_ptr, x_ptr, place, mask, MODULATE: tl.constexpr):
    """``dm = dr * x`` formed on load; dm is the gradient itself where the output was m."""
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0)
    if MODULATE:
        grad = grad * tl.load(x_ptr + place, mask=mask, other=0.0)
    return grad


@triton.jit
def _merged_product(
    a_ptr, x_ptr, row, rows, weight_ptr, n0, experts, gates, index_ptr, gate_ptr, sample,
    K: tl.constexpr, N: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_N: tl.constexpr, M: tl.constexpr,
    TOP_K: tl.constexpr, MODULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``a V_b``, a tile [BLOCK_M, BLOCK_N] of it in float32; with MODULATE ``(a x) V_b``.

    a [.., K] has ``rows`` rows from ``row`` on. V_b [K, N] is merged from weights whose numbers are STRIDE_K
    and STRIDE_N apart along its axes, so that dx reads them transposed.
    """
    t, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_mask = (t < rows)[:, None]
    column_mask = (n0 + n < N)[None, :]
    a_tile = row * K + t[:, None] * K + k[None, :]
    # n0 stands outside the tile: as part of a vector it costs the forward registers and, for k > 4, spills.
    weight_tile = n0 * STRIDE_N + k[:, None] * STRIDE_K + n[None, :] * STRIDE_N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a_mask, weight_mask = row_mask, column_mask
        if K % BLOCK_K != 0:
            a_mask = row_mask & (k < K - k0)[None, :]
            weight_mask = column_mask & (k < K - k0)[:, None]
        a = _grad_mixture(a_ptr, x_ptr, a_tile + k0, a_mask, MODULATE)
        merged = _merge(
            weight_ptr, experts, gates, index_ptr, gate_ptr, sample, weight_tile + k0 * STRIDE_K, weight_mask,
            K * N, M, TOP_K,
        )  # fmt: skip
        total = tl.dot(a, merged.to(a.dtype), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, index_ptr, gate_ptr, schedule_ptr, out_ptr, mixture_ptr, tokens,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, M: tl.constexpr, TOP_K: tl.constexpr, BIAS: tl.constexpr,
    MODULATE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``m = x_b V_b + v_b``, and ``x (1 + m)`` with MODULATE; m is written too with KEEP.

    A program owns [BLOCK_M, BLOCK_N] of a sample's output; it reads k weight tiles for each x tile.
    """
    sample, t0, n0 = _sample_tile(schedule_ptr, tokens, D_OUT, BLOCK_M, BLOCK_N)
    experts, gates = _all_chosen(index_ptr, gate_ptr, sample, M, TOP_K, False)
    row = sample * tokens + t0
    mixture = _merged_product(
        x_ptr, x_ptr, row, tokens - t0, weight_ptr, n0, experts, gates, index_ptr, gate_ptr, sample,
        D_IN, D_OUT, D_OUT, 1, M, TOP_K, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    t = tl.arange(0, BLOCK_M)
    token_mask = (t < tokens - t0)[:, None]
    PART: tl.constexpr = BLOCK_N // 4
    parts = quarters(mixture, BLOCK_M, BLOCK_N)
    for part in tl.static_range(4):  # one at a time: the epilogue of a whole tile spills at 256 x 128
        m = parts[part]
        column = n0 + part * PART + tl.arange(0, PART)
        if BIAS:
            m += _merge(
                bias_ptr, experts, gates, index_ptr, gate_ptr, sample, column, column < D_OUT, D_OUT, M, TOP_K
            )[None, :]
        place = row * D_OUT + t[:, None] * D_OUT + column[None, :]
        mask = token_mask & (column < D_OUT)[None, :]
        if KEEP:
            tl.store(mixture_ptr + place, m.to(mixture_ptr.dtype.element_ty), mask=mask)
        if MODULATE:
            x_out = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
            m = x_out + x_out * m
        tl.store(out_ptr + place, m.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _grad_x_kernel(
    grad_ptr, x_ptr, mixture_ptr, weight_ptr, index_ptr, gate_ptr, schedule_ptr, grad_x_ptr, tokens,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, M: tl.constexpr, TOP_K: tl.constexpr, MODULATE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dx_b = dm_b V_b^T``, and with MODULATE ``dm = dr x``, ``dx += dr (1 + m)``.

    A program owns [BLOCK_M, BLOCK_N] of a sample's gradient.
    """
    sample, t0, n0 = _sample_tile(schedule_ptr, tokens, D_IN, BLOCK_M, BLOCK_N)
    experts, gates = _all_chosen(index_ptr, gate_ptr, sample, M, TOP_K, False)
    row = sample * tokens + t0
    total = _merged_product(
        grad_ptr, x_ptr, row, tokens - t0, weight_ptr, n0, experts, gates, index_ptr, gate_ptr, sample,
        D_OUT, D_IN, 1, D_OUT, M, TOP_K, MODULATE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    t = tl.arange(0, BLOCK_M)
    token_mask = (t < tokens - t0)[:, None]
    PART: tl.constexpr = BLOCK_N // 4
    parts = quarters(total, BLOCK_M, BLOCK_N)
    for part in tl.static_range(4):
        dx = parts[part]
        column = n0 + part * PART + tl.arange(0, PART)
        place = row * D_IN + t[:, None] * D_IN + column[None, :]
        mask = token_mask & (column < D_IN)[None, :]
        if MODULATE:
            grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
            dx += grad + grad * tl.load(mixture_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + place, dx.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_tokens(
    p, s, grad_ptr, x_ptr, row, count, i0, n0, owns_bias,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, MODULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """P and s with up to BLOCK_K tokens more, ``count`` of which, from ``row`` on, are the sample's."""
    t, i, n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    token_mask = (t < count)[:, None]
    x_tile = row * D_IN + i0 + t[:, None] * D_IN + i[None, :]
    x = tl.load(x_ptr + x_tile, mask=token_mask & (i0 + i < D_IN)[None, :], other=0.0)
    grad_tile = row * D_OUT + n0 + t[:, None] * D_OUT + n[None, :]
    dm = _grad_mixture(grad_ptr, x_ptr, grad_tile, token_mask & (n0 + n < D_OUT)[None, :], MODULATE)
    p = tl.dot(tl.trans(x), dm, p, input_precision=PRECISION)
    if owns_bias:
        s += tl.sum(dm.to(tl.float32), 0)
    return p, s


@triton.jit
def _add_scaled(weights, biases, p, s, experts, gates, M: tl.constexpr, TOP_K: tl.constexpr):
    """The accumulators of all M experts, with ``gate_e P`` and ``gate_e s`` more for those chosen.

    The others take nothing, not P times 0, which would be NaN where P is not finite.
    """
    new_weights = ()
    new_biases = ()
    for e in tl.static_range(M):
        gate = 0.0
        is_chosen = False
        for j in tl.static_range(TOP_K):
            gate += tl.where(experts[j] == e, gates[j], 0.0)
            is_chosen |= experts[j] == e
        weight = weights[e] + gate * tl.where(is_chosen, p, 0.0)
        bias = biases[e] + gate * tl.where(is_chosen, s, 0.0)
        new_weights = new_weights + (weight,)  # type: ignore[assignment]  # noqa: RUF005
        new_biases = new_biases + (bias,)  # type: ignore[assignment]  # noqa: RUF005
    return new_weights, new_biases


@triton.jit(do_not_specialize=["batch", "tokens", "splits"])
def _grad_weights_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, index_ptr, gate_ptr, schedule_ptr, grad_weight_ptr, grad_bias_ptr,
    grad_gate_ptr, batch, tokens, splits,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, M: tl.constexpr, TOP_K: tl.constexpr, BIAS: tl.constexpr,
    MODULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``P_b = x_b^T dm_b``, ``s_b = sum_t dm_bt``: ``dW_e = sum_b g_be P_b``, ``db_e = sum_b g_be s_b``,
    ``dg_be = <P_b, W_e> + <s_b, b_e>``; for M <= 4.

    A program owns [BLOCK_M, BLOCK_N] of every expert, in M accumulators, over every splits-th sample; those
    of the first rows own db too. It writes the share of its tile in each dg. Steps over tokens run on from
    sample to sample, so that loads are under way while a sample is finished.
    """
    BLOCKS_N: tl.constexpr = (D_OUT + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = BLOCKS_N * ((D_IN + BLOCK_M - 1) // BLOCK_M)
    tile, split = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    n0, i0 = (tile % BLOCKS_N) * BLOCK_N, (tile // BLOCKS_N) * BLOCK_M
    i, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_mask, column_mask = i0 + i < D_IN, n0 + n < D_OUT
    place = (i0 + i)[:, None] * D_OUT + (n0 + n)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    owns_bias = (i0 == 0) & BIAS
    weights = ()
    biases = ()
    for _ in tl.static_range(M):  # tuples, because Triton cannot index a tensor that is in registers
        weights = weights + (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        biases = biases + (tl.zeros([BLOCK_N], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    steps = tl.cdiv(tokens, BLOCK_K)
    # A nested loop would drain the pipeline of loads at the end of every sample; this single one does not.
    for step in range(tl.cdiv(batch - split, splits) * steps):
        sample = split + (step // steps) * splits
        t0 = (step % steps) * BLOCK_K
        row = sample.to(tl.int64) * tokens + t0
        p, s = _add_tokens(
            p, s, grad_ptr, x_ptr, row, tokens - t0, i0, n0, owns_bias,
            D_IN, D_OUT, MODULATE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if t0 + BLOCK_K >= tokens:
            # P is complete here. First it meets the chosen weights: <P, W_e> is this tile's share of dg.
            experts, gates = _all_chosen(index_ptr, gate_ptr, sample, M, TOP_K, True)
            for j in tl.static_range(TOP_K):
                w = tl.load(weight_ptr + experts[j] * (D_IN * D_OUT) + place, mask=mask, other=0.0)
                grad_gate = tl.sum(p * w.to(tl.float32))
                if owns_bias:
                    b = tl.load(bias_ptr + experts[j] * D_OUT + n0 + n, mask=column_mask, other=0.0)
                    grad_gate += tl.sum(s * b.to(tl.float32))
                tl.store(grad_gate_ptr + (tile.to(tl.int64) * batch + sample) * TOP_K + j, grad_gate)
            # Then every accumulator takes P, with gate 0 where the sample did not choose the expert.
            weights, biases = _add_scaled(weights, biases, p, s, experts, gates, M, TOP_K)
            p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            s = tl.zeros([BLOCK_N], tl.float32)
    # Each split writes a copy of its own, which sum_partials adds in a fixed order: atomics would not repeat.
    dtype = grad_weight_ptr.dtype.element_ty
    grad_weight_ptr += split.to(tl.int64) * (M * D_IN * D_OUT)
    grad_bias_ptr += split * (M * D_OUT) + n0 + n
    for e in tl.static_range(M):
        tl.store(grad_weight_ptr + e * (D_IN * D_OUT) + place, weights[e].to(dtype), mask=mask)
        if owns_bias:  # type: ignore[unreachable]  # mypy takes weights for the empty tuple
            tl.store(grad_bias_ptr + e * D_OUT, biases[e].to(dtype), mask=column_mask)


@triton.jit(do_not_specialize=["batch", "tokens", "splits"])
def _grad_each_weight_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, index_ptr, gate_ptr, schedule_ptr, grad_weight_ptr, grad_bias_ptr,
    grad_gate_ptr, batch, tokens, splits,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, M: tl.constexpr, TOP_K: tl.constexpr, BIAS: tl.constexpr,
    MODULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same sums for any M: a program owns [BLOCK_M, BLOCK_N] of one expert, over every splits-th of its
    pairs.

    P is formed for each pair, so products cost k units in place of one; accumulators do not grow with M.
    """
    BLOCKS_N: tl.constexpr = (D_OUT + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = BLOCKS_N * ((D_IN + BLOCK_M - 1) // BLOCK_M)
    tile = tl.program_id(0) % TILES
    expert = (tl.program_id(0) // TILES) % M
    split = tl.program_id(0) // (TILES * M)
    n0, i0 = (tile % BLOCKS_N) * BLOCK_N, (tile // BLOCKS_N) * BLOCK_M
    i, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_mask, column_mask = i0 + i < D_IN, n0 + n < D_OUT
    place = expert.to(tl.int64) * (D_IN * D_OUT) + (i0 + i)[:, None] * D_OUT + (n0 + n)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    owns_bias = (i0 == 0) & BIAS
    grad_weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    grad_bias = tl.zeros([BLOCK_N], tl.float32)
    p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    # Splits take turns, so that their counts of pairs differ by one at most, whatever the routing is. A split
    # without pairs runs no step and writes zeros.
    pairs_ptr, offsets_ptr = pairs_of(schedule_ptr, batch, TOP_K)
    first = tl.load(offsets_ptr + expert) + split
    count = tl.cdiv(tl.maximum(tl.load(offsets_ptr + expert + 1) - first, 0), splits)
    steps = tl.cdiv(tokens, BLOCK_K)
    for step in range(count * steps):
        pair = tl.load(pairs_ptr + first + (step // steps) * splits)
        t0 = (step % steps) * BLOCK_K
        row = (pair // TOP_K).to(tl.int64) * tokens + t0
        p, s = _add_tokens(
            p, s, grad_ptr, x_ptr, row, tokens - t0, i0, n0, owns_bias,
            D_IN, D_OUT, MODULATE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if t0 + BLOCK_K >= tokens:
            # Every pair belongs to one program of this tile, so its share of dg is written once.
            _, gate = chosen(index_ptr, gate_ptr, pair, M)
            w = tl.load(weight_ptr + place, mask=mask, other=0.0)
            grad_gate = tl.sum(p * w.to(tl.float32))
            if owns_bias:
                b = tl.load(bias_ptr + expert * D_OUT + n0 + n, mask=column_mask, other=0.0)
                grad_gate += tl.sum(s * b.to(tl.float32))
            tl.store(grad_gate_ptr + tile.to(tl.int64) * batch * TOP_K + pair, grad_gate)
            grad_weight += gate * p
            grad_bias += gate * s
            p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            s = tl.zeros([BLOCK_N], tl.float32)
    dtype = grad_weight_ptr.dtype.element_ty
    grad_weight_ptr += split.to(tl.int64) * (M * D_IN * D_OUT)
    tl.store(grad_weight_ptr + place, grad_weight.to(dtype), mask=mask)
    if owns_bias:
        bias_row = (split * M + expert) * D_OUT
        tl.store(grad_bias_ptr + bias_row + n0 + n, grad_bias.to(dtype), mask=column_mask)
