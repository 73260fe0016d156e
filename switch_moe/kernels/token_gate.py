"""Token routing in Triton: scores and choices of all tokens, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..experts import TokenChoice
from ._launch import cdiv, launch
from ._tile import sum_partials

_LOWEST = tl.constexpr(-(2**31))  # below the key of any score
_HIGHEST = tl.constexpr(2**31 - 1)  # the key of NaN
_TINY = tl.constexpr(1e-12)  # keeps a token whose chosen experts all score zero from dividing by zero


@triton.jit
def _key(x):
    """Integers in the order of floats, where NaN is above all, and both zeros are alike."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _HIGHEST)


@triton.jit
def _ranks(key, count, W: tl.constexpr):
    """[ROWS, W]: 0, 1, ... for the ``count`` largest keys of a row, -1 for others; a tie goes to the left."""
    column = tl.arange(0, W)[None, :]
    rank = tl.full(key.shape, -1, tl.int32)
    for j in range(count):
        best = tl.min(tl.where(key == tl.max(key, 1)[:, None], column, W), 1)[:, None]
        rank = tl.where(column == best, j, rank)
        key = tl.where(column == best, _LOWEST, key)
    return rank


@triton.jit
def _in_best_groups(
    ranked, real, top_groups, BLOCK: tl.constexpr, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr,
    GP: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """[BLOCK, GP * PP]: whether an expert is in one of the groups with the largest two experts together."""
    x = tl.reshape(tl.where(real, ranked, float("-inf")), [BLOCK, GP, PP])
    place = tl.arange(0, PP)[None, None, :]
    worth = tl.max(x, 2)  # of all but NaN
    if PER_GROUP > 1:
        first = tl.min(tl.where(x == worth[:, :, None], place, PP), 2)[:, :, None]
        worth += tl.max(tl.where(place == first, float("-inf"), x), 2)
    worth = tl.where(tl.sum((x != x).to(tl.int32), 2) > 0, float("nan"), worth)
    key = tl.where(tl.arange(0, GP)[None, :] < GROUPS, _key(worth), _LOWEST)
    inside = _ranks(key, top_groups, GP) >= 0
    return tl.reshape(tl.broadcast_to(inside[:, :, None], [BLOCK, GP, PP]), [BLOCK, GP * PP])


@triton.jit(do_not_specialize=["batch", "tokens", "span", "count", "top_groups", "scale", "pairs"])
def _scores_kernel(
    logits_ptr, sample_ptr, bias_ptr, selection_ptr, probs_ptr, key_ptr, chosen_ptr, gate_ptr, partial_ptr,
    batch, tokens, span, count, top_groups, scale, pairs,
    M: tl.constexpr, SCORE: tl.constexpr, SAMPLE: tl.constexpr, BIAS: tl.constexpr, SELECTION: tl.constexpr,
    BY_EXPERT: tl.constexpr, NORMALISE: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, GP: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """p = score(logits + bias + sample logits) of each token and, where tokens choose, its k best experts.

    Inputs are logits [B, T, M], sample logits [B, M], bias and selection bias [M]. Outputs are p [B, T, M],
    and chosen and gate [B, T, k]; or, where experts choose, the keys of the scores that they go by, [M, B T].

    A program owns ``span`` tokens of one sample and takes BLOCK at a time. It also writes, to its row of
    ``partial [programs, 2 M]``, how often its tokens chose each expert and the sum of their scores. Columns
    are experts, those of each group padded to PP, and the groups to GP.
    """
    MP: tl.constexpr = GP * PP
    PER_GROUP: tl.constexpr = M // GROUPS
    column = tl.arange(0, MP)
    expert = column
    real = expert < M
    if GROUPS > 1:
        expert = column // PP * PER_GROUP + column % PP
        real = (column % PP < PER_GROUP) & (column // PP < GROUPS)
    sample = tl.program_id(0) % batch
    begin = tl.program_id(0) // batch * span
    end = tl.minimum(begin + span, tokens)
    first = sample.to(tl.int64) * tokens
    logits_ptr += first * M
    probs_ptr += first * M
    shift = tl.zeros([MP], tl.float32)
    if BIAS:
        shift += tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)
    if SAMPLE:
        shift += tl.load(sample_ptr + sample * M + expert, mask=real, other=0.0).to(tl.float32)
    if BY_EXPERT:
        key_ptr += first + expert[None, :].to(tl.int64) * batch * tokens
    else:
        chosen_ptr += first * count
        gate_ptr += first * count
    load = tl.zeros([MP], tl.float32)
    importance = tl.zeros([MP], tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)[:, None]
        mask = (token < end) & real[None, :]
        place = token * M + expert[None, :]
        logits = tl.load(logits_ptr + place, mask=mask, other=0.0).to(tl.float32) + shift[None, :]
        if SCORE == "softmax":
            logits = tl.where(real[None, :], logits, float("-inf"))
            power = tl.exp(logits - tl.max(logits, 1)[:, None])
            probs = power / tl.sum(power, 1)[:, None]
        elif SCORE == "sigmoid":
            probs = tl.sigmoid(logits)
        else:
            probs = logits
        tl.store(probs_ptr + place, probs, mask=mask)
        importance += tl.sum(tl.where(mask, probs, 0.0), 0)
        ranked = probs
        if SELECTION:
            ranked += tl.load(selection_ptr + expert, mask=real, other=0.0).to(tl.float32)[None, :]
        if BY_EXPERT:
            tl.store(key_ptr + token, _key(ranked), mask=mask)
        else:
            if GROUPS > 1:
                inside = _in_best_groups(ranked, real[None, :], top_groups, BLOCK, GROUPS, PER_GROUP, GP, PP)
                ranked = tl.where(inside, ranked, float("-inf"))
            rank = _ranks(tl.where(real[None, :], _key(ranked), _LOWEST), count, MP)
            mask &= rank >= 0
            gate = probs
            if NORMALISE:
                gate = probs / (tl.sum(tl.where(mask, probs, 0.0), 1) + _TINY)[:, None]
            place = token * count + rank
            tl.store(chosen_ptr + place, tl.broadcast_to(expert[None, :], [BLOCK, MP]), mask=mask)
            tl.store(gate_ptr + place, gate * scale, mask=mask)
            load += tl.sum(mask.to(tl.float32), 0)
    if BY_EXPERT:  # all have the same, which the first program says
        load = tl.where(tl.program_id(0) == 0, pairs, 0).to(tl.float32) + load
    row_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * M) + expert
    tl.store(row_ptr, load, mask=real)
    tl.store(row_ptr + M, importance, mask=real)


@triton.jit
def _at_least(key_ptr, key, low, middle, high, length, ON_CHIP: tl.constexpr, BLOCK: tl.constexpr):
    """How many keys are at least each of three bounds."""
    lane = tl.arange(0, BLOCK)
    if ON_CHIP:
        a = (key >= low).to(tl.int32)
        b = (key >= middle).to(tl.int32)
        c = (key >= high).to(tl.int32)
    else:
        a = tl.zeros([BLOCK], tl.int32)
        b = tl.zeros([BLOCK], tl.int32)
        c = tl.zeros([BLOCK], tl.int32)
        for start in range(0, length, BLOCK):
            key = tl.load(key_ptr + start + lane, mask=lane < length - start, other=_LOWEST)
            a += (key >= low).to(tl.int32)
            b += (key >= middle).to(tl.int32)
            c += (key >= high).to(tl.int32)
    return tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0)


