"""A stable counting sort of (row, chosen expert) pairs by expert, in three launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch


@triton.jit
def _one_hot(index_ptr, first, pairs, M: tl.constexpr, ROWS: tl.constexpr, MP: tl.constexpr):
    """[ROWS, MP] int32: 1 where a pair has an expert. What is no expert, or no pair, has none."""
    lane = tl.arange(0, ROWS)
    index = tl.load(index_ptr + first + lane, mask=lane < pairs - first, other=-1)
    expert = tl.arange(0, MP)[None, :]
    return ((index[:, None] == expert) & (expert < M)).to(tl.int32)


@triton.jit(do_not_specialize=["pairs"])
def _count_kernel(
    index_ptr, counts_ptr, pairs,
    M: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """``counts[block, e]``, the pairs of each expert among the BLOCK that a program owns, ROWS at a time."""
    first = tl.program_id(0) * BLOCK
    total = tl.zeros([MP], tl.int32)
    for start in range(0, tl.minimum(BLOCK, pairs - first), ROWS):
        total += tl.sum(_one_hot(index_ptr, first + start, pairs, M, ROWS, MP), 0)
    expert = tl.arange(0, MP)
    tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * M + expert, total, mask=expert < M)


@triton.jit(do_not_specialize=["blocks"])
def _scan_kernel(
    counts_ptr, totals_ptr, blocks, M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """``counts[block, e]`` becomes the sum over the blocks before, and ``totals[e]`` that over all of them.

    A program owns COLUMNS experts, and takes ROWS blocks at a time.
    """
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, ROWS)[:, None]
    before = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, blocks, ROWS):
        place = counts_ptr + (start + lane).to(tl.int64) * M + expert[None, :]
        mask = (lane < blocks - start) & (expert < M)[None, :]
        counts = tl.load(place, mask=mask, other=0)
        tl.store(place, tl.cumsum(counts, 0) - counts + before[None, :], mask=mask)
        before += tl.sum(counts, 0)
    tl.store(totals_ptr + expert, before, mask=expert < M)


@triton.jit(do_not_specialize=["pairs"])
def _place_kernel(
    index_ptr, counts_ptr, totals_ptr, offsets_ptr, pair_ptr, slot_ptr, pairs,
    M: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """A pair comes after those of lower experts, and after those of its own that have lower numbers.

    A program owns BLOCK pairs, ROWS at a time, and carries along where the next pair of each expert goes.
    Pairs of no expert come last. The first program writes the offsets, too.
    """
    first = tl.program_id(0) * BLOCK
    expert = tl.arange(0, MP)
    totals = tl.load(totals_ptr + expert, mask=expert < M, other=0)
    ends = tl.cumsum(totals, 0)
    if tl.program_id(0) == 0:
        tl.store(offsets_ptr + expert, ends - totals, mask=expert < M)
        tl.store(offsets_ptr + expert + 1, ends, mask=expert == M - 1)
    before = tl.load(counts_ptr + tl.program_id(0).to(tl.int64) * M + expert, mask=expert < M, other=0)
    # The place of a pair of no expert: those with one, then those of none among the pairs before.
    none = tl.sum(totals, 0) + first - tl.sum(before, 0)
    before += ends - totals
    lane = tl.arange(0, ROWS)
    for start in range(0, tl.minimum(BLOCK, pairs - first), ROWS):
        mine = _one_hot(index_ptr, first + start, pairs, M, ROWS, MP)
        has = tl.sum(mine, 1)
        place = tl.sum(mine * (tl.cumsum(mine, 0) + before[None, :]), 1) - 1
        place = tl.where(has > 0, place, none + lane - tl.cumsum(has, 0))
        mask = lane < pairs - first - start
        tl.store(pair_ptr + place, first + start + lane, mask=mask)
        tl.store(slot_ptr + first + start + lane, tl.where(has > 0, place, -1), mask=mask)
        before += tl.sum(mine, 0)
        none += ROWS - tl.sum(has, 0)


_BLOCK = 512  # pairs of a program
_NUMBERS = 2048  # of a tile of pairs and experts: 16 for a thread


def route_pairs(expert_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets [M + 1], pairs by expert [R S] and slots [R, S] of ``expert_index [R, S]``, all int32.

    An index that is no expert counts as none. The work is M R S comparisons: it is meant for up to a few
    hundred experts.
    """
    pairs = expert_index.numel()
    blocks = cdiv(pairs, _BLOCK)
    shapes = ((num_experts + 1,), (pairs,), expert_index.shape, (blocks, num_experts), (num_experts,))
    offsets, pair, slot, counts, totals = (
        torch.empty(shape, dtype=torch.int32, device=expert_index.device) for shape in shapes
    )
    padded = triton.next_power_of_2(num_experts)
    rows = min(_BLOCK, max(1, _NUMBERS // padded))
    tile = {"M": num_experts, "BLOCK": _BLOCK, "ROWS": rows, "MP": padded, "num_warps": 4}
    launch(_count_kernel, blocks, expert_index, counts, pairs, **tile)
    launch(
        _scan_kernel, cdiv(num_experts, 8), counts, totals, blocks, M=num_experts, ROWS=128, COLUMNS=8,
        num_warps=4,
    )  # fmt: skip
    launch(_place_kernel, blocks, expert_index, counts, totals, offsets, pair, slot, pairs, **tile)
    return offsets, pair, slot
