"""Specification of :func:`switch_moe.ops.route_pairs`."""

from __future__ import annotations

import torch
from torch import Tensor


def route_pairs(expert_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, pairs by expert, and where each pair of a row went. Shapes as in the operation."""
    none = expert_index < 0
    key = torch.where(none, num_experts, expert_index).flatten().long()  # [P]
    pair = torch.sort(key, stable=True).indices
    of_expert = key[:, None] == torch.arange(num_experts, device=key.device)
    ends = of_expert.sum(0).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    position = torch.empty_like(pair).scatter(0, pair, torch.arange(len(pair), device=pair.device))
    slot = torch.where(none, -1, position.view_as(expert_index))
    return offsets.to(torch.int32), pair.to(torch.int32), slot.to(torch.int32)
