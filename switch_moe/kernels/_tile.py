"""What the product kernels share: sizes of tiles, device code on them, and the sum of partial results."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Kind, cdiv, launch


class Tile(NamedTuple):
    """The sizes of a program's product and how Triton schedules it."""

    BLOCK_M: int  # rows of the result
    BLOCK_N: int  # columns of the result
    BLOCK_K: int  # the part of the inner dimension that a step multiplies
    num_warps: int
    num_stages: int


@functools.cache
def constants(tile: Tile) -> dict[str, Any]:
    """The tile as the last arguments of a launch."""
    return tile._asdict()


def narrow(precision: str, *sizes: int) -> bool:
    """Whether rows of these sizes are no multiples of 16 bytes.

    Loads then take fewer bytes at a time and more registers, so tiles are smaller.
    """
    return any(size % (8 if precision == "half" else 4) for size in sizes)


PARTIAL_BYTES = 256 << 20
"""The most that the partial sums of a weight's gradient take; more than one part of them, that is."""


@functools.cache
def mlp_tile(kernel: str, of_x: Kind, tokens: int, inner: int, columns: int, gated: bool = False) -> Tile:
    """The tile of ``kernel`` (hidden, mixture, hidden_grad or weight_grad) for rows of these sizes.

    Chosen from the compiled code: nothing spills, and on sm_90 two programs of GELU's hidden, of mixture and
    of weight_grad fit an SM, so that one multiplies while the other writes.
    """
    arch, in_float32 = of_x.architecture, of_x.precision != "half"
    large_epilogue = gated and kernel in ("hidden", "hidden_grad")
    if narrow(of_x.precision, inner, columns):
        tile = Tile(64, 64, 16 if in_float32 else 32, 8, 2)
    elif in_float32:
        tile = Tile(64, 64, 16, 8, 3) if of_x.precision == "ieee" else Tile(128, 128, 32, 8, 3)
    elif arch < 90 or arch >= 120:  # at most 99 KB of shared memory, no asynchronous tensor cores
        tile = Tile(128, 64 if large_epilogue else 128, 32, 8, 4)
    else:
        tile = Tile(128, 128, 64, 8, 3)
    if kernel == "weight_grad":
        return tile._replace(BLOCK_K=min(tile.BLOCK_K, max(16, triton.next_power_of_2(tokens))))
    if tile.BLOCK_M > 64 >= tokens:
        half = large_epilogue or (in_float32 and kernel == "hidden_grad")
        return tile._replace(BLOCK_M=64, BLOCK_N=64 if half else 128, num_warps=4)
    return tile


