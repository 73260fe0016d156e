"""Two-layer experts as grouped products over the (sample, chosen expert) pairs ``p = b*k + j``.

With ``h_p = act(x_b W1_e + c1_e)``: ``m(x_b) = sum_j g_p (h_p W2_e + c2_e)``. Gates are folded into the
hidden units and the k experts of a sample share one accumulator, so expert outputs [B*T, k, D] never exist.
W is H, the hidden width, or 2H for SwiGLU, where a program forms both halves of its units.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..experts import MLPExperts
from ._launch import PRECISIONS, Kind, cdiv, kind, launch
from ._tile import (
    activated,
    chosen,
    constants,
    expert_at,
    grouped_tile,
    halves,
    mlp_tile,
    pair_splits,
    product,
    sum_partials,
)
from .dispatch import dispatch, pairs_of


def forward(
    x: Tensor, experts: MLPExperts, gated: bool, keep: bool, schedule: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``m(x) [B, T, D]``, and ``x_b W1_e + c1_e [B, k, T, W]`` where kept, else empty.

    Arguments are contiguous. The schedule is that of ``dispatch``, which is called where there is none.
    """
    weight_in, bias_in, weight_out, bias_out, index, gate = experts
    (batch, tokens, size), top_k = x.shape, index.shape[1]
    num_experts, hidden, _ = weight_out.shape
    out, pre = experts.empty_outputs(x, keep)
    if x.numel() == 0:
        return out, pre
    if schedule is None:
        schedule = dispatch(index, num_experts)
    of_x = kind(x)
    units = torch.empty((batch, top_k, tokens, hidden), dtype=x.dtype, device=x.device)
    tile = mlp_tile("hidden", of_x, tokens, size, hidden, gated)
    launch(
        _hidden_kernel, batch * top_k * cdiv(tokens, tile.BLOCK_M) * cdiv(hidden, tile.BLOCK_N),
        x, weight_in, weight_in if bias_in is None else bias_in, index, gate, schedule,
        pre if keep else units, units, tokens, batch * top_k, D=size, H=hidden, M=num_experts, TOP_K=top_k,
        GATED=gated, BIAS=bias_in is not None, KEEP=keep, PRECISION=PRECISIONS[of_x.precision],
        **constants(tile),
    )  # fmt: skip
    _mixture(units, weight_out, bias_out, index, gate, schedule, of_x, out, transposed=False)
    return out, pre