@triton.jit(do_not_specialize=["total", "length", "count", "scale"])
def _select_kernel(
    key_ptr, probs_ptr, chosen_ptr, gate_ptr, total, length, count, scale,
    M: tl.constexpr, GATES: tl.constexpr, ON_CHIP: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):  # fmt: skip
    """Each expert's ``count`` best of the ``length`` tokens of a pool, in the order of the tokens.

    A program owns an expert and a pool. It finds the key of the last token that is taken, two bits at a time
    from the highest, by counting the keys that are at least as large. Tokens above that key are taken, and of
    those at it the first. Then it numbers them, BLOCK_SCAN tokens at a time.

    Keys [M, total] become places: the number of a token among those of the expert, or -1. With ON_CHIP the
    keys of a pool stay in registers, BLOCK of them; else every count reads them again, BLOCK at a time.
    """
    pool, expert = tl.program_id(0) // M, tl.program_id(0) % M
    key_ptr += expert.to(tl.int64) * total + pool.to(tl.int64) * length
    probs_ptr += pool.to(tl.int64) * length * M + expert
    chosen_ptr += tl.program_id(0).to(tl.int64) * count
    gate_ptr += tl.program_id(0).to(tl.int64) * count
    lane = tl.arange(0, BLOCK)
    key = tl.full([BLOCK], _LOWEST, tl.int32)
    if ON_CHIP:
        key = tl.load(key_ptr + lane, mask=lane < length, other=_LOWEST)
    last = tl.full([], _LOWEST, tl.int32)
    step = tl.full([], 1 << 30, tl.int32)
    for _ in range(16):
        low, middle, high = last + step, last + 2 * step, last + 3 * step
        a, b, c = _at_least(key_ptr, key, low, middle, high, length, ON_CHIP, BLOCK)
        last = tl.where(a >= count, tl.where(b >= count, tl.where(c >= count, high, middle), low), last)
        step = step >> 2
    # NaN has the highest key of all: none is above it, and one more would not fit.
    above = tl.minimum(last, _HIGHEST - 1) + 1
    more, _b, _c = _at_least(key_ptr, key, above, above, above, length, ON_CHIP, BLOCK)
    ties = count - tl.where(last == _HIGHEST, 0, more)
    lane = tl.arange(0, BLOCK_SCAN)
    before = tl.zeros([], tl.int32)  # tokens above the last key in the blocks before
    before_ties = tl.zeros([], tl.int32)
    for start in range(0, length, BLOCK_SCAN):
        mask = lane < length - start
        scanned = tl.load(key_ptr + start + lane, mask=mask, other=_LOWEST)
        larger, tie = (scanned > last).to(tl.int32), (scanned == last).to(tl.int32)
        both = tl.cumsum(larger + (tie << 16), 0)  # both numbers fit into 16 bits
        number, number_tie = (both & 0xFFFF) - larger + before, (both >> 16) - tie + before_ties
        take = (larger > 0) | ((tie > 0) & (number_tie < ties))
        place = number + tl.minimum(number_tie, ties)
        tl.store(key_ptr + start + lane, tl.where(take, place, -1), mask=mask)
        tl.store(chosen_ptr + place, start + lane, mask=take)
        if GATES:
            score = tl.load(probs_ptr + (start + lane).to(tl.int64) * M, mask=take, other=0.0)
            tl.store(gate_ptr + place, score * scale, mask=take)
        before += tl.sum(larger, 0)
        before_ties += tl.sum(tie, 0)


