"""The schedule of a batch: samples and (sample, expert) pairs in the order that shares weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch

_BLOCK = 64


def dispatch(expert_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts on the device, into shapes that do not depend on the routing.

    Args:
        expert_index: ``[B, k]`` int32, contiguous.
        num_experts: M. Indices out of range count as the nearest expert.

    Returns:
        int32 ``order [B]``: samples, those with the same set of experts together; ``pairs [B*k]``: pairs
        ``b*k + j`` by expert, then by number; ``offsets [M+1]``: the pairs of expert e are
        ``pairs[offsets[e]:offsets[e+1]]``.
    """
    batch, top_k = expert_index.shape
    order, pairs, offsets = (
        torch.empty(n, dtype=torch.int32, device=expert_index.device)
        for n in (batch, batch * top_k, num_experts + 1)
    )
    if batch == 0:
        return order, pairs, offsets.zero_()
    programs = cdiv(batch, _BLOCK) + cdiv(batch * top_k, _BLOCK)
    launch(
        _dispatch_kernel, programs, expert_index, order, pairs, offsets, batch, TOP_K=top_k, M=num_experts,
        M_PAD=max(2, triton.next_power_of_2(num_experts)), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return order, pairs, offsets


@triton.jit
def _sample_key(index_ptr, sample, mask, M: tl.constexpr, TOP_K: tl.constexpr):
    """The set of a sample's experts as bits; more than 31 experts may share bits: only locality."""
    key = tl.zeros(sample.shape, tl.int32)
    for j in range(TOP_K):  # not unrolled: k loads at once would spill
        expert = tl.load(index_ptr + sample.to(tl.int64) * TOP_K + j, mask=mask, other=0)
        expert = tl.minimum(tl.maximum(expert, 0), M - 1) % 31
        key = key | (tl.full(sample.shape, 1, tl.int32) << expert)
    return key


@triton.jit
def _pair_key(index_ptr, pair, mask, M: tl.constexpr):
    expert = tl.load(index_ptr + pair, mask=mask, other=0)
    return tl.minimum(tl.maximum(expert, 0), M - 1)


@triton.jit(do_not_specialize=["batch"])
def _dispatch_kernel(
    index_ptr, order_ptr, pairs_ptr, offsets_ptr, batch,
    TOP_K: tl.constexpr, M: tl.constexpr, M_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A counting sort: ``rank(i) = #{i': key(i') < key(i), or equal and i' < i}``; position rank(i) gets i.

    A program ranks BLOCK samples, or BLOCK pairs, against all; the last one also counts the offsets.
    """
    pid = tl.program_id(0)
    sample_programs = tl.cdiv(batch, BLOCK)
    lane = tl.arange(0, BLOCK)
    if pid < sample_programs:
        mine = pid * BLOCK + lane
        key = _sample_key(index_ptr, mine, mine < batch, M, TOP_K)
        rank = tl.zeros([BLOCK], tl.int32)
        for start in range(0, batch, BLOCK):
            other = start + lane
            other_key = _sample_key(index_ptr, other, other < batch, M, TOP_K)
            before = (other_key[None, :] < key[:, None]) | (
                (other_key[None, :] == key[:, None]) & (other[None, :] < mine[:, None])
            )
            rank += tl.sum((before & (other < batch)[None, :]).to(tl.int32), 1)
        tl.store(order_ptr + rank, mine, mask=mine < batch)
    else:
        count = batch * TOP_K
        mine = (pid - sample_programs) * BLOCK + lane
        key = _pair_key(index_ptr, mine, mine < count, M)
        rank = tl.zeros([BLOCK], tl.int32)
        bound = tl.arange(0, M_PAD)
        below = tl.zeros([M_PAD], tl.int32)
        for start in range(0, count, BLOCK):
            other = start + lane
            other_key = _pair_key(index_ptr, other, other < count, M)
            before = (other_key[None, :] < key[:, None]) | (
                (other_key[None, :] == key[:, None]) & (other[None, :] < mine[:, None])
            )
            rank += tl.sum((before & (other < count)[None, :]).to(tl.int32), 1)
            smaller = (other_key[:, None] < bound[None, :]) & (other < count)[:, None]
            below += tl.sum(smaller.to(tl.int32), 0)
        tl.store(pairs_ptr + rank, mine, mask=mine < count)
        if pid == tl.num_programs(0) - 1:
            tl.store(offsets_ptr + bound, below, mask=bound < M)
            tl.store(offsets_ptr + M, count)
