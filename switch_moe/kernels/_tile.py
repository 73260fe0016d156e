"""What the product kernels share: sizes of tiles, device code on them, and the sum of partial results."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch


class Tile(NamedTuple):
    """The sizes of a program's product and how Triton schedules it; ``_asdict()`` is the end of a launch."""

    BLOCK_M: int  # rows of the result
    BLOCK_N: int  # columns of the result
    BLOCK_K: int  # the part of the inner dimension that a step multiplies
    num_warps: int
    num_stages: int


@triton.jit
def chosen(index_ptr, gate_ptr, slot, M: tl.constexpr):
    """Expert and gate of one slot. An index out of range becomes a NaN gate: seen, and no stray read."""
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


def sum_first(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """``[S, ...]`` summed over S in a fixed order, as ``dtype``; as it is where S is 1 and the type fits."""
    if partial.shape[0] == 1 and partial.dtype == dtype:
        return partial[0]
    out = partial.new_empty(partial.shape[1:], dtype=dtype)
    rows = min(32, triton.next_power_of_2(partial.shape[0]))
    block = 2048 // rows
    launch(
        _sum_kernel, cdiv(out.numel(), block), partial, out, partial.shape[0], out.numel(),
        ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(partial_ptr, out_ptr, count, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``out[i] = sum_s partial[s, i]``, ROWS of them at a time in a fixed order; a program owns BLOCK i."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, ROWS):
        s = (start + row)[:, None]
        mask = (s < count) & (i < size)[None, :]
        total += tl.sum(tl.load(partial_ptr + s.to(tl.int64) * size + i[None, :], mask=mask, other=0.0), 0)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)