def backward(
    grad: Tensor, x: Tensor, experts: MLPExperts, pre: Tensor, gated: bool, wanted: list[bool],
    schedule: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of x, weight_in, bias_in, weight_out, bias_out and gate; empty where not wanted."""
    weight_in, _, weight_out, bias_out, index, gate = experts
    (batch, tokens, size), top_k = x.shape, index.shape[1]
    num_experts, hidden, _ = weight_out.shape
    width = weight_in.shape[2]
    want_x, want_in, want_bias_in, want_out, want_bias_out, want_gate = wanted
    grads = experts.empty_gradients(x, wanted)
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    if schedule is None:
        schedule = dispatch(index, num_experts)
    of_x = kind(x)
    tile = mlp_tile("hidden_grad", of_x, tokens, size, hidden, gated)
    blocks_t, blocks_n = cdiv(tokens, tile.BLOCK_M), cdiv(hidden, tile.BLOCK_N)
    grad_pre = x.new_empty((batch, top_k, tokens, width) if want_x or want_in else 0)
    units = x.new_empty((batch, top_k, tokens, hidden) if want_out else 0)
    gates = gate.new_empty((blocks_t * blocks_n, batch, top_k) if want_gate else 0)
    sums_pre = gate.new_empty((batch * top_k, blocks_t, width) if want_bias_in else 0)
    sums_out = gate.new_empty((batch, blocks_t, size) if want_bias_out else 0)
    launch(
        _hidden_grad_kernel, batch * top_k * blocks_t * blocks_n,
        grad, weight_out, weight_out if bias_out is None else bias_out, index, gate, schedule, pre, grad_pre,
        units, gates, sums_pre, sums_out, tokens, batch * top_k,
        D=size, H=hidden, M=num_experts, TOP_K=top_k, GATED=gated, BIAS=bias_out is not None and want_gate,
        GRAD_PRE=want_x or want_in, UNITS=want_out, GRAD_GATE=want_gate, SUMS_PRE=want_bias_in,
        SUMS_OUT=want_bias_out, PRECISION=PRECISIONS[of_x.precision], **constants(tile),
    )  # fmt: skip
    if want_x:
        _mixture(grad_pre, weight_in, None, index, gate, schedule, of_x, grads[0], transposed=True)
    of_in = of_out = None
    if want_in:
        of_in = _weight_grad(x, grad_pre, schedule, batch, top_k, of_x, grads[1], top_k, 1)
    if want_out:
        of_out = _weight_grad(units, grad, schedule, batch, top_k, of_x, grads[3], 1, top_k)
    for wants, sums, scaled, out in (
        (want_bias_in, sums_pre, False, grads[2]),
        (want_bias_out, sums_out, True, grads[4]),
    ):
        if wants:
            _bias_grad(sums, schedule, index, gate, scaled, num_experts, out)
    sum_partials(of_in, of_out, (gates, grads[5]) if want_gate else None)
    return tuple(grads)


def _mixture(
    a: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, gate: Tensor, schedule: Tensor, of_x: Kind,
    out: Tensor, transposed: bool,
) -> None:  # fmt: skip
    """``sum_j a_bj W_e (+ g_bj c_e)``: a [B, k, T, K], weight [M, K, N] or, transposed, [M, N, K]."""
    batch, top_k, tokens, inner = a.shape
    size = out.shape[2]
    tile = mlp_tile("mixture", of_x, tokens, inner, size)
    launch(
        _mixture_kernel, batch * cdiv(tokens, tile.BLOCK_M) * cdiv(size, tile.BLOCK_N),
        a, weight, weight if bias is None else bias, index, gate, schedule, out, tokens, batch,
        N=size, K=inner, M=weight.shape[0], TOP_K=top_k, TRANSPOSED=transposed, BIAS=bias is not None,
        PRECISION=PRECISIONS[of_x.precision], **constants(tile),
    )  # fmt: skip


def _weight_grad(
    left: Tensor, right: Tensor, schedule: Tensor, batch: int, top_k: int, of_x: Kind, out: Tensor,
    left_per: int, right_per: int,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """``dW_e = sum_p left_(p // left_per)^T right_(p // right_per)`` over the pairs p of e.

    Where the pairs are split it returns the partial sums, and ``out``, which they add up to.
    """
    num_experts, rows, cols = out.shape
    tokens = left.shape[-2]
    tile = mlp_tile("weight_grad", of_x, tokens, rows, cols)
    tiles = num_experts * cdiv(rows, tile.BLOCK_M) * cdiv(cols, tile.BLOCK_N)
    splits = pair_splits(of_x, tiles, batch * top_k, out.numel())
    partial = out
    if splits > 1:
        partial = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
    launch(
        _weight_grad_kernel, tiles * splits, left, right, schedule, partial, batch, tokens, splits,
        D_LEFT=rows, D_RIGHT=cols, M=num_experts, TOP_K=top_k, LEFT_PER=left_per, RIGHT_PER=right_per,
        PRECISION=PRECISIONS[of_x.precision], **constants(tile),
    )  # fmt: skip
    return None if splits == 1 else (partial, out)


def _bias_grad(
    sums: Tensor, schedule: Tensor, index: Tensor, gate: Tensor, scaled: bool, num_experts: int, out: Tensor
) -> None:
    """Sums of token tiles, ``[B*k or B, tiles, N]``, to ``[M, N]``; ``scaled`` by the gates of the pairs."""
    count, blocks_t, cols = sums.shape
    batch, top_k = index.shape
    launch(
        _bias_grad_kernel, num_experts * cdiv(cols, 32), sums, schedule, index, gate, out, batch, blocks_t,
        N=cols, M=num_experts, TOP_K=top_k, PER=batch * top_k // count, SCALE=scaled, BLOCK_N=32, BLOCK_K=32,
        num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "num_pairs"])
def _hidden_kernel(
    x_ptr, weight_ptr, bias_ptr, index_ptr, gate_ptr, schedule_ptr, pre_ptr, units_ptr, tokens, num_pairs,
    D: tl.constexpr, H: tl.constexpr, M: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``pre_p = x_b W1_e + c1_e`` and ``units_p = g_p act(pre_p)``; pre is written with KEEP.

    A program owns BLOCK_M tokens by BLOCK_N hidden units of a pair; neighbours share the expert.
    """
    W: tl.constexpr = 2 * H if GATED else H
    blocks_t = tl.cdiv(tokens, BLOCK_M)
    row_tile, col_tile = grouped_tile(tl.program_id(0), num_pairs * blocks_t, (H + BLOCK_N - 1) // BLOCK_N)
    pairs_ptr, _ = pairs_of(schedule_ptr, num_pairs // TOP_K, TOP_K)
    pair = tl.load(pairs_ptr + row_tile // blocks_t).to(tl.int64)
    t0 = (row_tile % blocks_t) * BLOCK_M
    expert, gate = chosen(index_ptr, gate_ptr, pair, M)
    t, n = tl.arange(0, BLOCK_M), col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    a, b = product(
        x_ptr + ((pair // TOP_K) * tokens + t0) * D, t * D, t < tokens - t0, 0, weight_ptr + expert * (D * W),
        n, n < H, index_ptr, D, W, 1, D * W, H if GATED else 0, M, 1, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    row = pair * tokens + t0
    halves_a, halves_b = halves(a, BLOCK_M, BLOCK_N), halves(b, BLOCK_M, BLOCK_N)
    for half in tl.static_range(2):
        a, b = halves_a[half], halves_b[half]
        n = col_tile * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        mask = (t < tokens - t0)[:, None] & (n < H)[None, :]
        pre = pre_ptr + row * W + t[:, None] * W + n[None, :]
        if BIAS:
            a += tl.load(bias_ptr + expert * W + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
            if GATED:
                b += tl.load(bias_ptr + expert * W + H + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            tl.store(pre, a.to(pre_ptr.dtype.element_ty), mask=mask)
            if GATED:
                tl.store(pre + H, b.to(pre_ptr.dtype.element_ty), mask=mask)
        units, _, _ = activated(a, b, "swiglu" if GATED else "gelu")
        place = units_ptr + row * H + t[:, None] * H + n[None, :]
        tl.store(place, (gate * units).to(units_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "batch"])
def _mixture_kernel(
    a_ptr, weight_ptr, bias_ptr, index_ptr, gate_ptr, schedule_ptr, out_ptr, tokens, batch,
    N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, TOP_K: tl.constexpr, TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out_b = sum_j a_bj W_e (+ g_bj c_e)``, weights [M, K, N], or [M, N, K] with TRANSPOSED.

    This is the output from hidden units, and dx from the gradients before the activation. A program owns
    BLOCK_M tokens by BLOCK_N outputs of a sample; its one accumulator takes the k experts in turn.
    """
    blocks_t = tl.cdiv(tokens, BLOCK_M)
    row_tile, col_tile = grouped_tile(tl.program_id(0), batch * blocks_t, (N + BLOCK_N - 1) // BLOCK_N)
    sample = tl.load(schedule_ptr + row_tile // blocks_t).to(tl.int64)
    t0 = (row_tile % blocks_t) * BLOCK_M
    t, n = tl.arange(0, BLOCK_M), col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if TOP_K == 1:
        weight_ptr += expert_at(index_ptr + sample, M) * (K * N)
    out, _ = product(
        a_ptr + (sample * TOP_K * tokens + t0) * K, t * K, t < tokens - t0, tl.cast(tokens, tl.int64) * K,
        weight_ptr, n, n < N, index_ptr + sample * TOP_K, K, 1 if TRANSPOSED else N, K if TRANSPOSED else 1,
        K * N, 0, M, TOP_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if BIAS:
        for j in range(TOP_K):
            expert, gate = chosen(index_ptr, gate_ptr, sample * TOP_K + j, M)
            out += gate * tl.load(bias_ptr + expert * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    place = out_ptr + (sample * tokens + t0) * N + t[:, None] * N + n[None, :]
    mask = (t < tokens - t0)[:, None] & (n < N)[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "num_pairs"])
def _hidden_grad_kernel(
    grad_ptr, weight_ptr, bias_ptr, index_ptr, gate_ptr, schedule_ptr, pre_ptr, grad_pre_ptr, units_ptr,
    grad_gate_ptr, sums_pre_ptr, sums_out_ptr, tokens, num_pairs,
    D: tl.constexpr, H: tl.constexpr, M: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, GRAD_PRE: tl.constexpr, UNITS: tl.constexpr, GRAD_GATE: tl.constexpr,
    SUMS_PRE: tl.constexpr, SUMS_OUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dh = dy_b W2_e^T``; ``dpre = g dh act'(pre)``, ``dg = <act(pre), dh> + <sum_t dy_bt, c2_e>``.

    A program owns BLOCK_M tokens by BLOCK_N hidden units of a pair. It writes, where asked for, dpre, the
    units again (for dW2), its share of dg, and sums over its tokens of dpre and dy (for the biases). The
    programs of the same tokens share out the columns of dy for those sums.
    """
    W: tl.constexpr = 2 * H if GATED else H
    BLOCKS_N: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    blocks_t = tl.cdiv(tokens, BLOCK_M)
    row_tile, col_tile = grouped_tile(tl.program_id(0), num_pairs * blocks_t, BLOCKS_N)
    pairs_ptr, _ = pairs_of(schedule_ptr, num_pairs // TOP_K, TOP_K)
    pair = tl.load(pairs_ptr + row_tile // blocks_t).to(tl.int64)
    token_tile = row_tile % blocks_t
    t0 = token_tile * BLOCK_M
    expert, gate = chosen(index_ptr, gate_ptr, pair, M)
    sample = pair // TOP_K
    grad_ptr += (sample * tokens + t0) * D
    t, n = tl.arange(0, BLOCK_M), col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dh, _ = product(
        grad_ptr, t * D, t < tokens - t0, 0, weight_ptr + expert * (H * D), n, n < H, index_ptr,
        D, 1, D, H * D, 0, M, 1, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    row = pair * tokens + t0
    grad_gate = 0.0
    # Each half of the columns is finished before the next begins, for fewer registers are alive then.
    parts = halves(dh, BLOCK_M, BLOCK_N)
    for half in tl.static_range(2):
        dh = parts[half]
        n = col_tile * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        mask = (t < tokens - t0)[:, None] & (n < H)[None, :]
        pre = row * W + t[:, None] * W + n[None, :]
        a = tl.load(pre_ptr + pre, mask=mask, other=0.0).to(tl.float32)
        b = a
        if GATED:
            b = tl.load(pre_ptr + pre + H, mask=mask, other=0.0).to(tl.float32)
        # The units are formed again from the kept input of the activation: the forward need not keep both.
        units, slope_a, slope_b = activated(a, b, "swiglu" if GATED else "gelu")
        if UNITS:
            place = units_ptr + row * H + t[:, None] * H + n[None, :]
            tl.store(place, (gate * units).to(units_ptr.dtype.element_ty), mask=mask)
        if GRAD_GATE:
            grad_gate += tl.sum(units * dh)  # dh is not yet scaled: dg is the gradient of the gate itself
        dh *= gate
        sums = sums_pre_ptr + (pair * blocks_t + token_tile) * W + n
        if GRAD_PRE:
            tl.store(grad_pre_ptr + pre, (dh * slope_a).to(grad_pre_ptr.dtype.element_ty), mask=mask)
            if GATED:
                tl.store(grad_pre_ptr + pre + H, (dh * slope_b).to(grad_pre_ptr.dtype.element_ty), mask=mask)
        if SUMS_PRE:
            tl.store(sums, tl.sum(dh * slope_a, 0), mask=n < H)
            if GATED:
                tl.store(sums + H, tl.sum(dh * slope_b, 0), mask=n < H)
    # c2_e is added after the product, so its part of dg, and db2, need only the sum of dy over the tokens.
    # Each program of these tokens sums every BLOCKS_N-th chunk of columns, and no chunk is read twice.
    if BIAS or SUMS_OUT:
        for d0 in range(col_tile * BLOCK_K, D, BLOCKS_N * BLOCK_K):
            d = d0 + tl.arange(0, BLOCK_K)
            dy_mask = (t < tokens - t0)[:, None] & (d < D)[None, :]
            dy = tl.load(grad_ptr + t[:, None] * D + d[None, :], mask=dy_mask, other=0.0)
            total = tl.sum(dy.to(tl.float32), 0)
            if BIAS:
                c = tl.load(bias_ptr + expert * D + d, mask=d < D, other=0.0)
                grad_gate += tl.sum(total * c.to(tl.float32))
            if SUMS_OUT and pair % TOP_K == 0:  # the k pairs of a sample share dy: the first writes its sums
                tl.store(sums_out_ptr + (sample * blocks_t + token_tile) * D + d, total, mask=d < D)
    if GRAD_GATE:
        tl.store(
            grad_gate_ptr + (token_tile * BLOCKS_N + col_tile).to(tl.int64) * num_pairs + pair, grad_gate
        )


@triton.jit(do_not_specialize=["batch", "tokens", "splits"])
def _weight_grad_kernel(
    left_ptr, right_ptr, schedule_ptr, out_ptr, batch, tokens, splits,
    D_LEFT: tl.constexpr, D_RIGHT: tl.constexpr, M: tl.constexpr, TOP_K: tl.constexpr, LEFT_PER: tl.constexpr,
    RIGHT_PER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out_e = sum_p left_l^T right_r`` over the pairs p of expert e, l = p // LEFT_PER, r = p // RIGHT_PER.

    left [.., T, D_LEFT] and right [.., T, D_RIGHT] belong to a pair (PER = 1) or to its sample (PER = k). A
    program owns [BLOCK_M, BLOCK_N] of one expert, over one of ``splits`` parts of its pairs. Tokens run
    through from pair to pair in a single loop, and each step loads the pair of the next, as in _product.
    """
    BLOCKS_I: tl.constexpr = (D_LEFT + BLOCK_M - 1) // BLOCK_M
    BLOCKS_O: tl.constexpr = (D_RIGHT + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = BLOCKS_I * BLOCKS_O
    part = tl.program_id(0) // TILES
    row_tile, col_tile = grouped_tile(tl.program_id(0) % TILES, BLOCKS_I, BLOCKS_O)
    expert, split = part % M, part // M
    i, o = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_K)
    pairs_ptr, offsets_ptr = pairs_of(schedule_ptr, batch, TOP_K)
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    length = tl.cdiv(end - begin, splits)
    begin = tl.minimum(begin + split * length, end)
    count = tl.minimum(begin + length, end) - begin
    pair = tl.load(pairs_ptr + begin, mask=count > 0, other=0)
    steps = tl.cdiv(tokens, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(count * steps):
        t0 = (step % steps) * BLOCK_K
        left_row = (pair // LEFT_PER).to(tl.int64) * tokens + t0
        right_row = (pair // RIGHT_PER).to(tl.int64) * tokens + t0
        left_mask = (t < tokens - t0)[None, :] & (i < D_LEFT)[:, None]
        right_mask = (t < tokens - t0)[:, None] & (o < D_RIGHT)[None, :]
        left_tile = left_ptr + left_row * D_LEFT + t[None, :] * D_LEFT + i[:, None]
        right_tile = right_ptr + right_row * D_RIGHT + t[:, None] * D_RIGHT + o[None, :]
        left = tl.load(left_tile, mask=left_mask, other=0.0)
        right = tl.load(right_tile, mask=right_mask, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        pair = tl.load(pairs_ptr + begin + tl.minimum((step + 1) // steps, count - 1))
    place = out_ptr + part.to(tl.int64) * (D_LEFT * D_RIGHT) + i[:, None] * D_RIGHT + o[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=(i < D_LEFT)[:, None] & (o < D_RIGHT)[None, :])


@triton.jit(do_not_specialize=["batch", "blocks_t"])
def _bias_grad_kernel(
    sums_ptr, schedule_ptr, index_ptr, gate_ptr, out_ptr, batch, blocks_t,
    N: tl.constexpr, M: tl.constexpr, TOP_K: tl.constexpr, PER: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out_e = sum_p sum_u s_p sums[p // PER, u]`` over pairs p of e and token tiles u; s_p the gate, or 1.

    A program owns BLOCK_N columns of one expert and takes BLOCK_K of its sums at a time.
    """
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(0) // BLOCKS_N
    n = (tl.program_id(0) % BLOCKS_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    pairs_ptr, offsets_ptr = pairs_of(schedule_ptr, batch, TOP_K)
    begin = tl.load(offsets_ptr + expert)
    count = (tl.load(offsets_ptr + expert + 1) - begin) * blocks_t
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_K):
        r = start + tl.arange(0, BLOCK_K)
        pair = tl.load(pairs_ptr + begin + r // blocks_t, mask=r < count, other=0)
        row = (pair // PER).to(tl.int64) * blocks_t + r % blocks_t
        mask = (r < count)[:, None] & (n < N)[None, :]
        sums = tl.load(sums_ptr + row[:, None] * N + n[None, :], mask=mask, other=0.0)
        if SCALE:
            _, gate = chosen(index_ptr, gate_ptr, pair, M)
            sums *= tl.where(r < count, gate, 0.0)[:, None]  # lanes past the end read slot 0
        total += tl.sum(sums, 0)
    tl.store(out_ptr + expert * N + n, total.to(out_ptr.dtype.element_ty), mask=n < N)
