"""The schedule of a batch: samples and (sample, expert) pairs in the order that shares weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..experts import schedule_size
from ._launch import cdiv, launch

_BLOCK = 32


def dispatch(expert_index: Tensor, num_experts: int) -> Tensor:
    """Sorts on the device, into shapes that do not depend on the routing.

    Every pair is compared with every other, which is one launch and pays for the few hundred samples of a
    batch; for tokens, by the thousand, there is :func:`switch_moe.kernels.route_pairs.route_pairs`.

    Args:
        expert_index: ``[B, k]`` int32, or ``[L, B, k]`` of L blocks; contiguous.
        num_experts: M. Indices out of range count as expert 0, as everywhere in the kernels.

    Returns:
        int32 ``[S]`` or ``[L, S]``. A schedule begins with ``order [B]``: samples, those with the same set of
        experts together; then come ``pairs [B*k]``: pairs ``b*k + j`` by expert, then by number; then
        ``offsets [M+1]``: the pairs of expert e are ``pairs[offsets[e]:offsets[e+1]]``.
    """
    *blocks, batch, top_k = expert_index.shape
    size = schedule_size(batch, top_k, num_experts)
    shape = (*blocks, size)
    schedule = torch.empty(shape, dtype=torch.int32, device=expert_index.device)
    if schedule.numel() == 0 or batch == 0:
        return schedule.zero_()
    programs = cdiv(batch, _BLOCK) + cdiv(batch * top_k, _BLOCK)
    launch(
        _dispatch_kernel, programs * (blocks[0] if blocks else 1), expert_index, schedule, batch, size,
        TOP_K=top_k, M=num_experts, M_PAD=max(2, triton.next_power_of_2(num_experts)), BLOCK=_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return schedule


@triton.jit
def pairs_of(schedule_ptr, batch, TOP_K: tl.constexpr):
    """Where the pairs and the offsets of a schedule begin."""
    return schedule_ptr + batch, schedule_ptr + batch + batch * TOP_K


@triton.jit
def _expert(index_ptr, slot, mask, M: tl.constexpr):
    expert = tl.load(index_ptr + slot, mask=mask, other=0)
    return tl.where((expert >= 0) & (expert < M), expert, 0)


@triton.jit
def _sample_key(index_ptr, sample, mask, M: tl.constexpr, TOP_K: tl.constexpr):
    """The set of a sample's experts as bits; more than 31 experts may share bits: only locality."""
    key = tl.zeros(sample.shape, tl.int32)
    for j in range(TOP_K):  # not unrolled: k loads at once would spill
        expert = _expert(index_ptr, sample * TOP_K + j, mask, M) % 31
        key = key | (tl.full(sample.shape, 1, tl.int32) << expert)
    return key


@triton.jit(do_not_specialize=["batch", "size"])
def _dispatch_kernel(
    index_ptr, schedule_ptr, batch, size,
    TOP_K: tl.constexpr, M: tl.constexpr, M_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A counting sort: ``rank(i) = #{i': key(i') < key(i), or equal and i' < i}``; position rank(i) gets i.

    A program ranks BLOCK samples of a block of the model, or BLOCK pairs, against all of that block; the last
    one of a block also counts its offsets.
    """
    sample_programs = tl.cdiv(batch, BLOCK)
    programs = sample_programs + tl.cdiv(batch * TOP_K, BLOCK)
    model_block, pid = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    index_ptr += model_block * batch * TOP_K
    schedule_ptr += model_block * size
    pairs_ptr, offsets_ptr = pairs_of(schedule_ptr, batch, TOP_K)
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
        tl.store(schedule_ptr + rank, mine, mask=mine < batch)
    else:
        count = batch * TOP_K
        mine = (pid - sample_programs) * BLOCK + lane
        key = _expert(index_ptr, mine, mine < count, M)
        rank = tl.zeros([BLOCK], tl.int32)
        bound = tl.arange(0, M_PAD)
        below = tl.zeros([M_PAD], tl.int32)
        for start in range(0, count, BLOCK):
            other = start + lane
            other_key = _expert(index_ptr, other, other < count, M)
            before = (other_key[None, :] < key[:, None]) | (
                (other_key[None, :] == key[:, None]) & (other[None, :] < mine[:, None])
            )
            rank += tl.sum((before & (other < count)[None, :]).to(tl.int32), 1)
            smaller = (other_key[:, None] < bound[None, :]) & (other < count)[:, None]
            below += tl.sum(smaller.to(tl.int32), 0)
        tl.store(pairs_ptr + rank, mine, mask=mine < count)
        if pid == programs - 1:
            tl.store(offsets_ptr + bound, below, mask=bound < M)
            tl.store(offsets_ptr + M, count)
