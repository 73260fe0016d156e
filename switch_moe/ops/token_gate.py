"""Routing by tokens: scores, choices, gates and what losses of balance need, in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.token_gate import sums
from ..reference.token_gate import token_gate as reference_token_gate
from ._backend import choose, operation
from ._checks import (
    FLOATS,
    check_choice,
    check_device,
    check_dtype,
    check_flags,
    check_integers,
    check_numbers,
    check_shape,
    check_tensors,
    check_top_k,
)
from ._operator import without_autocast

SCORES = ("softmax", "sigmoid", "identity")

_OPERATION = operation("token_gate")


class TokenGate(NamedTuple):
    """Who chose whom. C stands for ``capacity``, G for the pools, B / ``pool``."""

    probs: Tensor  # [B, T, M] float32, the scores of all experts
    chosen: Tensor  # int32: experts [B, T, k], best first; or tokens of a pool [G, M, C], in their order
    gate: Tensor  # float32, of the shape of chosen
    load: Tensor  # [M] float32, the pairs of each expert; no gradient
    importance: Tensor  # [M] float32, the sum of each expert's scores


def token_gate(
    logits: Tensor,
    top_k: int | None = None,
    *,
    capacity: int | None = None,
    pool: int = 1,
    sample_logits: Tensor | None = None,
    bias: Tensor | None = None,
    selection_bias: Tensor | None = None,
    score: str = "softmax",
    normalise: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    backend: str = "auto",
) -> TokenGate:
    """Tokens choose their ``top_k`` best experts, or each expert its ``capacity`` best tokens of a pool.

    Token choice is that of DiT-MoE (arXiv 2407.11633), expert choice that of EC-DIT (arXiv 2410.02098).
    Computed in float32 whatever autocast says. The lowest index wins a tie.

    Args:
        logits: of the router for every token, ``[B, T, M]`` of any floating type.
        top_k: experts for each token, 1 to M. capacity: tokens for each expert, 1 to ``pool * T``. Exactly
            one of the two.
        pool: neighbouring samples among whose tokens an expert chooses; it divides B, and is B for the whole
            batch. Only with ``capacity``.
        sample_logits: ``[B, M]``, added to the logits of all tokens of a sample: what a router makes of the
            timestep.
        bias: ``[M]``, added to all logits.
        selection_bias: ``[M]``, added to the scores for the choice alone (arXiv 2408.15664); no gradient.
        score: ``softmax`` over the experts, ``sigmoid`` or ``identity``.
        normalise: whether the gates of a token are divided by their sum.
        scale: factor of all gates, after that.
        groups: experts form this many groups of neighbours, and a token chooses within its ``top_groups``
            best (arXiv 2412.19437). Only with ``top_k``.
        backend: ``auto`` or ``reference``.

    Returns:
        A :class:`TokenGate`, differentiable from ``probs``, ``gate`` and ``importance``. Nothing waits for
        the device.

    Raises:
        ValueError: a shape, device or setting does not fit. TypeError: a type does not.
        RuntimeError: the named backend cannot run here.
    """
    check_tensors(logits=logits)
    check_shape("logits", logits, ("B", "T", "M"))
    check_dtype("logits", logits, *FLOATS)
    batch, tokens, num_experts = logits.shape
    check_integers(pool=pool)
    if (top_k is None) == (capacity is None):
        given = "neither" if top_k is None else "both"
        raise ValueError(f"top_k and capacity: {given} given; it must be exactly one of them")
    if top_k is not None:
        count, by_expert = top_k, False
        check_top_k(top_k, num_experts)
        if pool != 1:
            raise ValueError(f"pool is {pool}; it must be 1 with top_k, where each token chooses for itself")
        _check_groups(num_experts, top_k, groups, top_groups)
    else:
        assert capacity is not None
        count, by_expert = capacity, True
        check_integers(1, pool * tokens, capacity=capacity)
        if batch % pool:
            raise ValueError(f"pool is {pool}; it must divide the number of samples, {batch}")
        if groups != 1:
            raise ValueError(f"groups is {groups}; it must be 1 with capacity, where experts choose")
    for name, tensor, shape in (
        ("sample_logits", sample_logits, (batch, num_experts)),
        ("bias", bias, (num_experts,)),
        ("selection_bias", selection_bias, (num_experts,)),
    ):
        if tensor is not None:
            check_tensors(**{name: tensor})
            check_shape(name, tensor, shape)
            check_dtype(name, tensor, *FLOATS)
            check_device(name, tensor, logits.device)
    check_choice("score", score, SCORES)
    check_flags(normalise=normalise)
    check_numbers(scale=scale)
    choose(_OPERATION, backend, logits)
    with without_autocast(logits.device):
        probs, chosen, gate = reference_token_gate(
            logits, sample_logits, bias, selection_bias, count, by_expert, score, pool, normalise, scale,
            groups, top_groups,
        )  # fmt: skip
        return TokenGate(probs, chosen, gate, *sums(probs, chosen, by_expert))


def _check_groups(num_experts: int, top_k: int, groups: int, top_groups: int) -> None:
    check_integers(1, num_experts, groups=groups)
    check_integers(1, groups, top_groups=top_groups)
    if num_experts % groups:
        raise ValueError(f"groups is {groups}; it must divide the number of experts, {num_experts}")
    if top_k > top_groups * num_experts // groups:
        raise ValueError(
            f"top_k is {top_k}; {top_groups} groups have {top_groups * num_experts // groups} experts"
        )


torch.serialization.add_safe_globals([TokenGate])  # for torch.load with weights_only
