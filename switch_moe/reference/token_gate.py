"""Specification of :func:`switch_moe.ops.token_gate`."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-12  # keeps a token that nobody chose from dividing by zero


def token_gate(
    logits: Tensor,
    sample_logits: Tensor | None,
    bias: Tensor | None,
    selection_bias: Tensor | None,
    count: int,
    by_expert: bool,
    score: str,
    pool: int,
    normalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, choices and gates. Shapes as in the operation. Differentiable."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.to(dtype)
    if bias is not None:
        logits = logits + bias.to(dtype)
    if sample_logits is not None:
        logits = logits + sample_logits.to(dtype)[:, None]
    probs = scores(logits, score)  # [B, T, M]
    ranked = probs.detach()
    if selection_bias is not None:
        ranked = ranked + selection_bias.detach().to(dtype)
    if groups > 1:
        ranked = best_groups(ranked, groups, top_groups)
    if by_expert:
        return chosen_by_experts(probs, ranked, count, pool, normalise, scale)
    index = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :count]
    gate = probs.gather(-1, index)
    if normalise:
        gate = gate / (gate.sum(-1, keepdim=True) + TINY)
    return probs, index.to(torch.int32), gate * scale


def scores(logits: Tensor, score: str) -> Tensor:
    """Softmax over the experts, sigmoid, or the logits themselves."""
    if score == "softmax":
        return torch.softmax(logits, dim=-1)
    return torch.sigmoid(logits) if score == "sigmoid" else logits


def best_groups(ranked: Tensor, groups: int, top_groups: int) -> Tensor:
    """Scores with those outside the best groups of experts at -inf.

    A group counts as much as its two best experts together (its best, where it has one only), as in
    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
    """
    parts = ranked.unflatten(-1, (groups, -1))  # [B, T, groups, M / groups]
    worth = parts.topk(min(2, parts.shape[-1]), dim=-1).values.sum(-1)
    best = torch.sort(worth, dim=-1, descending=True, stable=True).indices[..., :top_groups]
    inside = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, best, True)
    kept: Tensor = parts.masked_fill(~inside[..., None], -torch.inf).flatten(-2)
    return kept


def chosen_by_experts(
    probs: Tensor, ranked: Tensor, count: int, pool: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each expert takes ``count`` tokens of every pool of samples, listed in the order of the tokens."""
    of_expert = ranked.unflatten(0, (-1, pool)).flatten(1, 2).transpose(1, 2)  # [B / pool, M, pool * T]
    best = torch.sort(of_expert, dim=-1, descending=True, stable=True).indices[..., :count]
    index = best.sort(-1).values
    pooled = probs.unflatten(0, (-1, pool)).flatten(1, 2).transpose(1, 2)
    gate = pooled.gather(-1, index)
    if normalise:
        chosen = torch.zeros_like(pooled).scatter(-1, index, 1.0)
        total = (pooled * chosen).sum(1, keepdim=True) + TINY  # [B / pool, 1, pool * T]
        gate = gate / total.expand_as(pooled).gather(-1, index)
    return probs, index.to(torch.int32), gate * scale


def sums(probs: Tensor, index: Tensor, by_expert: bool) -> tuple[Tensor, Tensor]:
    """How many pairs each expert has, and the sum of its scores, both ``[M]``."""
    num_experts = probs.shape[-1]
    if by_expert:
        load = torch.full((num_experts,), index.shape[0] * index.shape[2], device=probs.device)
    else:
        load = (index.flatten()[:, None] == torch.arange(num_experts, device=index.device)).sum(0)
    return load.to(probs.dtype), probs.sum((0, 1))