@triton.jit(do_not_specialize=["total", "length", "count", "scale"])
def _normalise_kernel(
    probs_ptr, place_ptr, gate_ptr, total, length, count, scale,
    M: tl.constexpr, BLOCK: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """The gate of an expert for a token is its score over the sum of those of all that took the token.

    A program owns BLOCK tokens. Inputs are scores [total, M] and places [M, total].
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    expert = tl.arange(0, MP)[None, :]
    mask = (row < total) & (expert < M)
    probs = tl.load(probs_ptr + row * M + expert, mask=mask, other=0.0)
    place = tl.load(place_ptr + expert.to(tl.int64) * total + row, mask=mask, other=-1)
    mask &= place >= 0
    gate = probs / (tl.sum(tl.where(mask, probs, 0.0), 1) + _TINY)[:, None]
    pair = (row // length * M + expert) * count + place
    tl.store(gate_ptr + pair, gate * scale, mask=mask)


@triton.jit(do_not_specialize=["batch", "tokens", "span", "pool", "count", "scale"])
def _backward_kernel(
    grad_probs_ptr, grad_gate_ptr, grad_importance_ptr, probs_ptr, chosen_ptr, grad_logits_ptr, partial_ptr,
    batch, tokens, span, pool, count, scale,
    M: tl.constexpr, SCORE: tl.constexpr, BY_EXPERT: tl.constexpr, NORMALISE: tl.constexpr,
    FROM_PROBS: tl.constexpr, FROM_GATE: tl.constexpr, FROM_IMPORTANCE: tl.constexpr, SUMS: tl.constexpr,
    BLOCK: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits [B, T, M], and of each program's tokens the sum [programs, M].

    With h the gradient of the gates, 0 where an expert is not chosen, and s the sum of the chosen scores p of
    a token, the gradient g of p gets scale * h, or with NORMALISE scale * (h - <h, p> / s) / s where chosen.
    Then that of the logits is p (g - <g, p>) for a softmax, g p (1 - p) for a sigmoid, or g.

    A program owns ``span`` tokens of one sample, as in the forward. ``chosen`` are the experts [B, T, k], or
    where experts choose the places [M, B T].
    """
    expert = tl.arange(0, MP)[None, :]
    sample = tl.program_id(0) % batch
    begin = tl.program_id(0) // batch * span
    end = tl.minimum(begin + span, tokens)
    first = sample.to(tl.int64) * tokens
    grad_probs_ptr += first * M
    probs_ptr += first * M
    grad_logits_ptr += first * M
    if BY_EXPERT:
        chosen_ptr += first + expert.to(tl.int64) * batch * tokens
        grad_gate_ptr += ((sample // pool).to(tl.int64) * M + expert) * count
    else:
        chosen_ptr += first * count
        grad_gate_ptr += first * count
    total = tl.zeros([MP], tl.float32)
    common = tl.zeros([1, MP], tl.float32)
    if FROM_IMPORTANCE:
        common += tl.load(grad_importance_ptr + expert, mask=expert < M, other=0.0)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)[:, None]
        mask = (token < end) & (expert < M)
        place = token * M + expert
        probs = tl.load(probs_ptr + place, mask=mask, other=0.0)
        grad = tl.zeros([BLOCK, MP], tl.float32) + common
        if FROM_PROBS:
            grad += tl.load(grad_probs_ptr + place, mask=mask, other=0.0)
        if FROM_GATE:
            if BY_EXPERT:
                number = tl.load(chosen_ptr + token, mask=mask, other=-1)
                taken = number >= 0
                h = tl.load(grad_gate_ptr + number, mask=taken, other=0.0)
            else:
                taken = mask & (expert < 0)
                h = tl.zeros([BLOCK, MP], tl.float32)
                for j in range(count):
                    index = tl.load(chosen_ptr + token * count + j, mask=token < end, other=-1)
                    h_j = tl.load(grad_gate_ptr + token * count + j, mask=token < end, other=0.0)
                    taken |= expert == index
                    h += tl.where(expert == index, h_j, 0.0)
            if NORMALISE:
                kept = tl.where(taken, probs, 0.0)
                s = tl.sum(kept, 1)[:, None] + _TINY
                h = tl.where(taken, (h - tl.sum(h * kept, 1)[:, None] / s) / s, 0.0)
            grad += h * scale
        if SCORE == "softmax":
            grad = probs * (grad - tl.sum(grad * probs, 1)[:, None])
        elif SCORE == "sigmoid":
            grad = grad * probs * (1 - probs)
        tl.store(grad_logits_ptr + place, grad.to(grad_logits_ptr.dtype.element_ty), mask=mask)
        if SUMS:
            total += tl.sum(tl.where(mask, grad, 0.0), 0)
    if SUMS:
        expert = tl.arange(0, MP)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * M + expert, total, mask=expert < M)


_NUMBERS = 1024  # of a tile of tokens and experts: 8 for a thread
_ON_CHIP = 32768  # keys that the registers of a program hold
_AT_A_TIME = 8192  # keys that a program reads together where there are more
_PROGRAMS = 1024  # several for each multiprocessor; more of them would leave more partial sums


def _tokens(tokens: int, samples: int, columns: int) -> tuple[int, int, dict[str, int]]:
    """Parts of a sample, tokens of a part, and how many tokens a program takes at a time."""
    block = min(max(1, _NUMBERS // columns), triton.next_power_of_2(tokens))
    blocks = cdiv(tokens, block)
    parts = min(blocks, max(1, cdiv(_PROGRAMS, samples)))
    span = cdiv(blocks, parts) * block
    return cdiv(tokens, span), span, {"BLOCK": block, "num_warps": max(1, min(4, block * columns // 256))}


def forward(
    logits: Tensor, sample_logits: Tensor | None, bias: Tensor | None, selection_bias: Tensor | None,
    choice: TokenChoice,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores, choices, gates, load and importance [2, M], and where experts choose the tokens' places."""
    batch, tokens, experts = logits.shape
    outputs = choice.empty_outputs(logits)
    probs, chosen, gate, totals, places = outputs
    groups = choice.groups
    padded, per_group = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
    parts, span, tile = _tokens(tokens, batch, padded * per_group)
    partial = probs.new_empty(parts * batch, 2 * experts)
    count, scale = choice.quota, choice.scale
    given = [probs if tensor is None else tensor for tensor in (sample_logits, bias, selection_bias)]
    launch(
        _scores_kernel, parts * batch, logits, *given, probs, places if choice.by_expert else probs, chosen,
        gate, partial, batch, tokens, span, count, choice.top_groups, scale, chosen.shape[0] * count,
        M=experts, SCORE=choice.score, SAMPLE=sample_logits is not None, BIAS=bias is not None,
        SELECTION=selection_bias is not None, BY_EXPERT=choice.by_expert, NORMALISE=choice.normalise,
        GROUPS=groups, GP=padded, PP=per_group, **tile,
    )  # fmt: skip
    sum_partials(None, None, (partial, totals))
    if not choice.by_expert:
        return outputs
    total, length = batch * tokens, choice.pool * tokens
    block = min(triton.next_power_of_2(length), _ON_CHIP)
    on_chip = length <= block
    launch(
        _select_kernel, chosen.shape[0] * experts, places, probs, chosen, gate, total, length, count, scale,
        M=experts, GATES=not choice.normalise, ON_CHIP=on_chip, BLOCK=block if on_chip else _AT_A_TIME,
        BLOCK_SCAN=min(block, 4096), num_warps=max(1, min(16, block // 512)), num_stages=1,
    )  # fmt: skip
    if choice.normalise:
        block = max(1, _NUMBERS // triton.next_power_of_2(experts))
        launch(
            _normalise_kernel, cdiv(total, block), probs, places, gate, total, length, count, scale,
            M=experts, BLOCK=block, MP=triton.next_power_of_2(experts), num_warps=4,
        )  # fmt: skip
    return outputs


def backward(
    grads: Sequence[Tensor | None], logits: Tensor, probs: Tensor, chosen: Tensor, places: Tensor,
    wanted: list[bool], choice: TokenChoice,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of logits, and in float32 of sample_logits and bias, empty unless wanted.

    ``grads`` are those of the scores, the gates and the importance; None counts as zero.
    """
    batch, tokens, experts = logits.shape
    columns = triton.next_power_of_2(experts)
    parts, span, tile = _tokens(tokens, batch, columns)
    grad_logits = torch.empty_like(logits)
    partial = probs.new_empty((parts, batch * experts) if any(wanted) else 0)
    grad_sample = probs.new_empty((batch, experts) if wanted[0] else 0)
    grad_bias = probs.new_empty(experts if wanted[1] else 0)
    given = [probs if grad is None else grad for grad in grads]
    launch(
        _backward_kernel, parts * batch, *given, probs, places if choice.by_expert else chosen, grad_logits,
        partial if any(wanted) else probs, batch, tokens, span, choice.pool, choice.quota, choice.scale,
        M=experts, SCORE=choice.score, BY_EXPERT=choice.by_expert, NORMALISE=choice.normalise,
        FROM_PROBS=grads[0] is not None, FROM_GATE=grads[1] is not None,
        FROM_IMPORTANCE=grads[2] is not None, SUMS=any(wanted), MP=columns, **tile,
    )  # fmt: skip
    sum_partials(
        (partial, grad_sample) if wanted[0] else None,
        None,
        (partial.view(parts * batch, experts), grad_bias) if wanted[1] else None,
    )
    return grad_logits, grad_sample, grad_bias
