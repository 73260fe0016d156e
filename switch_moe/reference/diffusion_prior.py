"""Specification of :func:`switch_moe.ops.diffusion_prior_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-6  # inside the logarithms, as in the official code


def diffusion_prior_loss(
    probs: Tensor, table: Tensor, t: Tensor, assignment: Tensor, depth: int, active: int
) -> Tensor:
    """The divergence of the routers, ``probs / depth``, and the matched prior, ``table[t] / active``."""
    prior = table[t][:, assignment].float() / active  # [B, S]
    return jensen_shannon(probs.float() / depth, prior)


def jensen_shannon(q: Tensor, u: Tensor) -> Tensor:
    """Jensen-Shannon divergence of rows of ``q`` and ``u [B, S]``, natural logarithm, mean over B."""
    middle = torch.log((q + u) / 2 + _EPSILON)
    of_q = (q * (torch.log(q + _EPSILON) - middle)).sum(-1)
    of_u = (u * (torch.log(u + _EPSILON) - middle)).sum(-1)
    return ((of_q + of_u) / 2).mean()
