"""Two-layer experts over routes: ragged products over the pairs of each expert, then a sum for each row.

With ``h_p = act(x_r W1_e + c1_e)`` for the row r and the expert e of a pair p: ``out_r = base_r + sum_p g_p
(h_p W2_e + c2_e)``. Rows are gathered where they are read. What the pairs add, ``[P, D]``, is written and
summed up in the order of the slots; it is not kept. Only the device knows how many pairs an expert has: a
launch has programs for the most tiles that P pairs of M experts can make, and those without one return.
W is H, the hidden width, or 2H for SwiGLU, where a program forms both halves of its units.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..experts import RoutedExperts
from ._launch import PRECISIONS, Kind, cdiv, kind, launch
from ._tile import (
    activated,
    constants,
    grouped_tile,
    halves,
    mlp_tile,
    pair_splits,
    product,
    quarters,
    sum_partials,
)


def _row_tiles(pairs: int, num_experts: int, rows: int) -> int:
    """The most tiles of ``rows`` pairs, each of one expert: ``sum_e ceil(n_e / rows)`` is at most this."""
    return min(pairs, pairs // rows + num_experts)


def _experts(offsets: Tensor) -> dict[str, int]:
    """M, and the lanes that hold a number for each expert."""
    num_experts = offsets.shape[0] - 1
    return {"M": num_experts, "M_PAD": max(2, triton.next_power_of_2(num_experts))}


def forward(
    x: Tensor, experts: RoutedExperts, base: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """``[R, D]``, and ``x_r W1_e + c1_e [P, W]`` where kept, else empty. Arguments are contiguous."""
    weight_in, bias_in, weight_out, bias_out, offsets, row, slot, gate = experts
    size, pairs = x.shape[1], row.shape[0]
    num_experts, hidden, _ = weight_out.shape
    out, pre = experts.empty_outputs(x, keep)
    if x.numel() == 0:
        return out, pre
    of_x, gated = kind(x), activation.startswith("swiglu")
    units = torch.empty((pairs, hidden), dtype=x.dtype, device=x.device)
    tile = mlp_tile("hidden", of_x, cdiv(pairs, num_experts), size, hidden, gated)
    row_tiles = _row_tiles(pairs, num_experts, tile.BLOCK_M)
    launch(
        _hidden_kernel, row_tiles * cdiv(hidden, tile.BLOCK_N),
        x, weight_in, weight_in if bias_in is None else bias_in, offsets, row, pre if keep else units, units,
        row_tiles, D=size, H=hidden, **_experts(offsets), ACTIVATION=activation, GATED=gated,
        BIAS=bias_in is not None, KEEP=keep, PRECISION=PRECISIONS[of_x.precision], **constants(tile),
    )  # fmt: skip
    _product_and_combine(units, weight_out, bias_out, gate, offsets, slot, base, of_x, out, transposed=False)
    return out, pre


def backward(
    grad: Tensor, x: Tensor, experts: RoutedExperts, pre: Tensor, activation: str, wanted: list[bool]
) -> tuple[Any, ...]:
    """Gradients of x, weight_in, bias_in, weight_out, bias_out and gate; empty where not wanted."""
    weight_in, _, weight_out, bias_out, offsets, row, slot, gate = experts
    size, pairs = x.shape[1], row.shape[0]
    num_experts, hidden, _ = weight_out.shape
    width = weight_in.shape[2]
    want_x, want_in, want_bias_in, want_out, want_bias_out, want_gate = wanted
    grads = experts.empty_gradients(x, wanted)
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    of_x, gated = kind(x), activation.startswith("swiglu")
    tile = mlp_tile("hidden_grad", of_x, cdiv(pairs, num_experts), size, hidden, gated)
    row_tiles, blocks_n = _row_tiles(pairs, num_experts, tile.BLOCK_M), cdiv(hidden, tile.BLOCK_N)
    grad_pre = x.new_empty((pairs, width) if want_x or want_in else 0)
    units = x.new_empty((pairs, hidden) if want_out else 0)
    gates = gate.new_zeros((blocks_n, pairs) if want_gate else 0)  # nobody writes those of padding
    sums_pre = gate.new_empty((row_tiles, width) if want_bias_in else 0)
    sums_out = gate.new_empty((row_tiles, size) if want_bias_out else 0)
    launch(
        _hidden_grad_kernel, row_tiles * blocks_n,
        grad, weight_out, weight_out if bias_out is None else bias_out, offsets, row, gate, pre, grad_pre,
        units, gates, sums_pre, sums_out, row_tiles, pairs,
        D=size, H=hidden, **_experts(offsets), ACTIVATION=activation, GATED=gated,
        BIAS=bias_out is not None and want_gate, GRAD_PRE=want_x or want_in, UNITS=want_out,
        GRAD_GATE=want_gate, SUMS_PRE=want_bias_in, SUMS_OUT=want_bias_out,
        PRECISION=PRECISIONS[of_x.precision], **constants(tile),
    )  # fmt: skip
    if want_x:
        _product_and_combine(
            grad_pre, weight_in, None, None, offsets, slot, None, of_x, grads[0], transposed=True
        )
    of_in = _weight_grad(x, grad_pre, offsets, row, of_x, grads[1], left_of_rows=True) if want_in else None
    of_out = _weight_grad(units, grad, offsets, row, of_x, grads[3], left_of_rows=False) if want_out else None
    for wants, sums, out in ((want_bias_in, sums_pre, grads[2]), (want_bias_out, sums_out, grads[4])):
        if wants:
            columns = out.shape[1]
            launch(
                _bias_grad_kernel, num_experts * cdiv(columns, 32), sums, offsets, out, N=columns,
                **_experts(offsets), TILE_ROWS=tile.BLOCK_M, BLOCK_N=32, BLOCK_K=32, num_warps=4,
            )  # fmt: skip
    sum_partials(of_in, of_out, (gates, grads[5]) if want_gate else None)
    return tuple(grads)


def _product_and_combine(
    a: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, offsets: Tensor, slot: Tensor,
    base: Tensor | None, of_x: Kind, out: Tensor, transposed: bool,
) -> None:  # fmt: skip
    """``base_r + sum_p g_p (a_p W_e + c_e)``: a [P, K], weight [M, K, N] or, transposed, [M, N, K]."""
    pairs, inner = a.shape
    size, num_experts = out.shape[1], weight.shape[0]
    tile = mlp_tile("mixture", of_x, cdiv(pairs, num_experts), inner, size)
    row_tiles = _row_tiles(pairs, num_experts, tile.BLOCK_M)
    of_pairs = torch.empty((pairs, size), dtype=out.dtype, device=out.device)
    launch(
        _product_kernel, row_tiles * cdiv(size, tile.BLOCK_N),
        a, weight, weight if bias is None else bias, offsets if gate is None else gate, offsets, of_pairs,
        row_tiles, N=size, K=inner, **_experts(offsets), TRANSPOSED=transposed, BIAS=bias is not None,
        SCALE=gate is not None, PRECISION=PRECISIONS[of_x.precision], **constants(tile),
    )  # fmt: skip
    launch(
        _combine_kernel, out.shape[0] * cdiv(size, 512), of_pairs, slot, out if base is None else base, out,
        N=size, SLOTS=slot.shape[1], BASE=base is not None, BLOCK_N=512, num_warps=2,
    )  # fmt: skip


def _weight_grad(
    left: Tensor, right: Tensor, offsets: Tensor, row: Tensor, of_x: Kind, out: Tensor, left_of_rows: bool
) -> tuple[Tensor, Tensor] | None:
    """``dW_e = sum_p left_p^T right_p`` over the pairs p of e, where one of the two is that of the row of p.

    Where the pairs are split it returns the partial sums, and ``out``, which they add up to.
    """
    num_experts, rows, cols = out.shape
    pairs = row.shape[0]
    tile = mlp_tile("weight_grad", of_x, cdiv(pairs, num_experts), rows, cols)
    tiles = num_experts * cdiv(rows, tile.BLOCK_M) * cdiv(cols, tile.BLOCK_N)
    splits = pair_splits(of_x, tiles, cdiv(pairs, 4 * tile.BLOCK_K), out.numel())
    partial = out
    if splits > 1:
        partial = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
    launch(
        _weight_grad_kernel, tiles * splits, left, right, offsets, row, partial, splits,
        D_LEFT=rows, D_RIGHT=cols, M=num_experts, LEFT_OF_ROWS=left_of_rows,
        PRECISION=PRECISIONS[of_x.precision], **constants(tile),
    )  # fmt: skip
    return None if splits == 1 else (partial, out)


@triton.jit
def _tiles_of_experts(offsets_ptr, M: tl.constexpr, M_PAD: tl.constexpr, ROWS: tl.constexpr):
    """How many tiles of ROWS pairs each expert has."""
    e = tl.arange(0, M_PAD)
    begin = tl.load(offsets_ptr + e, mask=e < M, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < M, other=0)
    return tl.cdiv(end - begin, ROWS)


@triton.jit
def _pairs_of_tile(offsets_ptr, number, M: tl.constexpr, M_PAD: tl.constexpr, ROWS: tl.constexpr):
    """Expert, first pair and pairs of a tile; where there is no such tile, the expert is at least M."""
    tiles = _tiles_of_experts(offsets_ptr, M, M_PAD, ROWS)
    after = tl.cumsum(tiles, 0)
    expert = tl.sum((after <= number).to(tl.int32), 0)
    inside = number - tl.max(tl.where(after <= number, after, 0), 0)
    begin = tl.load(offsets_ptr + tl.minimum(expert, M - 1)) + inside * ROWS
    end = tl.load(offsets_ptr + tl.minimum(expert, M - 1) + 1)
    return expert.to(tl.int64), begin.to(tl.int64), tl.minimum(end - begin, ROWS)


@triton.jit(do_not_specialize=["row_tiles"])
def _hidden_kernel(
    x_ptr, weight_ptr, bias_ptr, offsets_ptr, row_ptr, pre_ptr, units_ptr, row_tiles,
    D: tl.constexpr, H: tl.constexpr, M: tl.constexpr, M_PAD: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``pre_p = x_row(p) W1_e + c1_e`` and ``units_p = act(pre_p)``; pre is written with KEEP.

    A program owns BLOCK_M pairs of an expert by BLOCK_N hidden units.
    """
    W: tl.constexpr = 2 * H if GATED else H
    row_tile, col_tile = grouped_tile(tl.program_id(0), row_tiles, (H + BLOCK_N - 1) // BLOCK_N)
    expert, pair, count = _pairs_of_tile(offsets_ptr, row_tile, M, M_PAD, BLOCK_M)
    if expert >= M:
        return
    p, n = tl.arange(0, BLOCK_M), col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(row_ptr + pair + p, mask=p < count, other=0).to(tl.int64)
    a, b = product(
        x_ptr, row * D, p < count, 0, weight_ptr + expert * (D * W), n, n < H, offsets_ptr,
        D, W, 1, D * W, H if GATED else 0, M, 1, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    halves_a, halves_b = halves(a, BLOCK_M, BLOCK_N), halves(b, BLOCK_M, BLOCK_N)
    for half in tl.static_range(2):
        a, b = halves_a[half], halves_b[half]
        n = col_tile * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        mask = (p < count)[:, None] & (n < H)[None, :]
        pre = pre_ptr + pair * W + p[:, None] * W + n[None, :]
        if BIAS:
            a += tl.load(bias_ptr + expert * W + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
            if GATED:
                b += tl.load(bias_ptr + expert * W + H + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            tl.store(pre, a.to(pre_ptr.dtype.element_ty), mask=mask)
            if GATED:
                tl.store(pre + H, b.to(pre_ptr.dtype.element_ty), mask=mask)
        units, _, _ = activated(a, b, ACTIVATION)
        place = units_ptr + pair * H + p[:, None] * H + n[None, :]
        tl.store(place, units.to(units_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["row_tiles"])
def _product_kernel(
    a_ptr, weight_ptr, bias_ptr, gate_ptr, offsets_ptr, out_ptr, row_tiles,
    N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, M_PAD: tl.constexpr, TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out_p = g_p (a_p W_e + c_e)``, weights [M, K, N], or [M, N, K] with TRANSPOSED.

    This is what a pair adds to the output, from hidden units, and to dx, from the gradients before the
    activation. A program owns BLOCK_M pairs of an expert by BLOCK_N columns.
    """
    row_tile, col_tile = grouped_tile(tl.program_id(0), row_tiles, (N + BLOCK_N - 1) // BLOCK_N)
    expert, pair, count = _pairs_of_tile(offsets_ptr, row_tile, M, M_PAD, BLOCK_M)
    if expert >= M:
        return
    p, n = tl.arange(0, BLOCK_M), col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    out, _ = product(
        a_ptr + pair * K, p * K, p < count, 0, weight_ptr + expert * (K * N), n, n < N, offsets_ptr,
        K, 1 if TRANSPOSED else N, K if TRANSPOSED else 1, K * N, 0, M, 1, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if BIAS:
        out += tl.load(bias_ptr + expert * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if SCALE:
        out *= tl.load(gate_ptr + pair + p, mask=p < count, other=0.0)[:, None]
    place = out_ptr + pair * N + p[:, None] * N + n[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=(p < count)[:, None] & (n < N)[None, :])


@triton.jit
def _combine_kernel(
    pairs_ptr, slot_ptr, base_ptr, out_ptr,
    N: tl.constexpr, SLOTS: tl.constexpr, BASE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``out_r = base_r + sum_s pairs[slot_rs]`` in the order of the slots, of which those below 0 are empty.

    A program owns BLOCK_N columns of a row, and asks for four pairs at a time.
    """
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // BLOCKS_N).to(tl.int64)
    n = (tl.program_id(0) % BLOCKS_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    if BASE:
        total += tl.load(base_ptr + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    for s in tl.range(0, SLOTS, loop_unroll_factor=4):
        pair = tl.load(slot_ptr + row * SLOTS + s).to(tl.int64)
        mask = n < tl.where(pair >= 0, N, 0)
        total += tl.load(pairs_ptr + pair * N + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + n, total.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["row_tiles", "pairs"])
def _hidden_grad_kernel(
    grad_ptr, weight_ptr, bias_ptr, offsets_ptr, row_ptr, gate_ptr, pre_ptr, grad_pre_ptr, units_ptr,
    grad_gate_ptr, sums_pre_ptr, sums_out_ptr, row_tiles, pairs,
    D: tl.constexpr, H: tl.constexpr, M: tl.constexpr, M_PAD: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, GRAD_PRE: tl.constexpr, UNITS: tl.constexpr,
    GRAD_GATE: tl.constexpr, SUMS_PRE: tl.constexpr, SUMS_OUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dh = dy_row(p) W2_e^T``; ``dpre = g dh act'(pre)``, ``dg = <act(pre), dh> + <dy_row(p), c2_e>``.

    A program owns BLOCK_M pairs of an expert by BLOCK_N hidden units. It writes, where asked for, dpre, the
    units times their gates (for dW2), its share of dg, and sums over its pairs of dpre and g dy (for the
    biases). The programs of the same pairs share out the columns of dy for those sums.
    """
    W: tl.constexpr = 2 * H if GATED else H
    BLOCKS_N: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    row_tile, col_tile = grouped_tile(tl.program_id(0), row_tiles, BLOCKS_N)
    expert, pair, count = _pairs_of_tile(offsets_ptr, row_tile, M, M_PAD, BLOCK_M)
    if expert >= M:
        return
    p, n = tl.arange(0, BLOCK_M), col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(row_ptr + pair + p, mask=p < count, other=0).to(tl.int64) * D
    dh, _ = product(
        grad_ptr, row, p < count, 0, weight_ptr + expert * (H * D), n, n < H, offsets_ptr,
        D, 1, D, H * D, 0, M, 1, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    gate = tl.load(gate_ptr + pair + p, mask=p < count, other=0.0)
    grad_gate = tl.zeros([BLOCK_M], tl.float32)
    # Each quarter of the columns is finished before the next begins, for fewer registers are alive then.
    parts = quarters(dh, BLOCK_M, BLOCK_N)
    for quarter in tl.static_range(4):
        dh = parts[quarter]
        n = col_tile * BLOCK_N + quarter * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        mask = (p < count)[:, None] & (n < H)[None, :]
        pre = pair * W + p[:, None] * W + n[None, :]
        a = tl.load(pre_ptr + pre, mask=mask, other=0.0).to(tl.float32)
        b = a
        if GATED:
            b = tl.load(pre_ptr + pre + H, mask=mask, other=0.0).to(tl.float32)
        # The units are formed again from the kept input of the activation: the forward need not keep both.
        units, slope_a, slope_b = activated(a, b, ACTIVATION)
        if UNITS:
            of_units = units_ptr + pair * H + p[:, None] * H + n[None, :]
            tl.store(of_units, (gate[:, None] * units).to(units_ptr.dtype.element_ty), mask=mask)
        if GRAD_GATE:
            grad_gate += tl.sum(units * dh, 1)  # dh is not yet scaled: dg is the gradient of the gate itself
        dh *= gate[:, None]
        sums = sums_pre_ptr + row_tile.to(tl.int64) * W + n
        if GRAD_PRE:
            tl.store(grad_pre_ptr + pre, (dh * slope_a).to(grad_pre_ptr.dtype.element_ty), mask=mask)
            if GATED:
                tl.store(grad_pre_ptr + pre + H, (dh * slope_b).to(grad_pre_ptr.dtype.element_ty), mask=mask)
        if SUMS_PRE:
            tl.store(sums, tl.sum(dh * slope_a, 0), mask=n < H)
            if GATED:
                tl.store(sums + H, tl.sum(dh * slope_b, 0), mask=n < H)
    # Each program of these pairs takes every BLOCKS_N-th chunk of the columns of dy: none is read twice.
    if BIAS or SUMS_OUT:
        for d0 in range(col_tile * BLOCK_K, D, BLOCKS_N * BLOCK_K):
            d = d0 + tl.arange(0, BLOCK_K)
            dy_mask = (p < count)[:, None] & (d < D)[None, :]
            dy = tl.load(grad_ptr + row[:, None] + d[None, :], mask=dy_mask, other=0.0).to(tl.float32)
            if BIAS:
                c = tl.load(bias_ptr + expert * D + d, mask=d < D, other=0.0).to(tl.float32)
                grad_gate += tl.sum(dy * c[None, :], 1)
            if SUMS_OUT:
                total = tl.sum(gate[:, None] * dy, 0)
                tl.store(sums_out_ptr + row_tile.to(tl.int64) * D + d, total, mask=d < D)
    if GRAD_GATE:
        place = grad_gate_ptr + col_tile.to(tl.int64) * pairs + pair + p
        tl.store(place, grad_gate, mask=p < count)


@triton.jit(do_not_specialize=["splits"])
def _weight_grad_kernel(
    left_ptr, right_ptr, offsets_ptr, row_ptr, out_ptr, splits,
    D_LEFT: tl.constexpr, D_RIGHT: tl.constexpr, M: tl.constexpr, LEFT_OF_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out_e = sum_p left_p^T right_p`` over the pairs p of expert e.

    One of left [.., D_LEFT] and right [.., D_RIGHT] is read at the row of a pair, by LEFT_OF_ROWS, the other
    at the pair itself. A program owns [BLOCK_M, BLOCK_N] of one expert, over one of ``splits`` parts of its
    pairs. Each step loads the rows of the next; with its own the pipeline of tiles would lose a stage.
    """
    BLOCKS_I: tl.constexpr = (D_LEFT + BLOCK_M - 1) // BLOCK_M
    BLOCKS_O: tl.constexpr = (D_RIGHT + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = BLOCKS_I * BLOCKS_O
    part = tl.program_id(0) // TILES
    row_tile, col_tile = grouped_tile(tl.program_id(0) % TILES, BLOCKS_I, BLOCKS_O)
    expert, split = part % M, part // M
    i, o = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    length = tl.cdiv(end - begin, splits)
    begin = tl.minimum(begin + split * length, end)
    end = tl.minimum(begin + length, end)
    row = tl.load(row_ptr + begin + k, mask=k < end - begin, other=0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(begin, end, BLOCK_K):
        inside = k < end - first
        left_row = (row if LEFT_OF_ROWS else first + k).to(tl.int64) * D_LEFT
        right_row = (first + k if LEFT_OF_ROWS else row).to(tl.int64) * D_RIGHT
        left_mask = inside[None, :] & (i < D_LEFT)[:, None]
        right_mask = inside[:, None] & (o < D_RIGHT)[None, :]
        left = tl.load(left_ptr + left_row[None, :] + i[:, None], mask=left_mask, other=0.0)
        right = tl.load(right_ptr + right_row[:, None] + o[None, :], mask=right_mask, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        row = tl.load(row_ptr + first + BLOCK_K + k, mask=k < end - first - BLOCK_K, other=0)
    place = out_ptr + part.to(tl.int64) * (D_LEFT * D_RIGHT) + i[:, None] * D_RIGHT + o[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=(i < D_LEFT)[:, None] & (o < D_RIGHT)[None, :])


@triton.jit
def _bias_grad_kernel(
    sums_ptr, offsets_ptr, out_ptr,
    N: tl.constexpr, M: tl.constexpr, M_PAD: tl.constexpr, TILE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out_e``, the sum over the tiles of expert e, of TILE_ROWS pairs, of ``sums [tiles, N]``.

    A program owns BLOCK_N columns of one expert and takes BLOCK_K of its sums at a time.
    """
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(0) // BLOCKS_N
    n = (tl.program_id(0) % BLOCKS_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles, e = _tiles_of_experts(offsets_ptr, M, M_PAD, TILE_ROWS), tl.arange(0, M_PAD)
    begin = tl.sum(tl.where(e < expert, tiles, 0), 0)
    count = tl.sum(tl.where(e == expert, tiles, 0), 0)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_K):
        t = start + tl.arange(0, BLOCK_K)
        mask = (t < count)[:, None] & (n < N)[None, :]
        place = sums_ptr + (begin + t).to(tl.int64)[:, None] * N + n[None, :]
        total += tl.sum(tl.load(place, mask=mask, other=0.0), 0)
    tl.store(out_ptr + expert * N + n, total.to(out_ptr.dtype.element_ty), mask=n < N)