def pair_splits(of_x: Kind, tiles: int, pairs: int, size: int) -> int:
    """Into how many parts the pairs of an expert are split, by shapes and the device alone: enough programs
    for the device, about four for each multiprocessor, and at most PARTIAL_BYTES of ``size`` numbers.
    """
    return max(1, min(16, pairs, 4 * of_x.multiprocessors // tiles, PARTIAL_BYTES // (4 * size)))


@triton.jit
def chosen(index_ptr, gate_ptr, slot, M: tl.constexpr):
    """Expert and gate of a slot. An index out of range is expert 0 with a gate of NaN: no stray read."""
    expert = tl.load(index_ptr + slot)
    inside = (expert >= 0) & (expert < M)
    gate = tl.where(inside, tl.load(gate_ptr + slot), float("nan"))
    return tl.where(inside, expert, 0).to(tl.int64), gate


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of the columns: an epilogue for each in turn holds fewer registers."""
    return tl.split(tl.permute(tl.reshape(tile, [BLOCK_M, 2, BLOCK_N // 2]), (0, 2, 1)))


@triton.jit
def quarters(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The columns in four parts, from left to right."""
    left, right = halves(tile, BLOCK_M, BLOCK_N)
    first, second = halves(left, BLOCK_M, BLOCK_N // 2)
    third, fourth = halves(right, BLOCK_M, BLOCK_N // 2)
    return first, second, third, fourth


@triton.jit
def grouped_tile(pid, row_tiles, COL_TILES: tl.constexpr):
    """Row and column tile of a program: groups of 8 row tiles pass over the columns, so that weights and rows
    that are read at the same time fit the L2 cache."""
    group = pid // (8 * COL_TILES)
    rows = tl.minimum(8, row_tiles - group * 8)
    inside = pid - group * (8 * COL_TILES)
    return group * 8 + inside % rows, inside // rows


@triton.jit
def expert_at(index_ptr, M: tl.constexpr):
    return tl.minimum(tl.maximum(tl.load(index_ptr), 0), M - 1).to(tl.int64)


@triton.jit
def product(
    a_ptr, a_rows, row_mask, a_slot, weight_ptr, columns, column_mask, index_ptr,
    K: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_N: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    M: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``sum_j a_j W_e(j)`` over the slots, a tile [BLOCK_M, BLOCK_N] of it in float32; with HALF > 0 also
    for the columns HALF further on.

    The rows of a_j, of K numbers, begin ``j * a_slot + a_rows`` after a_ptr. A weight has SIZE numbers,
    STRIDE_K and STRIDE_N apart along the inner and the column axis; with one slot weight_ptr is that of its
    expert, else expert e(j) is at index_ptr + j. All slots share a single loop. Each step loads the expert of
    the next; if it loaded its own, the pipeline of tiles would lose a stage.
    """
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    i = tl.arange(0, BLOCK_K)
    a_tile = a_rows[:, None] + i[None, :]
    weight_tile = i[:, None] * STRIDE_K + columns[None, :] * STRIDE_N
    first = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    second = first
    expert = 0
    if SLOTS > 1:
        expert = expert_at(index_ptr, M)
    for step in range(SLOTS * STEPS):
        slot = step // STEPS
        k0 = (step % STEPS) * BLOCK_K
        a_mask, weight_mask = row_mask[:, None], column_mask[None, :]
        if K % BLOCK_K != 0:
            a_mask = row_mask[:, None] & (i < K - k0)[None, :]
            weight_mask = weight_mask & (i < K - k0)[:, None]
        a = tl.load(a_ptr + slot * a_slot + k0 + a_tile, mask=a_mask, other=0.0)
        w_ptr = weight_ptr + expert * SIZE + k0 * STRIDE_K + weight_tile
        first = tl.dot(a, tl.load(w_ptr, mask=weight_mask, other=0.0), first, input_precision=PRECISION)
        if HALF > 0:
            w = tl.load(w_ptr + HALF * STRIDE_N, mask=weight_mask, other=0.0)
            second = tl.dot(a, w, second, input_precision=PRECISION)
        if SLOTS > 1:
            expert = expert_at(index_ptr + tl.minimum((step + 1) // STEPS, SLOTS - 1), M)
    return first, second


@triton.jit
def activated(a, b, ACTIVATION: tl.constexpr):
    """``act`` and its derivatives in a and b, in float32; a gated unit has two numbers before it."""
    if ACTIVATION == "swiglu":  # SiLU(a) b
        s = tl.sigmoid(a)
        value = a * s * b
        slope_a = (s + a * s * (1 - s)) * b
        slope_b = a * s
    elif ACTIVATION == "swiglu_second":  # a SiLU(b)
        s = tl.sigmoid(b)
        value = a * s * b
        slope_a = b * s
        slope_b = (s + b * s * (1 - s)) * a
    elif ACTIVATION == "gelu":  # in its tanh form
        # 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2/pi) (a + 0.044715 a^3)
        s = tl.sigmoid(a * (1.5957691216057308 + 0.07135481282553837 * a * a))
        value = a * s
        slope_a = s + a * s * (1 - s) * (1.5957691216057308 + 0.21406443847661511 * a * a)
        slope_b = slope_a
    elif ACTIVATION == "gelu_erf":
        s = 0.5 + 0.5 * tl.erf(a * 0.7071067811865476)
        value = a * s
        slope_a = s + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)  # the density of a normal number
        slope_b = slope_a
    else:
        tl.static_assert(ACTIVATION == "relu")
        value = tl.maximum(a, 0.0)
        slope_a = (a > 0).to(tl.float32)
        slope_b = slope_a
    return value, slope_a, slope_b


def sum_partials(*sums: tuple[Tensor, Tensor] | None) -> None:
    """``out = partial.sum(0)`` for up to three pairs (partial, out), in one launch and in a fixed order.

    The third is for few numbers and many partials: a program takes 32 of them at once, for 64 numbers.
    """
    given = [pair for pair in sums if pair is not None]
    if not given:
        return
    arguments: list[Any] = []
    programs = 0
    for number in range(3):
        pair = sums[number] if number < len(sums) else None
        partial, out = given[0] if pair is None else pair
        size = 0 if pair is None else out.numel()
        arguments += [partial, out, partial.shape[0], size]
        programs += cdiv(size, _SUM_FEW if number == 2 else _SUM_MANY)
    launch(_sum_kernel, programs, *arguments, FEW=_SUM_FEW, MANY=_SUM_MANY, num_warps=4)


_SUM_FEW, _SUM_MANY = 64, 1024  # numbers that a program sums


@triton.jit
def _sum_block(partial_ptr, out_ptr, count, size, program, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``out[i] = sum_s partial[s, i]`` for the BLOCK numbers of a program, ROWS partials at a time."""
    i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, ROWS):
        s = (start + row)[:, None]
        mask = (s < count) & (i < size)[None, :]
        total += tl.sum(tl.load(partial_ptr + s.to(tl.int64) * size + i[None, :], mask=mask, other=0.0), 0)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["count_0", "size_0", "count_1", "size_1", "count_2", "size_2"])
def _sum_kernel(
    partial_0, out_0, count_0, size_0, partial_1, out_1, count_1, size_1, partial_2, out_2, count_2, size_2,
    FEW: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Three sums one after the other; a program belongs to one of them."""
    program = tl.program_id(0)
    after_0 = tl.cdiv(size_0, MANY)
    after_1 = after_0 + tl.cdiv(size_1, MANY)
    if program < after_0:
        _sum_block(partial_0, out_0, count_0, size_0, program, 4, MANY)
    elif program < after_1:
        _sum_block(partial_1, out_1, count_1, size_1, program - after_0, 4, MANY)
    else:
        _sum_block(partial_2, out_2, count_2, size_2, program - after_1, 32, FEW)
