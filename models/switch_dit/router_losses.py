"""Losses of timestep routers: the diffusion prior, and those of balance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from switch_moe import Router, Routing
from switch_moe.balance import load_balance_loss, z_loss


def matched_prior_loss(
    model: Any, routing: Routing, row: Tensor, match: bool, ties: Tensor | None = None
) -> Tensor:
    """The diffusion prior loss, a scalar, of a routing of timesteps in the rows [B] of the prior's table.

    The model has ``prior``, ``assignment`` and ``route_all_timesteps``; with ``match`` it gets a new
    assignment.
    """
    if match:
        selected = model.route_all_timesteps().selected()
        model.assignment.copy_(model.prior.match(selected, ties=ties))
    probs = routing.probs.transpose(0, 1).flatten(1)  # [B, L*M]
    return model.prior.loss(probs, row, model.assignment)


def balance_losses(
    routing: Routing, router: Router, time_embedding: Tensor, weights: Mapping[str, float]
) -> list[Tensor]:
    """Losses of a routing of L blocks, each the mean over the blocks times its weight, if that is not 0.

    Args:
        time_embedding: what was routed, ``[B, D]``. weights: of ``load_balance`` and ``z_loss``.
    """
    found = []
    if weight := weights["load_balance"]:
        probs = routing.probs  # [L, B, M]
        load = routing.selected().view(len(time_embedding), *probs.shape[::2]).sum(0)  # [L, M]
        of_blocks = zip(load, probs.sum(1), strict=True)
        losses = [load_balance_loss(*of_block, probs.shape[1]) for of_block in of_blocks]
        found.append(weight * torch.stack(losses).mean())
    if weight := weights["z_loss"]:
        hidden = F.silu(time_embedding.float())
        logits = torch.einsum("bd,lmd->lbm", hidden, router.weight.float())
        found.append(weight * z_loss(logits + router.bias.float()[:, None]))
    return found
