"""Specification of :class:`switch_moe.DiffusionPrior`: the table and the divergence."""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-6  # inside the logarithms, as in the official code


def prior_table(num_timesteps: int, slots: int, active: int, alpha: float) -> Tensor:
    """0/1 table ``[N, slots]``: row t has ones in columns ``i_t .. i_t + active - 1``.

    ``i_t = round((t / (N - 1)) ** alpha * (slots - active))``: neighbouring timesteps share most of their
    columns, and the columns move fastest at large t. Float32.
    """
    fraction = torch.arange(num_timesteps, dtype=torch.float64) / max(num_timesteps - 1, 1)
    first = torch.round(fraction**alpha * (slots - active))[:, None]
    column = torch.arange(slots)
    return ((column >= first) & (column < first + active)).float()


def jensen_shannon(q: Tensor, u: Tensor) -> Tensor:
    """Jensen-Shannon divergence of rows of ``q`` and ``u [B, S]``, natural logarithm, mean over B."""
    middle = torch.log((q + u) / 2 + _EPSILON)
    of_q = (q * (torch.log(q + _EPSILON) - middle)).sum(-1)
    of_u = (u * (torch.log(u + _EPSILON) - middle)).sum(-1)
    return ((of_q + of_u) / 2).mean()
