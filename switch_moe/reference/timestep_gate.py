"""Specification of :func:`switch_moe.ops.timestep_gate`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def timestep_gate(
    embedding: Tensor, weight: Tensor, bias: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over experts of SiLU(embedding) W^T + b, and its k largest entries, in the type of ``weight``.

    Shapes as in :func:`switch_moe.ops.timestep_gate`. Differentiable.
    """
    hidden = F.silu(embedding.to(weight.dtype))  # [N', D]
    probs = torch.softmax(torch.einsum("nd,lmd->lnm", hidden, weight) + bias[:, None], dim=-1)  # [L, N', M]
    gate, index = torch.sort(
        probs, dim=-1, descending=True, stable=True
    )  # stable: the lowest index wins a tie
    return probs, index[..., :top_k].to(torch.int32), gate[..., :top_k]


def selected_experts(probs: Tensor, expert_index: Tensor) -> Tensor:
    """0/1 ``[N', L*M]`` in the type of ``probs [L, N', M]``: one where an expert is in ``expert_index``."""
    chosen = torch.zeros_like(probs).scatter(2, expert_index.long(), 1.0)
    return chosen.transpose(0, 1).flatten(1)
