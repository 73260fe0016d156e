"""Specification of :func:`switch_moe.ops.token_gate`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..experts import TokenChoice
from ..torch_compat import exporting_onnx

TINY = 1e-12  # keeps a token whose chosen experts all score zero from dividing by zero


def token_gate(
    logits: Tensor,
    sample_logits: Tensor | None,
    bias: Tensor | None,
    selection_bias: Tensor | None,
    choice: TokenChoice,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, choices and gates. Shapes as in the operation. Differentiable."""
    probs = scores(logits, sample_logits, bias, choice.score)
    chosen = choose(probs.detach(), selection_bias, choice)
    return probs, chosen.to(torch.int32), gates(probs, chosen, choice)


def scores(logits: Tensor, sample_logits: Tensor | None, bias: Tensor | None, score: str) -> Tensor:
    """Softmax over the experts, sigmoid, or the sum of all logits itself, ``[B, T, M]``."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.to(dtype)
    if bias is not None:
        logits = logits + bias.to(dtype)
    if sample_logits is not None:
        logits = logits + sample_logits.to(dtype)[:, None]
    if score == "softmax":
        return torch.softmax(logits, dim=-1)
    return torch.sigmoid(logits) if score == "sigmoid" else logits


def choose(ranked: Tensor, selection_bias: Tensor | None, choice: TokenChoice) -> Tensor:
    """Experts of each token, best first, or tokens of each expert, in the order of the tokens."""
    if selection_bias is not None:
        ranked = ranked + selection_bias.detach().to(ranked.dtype)
    if choice.groups > 1:
        ranked = best_groups(ranked, choice.groups, choice.top_groups)
    if not choice.by_expert:
        return _best(ranked, choice.quota)
    chosen = _best(by_pool(ranked, choice.pool), choice.quota)
    if exporting_onnx():  # it has no sort
        return torch.topk(chosen, choice.quota, dim=-1, largest=False).values
    return chosen.sort(-1).values


def best_groups(ranked: Tensor, groups: int, top_groups: int) -> Tensor:
    """Scores with those outside the best groups of experts at -inf.

    A group counts as much as its two best experts together (its best, where it has one only), as in
    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
    """
    parts = ranked.unflatten(-1, (groups, -1))  # [B, T, groups, M / groups]
    worth = parts.topk(min(2, parts.shape[-1]), dim=-1).values.sum(-1)
    inside = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, _best(worth, top_groups), True)
    kept: Tensor = parts.masked_fill(~inside[..., None], -torch.inf).flatten(-2)
    return kept


def _best(ranked: Tensor, count: int) -> Tensor:
    """Where the largest numbers of the last dimension are, in falling order."""
    if exporting_onnx():
        return torch.topk(ranked, count, dim=-1).indices
    # A stable sort lets the lowest index win a tie.
    return torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :count]


def by_pool(probs: Tensor, pool: int) -> Tensor:
    """``[B, T, M]`` as the experts see it, ``[B / pool, M, pool * T]``."""
    batch, tokens, num_experts = probs.shape
    return probs.reshape(batch // pool, pool * tokens, num_experts).transpose(1, 2)


def gates(probs: Tensor, chosen: Tensor, choice: TokenChoice) -> Tensor:
    """The scores of what is chosen, perhaps divided by the sum of those of a token, times the scale."""
    chosen = chosen.long()
    if choice.by_expert:
        probs = by_pool(probs, choice.pool)
    gate = probs.gather(-1, chosen)
    if choice.normalise and choice.by_expert:
        taken = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, chosen, True)
        total = torch.where(taken, probs, 0.0).sum(1, keepdim=True) + TINY  # [B / pool, 1, pool * T]
        gate = gate / total.expand_as(probs).gather(-1, chosen)
    elif choice.normalise:
        gate = gate / (gate.sum(-1, keepdim=True) + TINY)
    return gate * choice.scale


def sums(probs: Tensor, chosen: Tensor, by_expert: bool) -> tuple[Tensor, Tensor]:
    """How many pairs each expert has, and the sum of its scores, both ``[M]``."""
    num_experts = probs.shape[-1]
    if by_expert:
        load = torch.full((num_experts,), chosen.shape[0] * chosen.shape[2], device=probs.device)
    else:
        load = torch.zeros_like(probs).scatter(-1, chosen.long(), 1.0).sum((0, 1))
    return load.to(probs.dtype), probs.sum((0, 1))
