"""What the product kernels share: sizes of tiles, device code on them, and the sum of partial results."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch


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


PARTIAL_BYTES = 256 << 20
"""The most that the partial sums of a weight's gradient take; more than one part of them, that is."""


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
