"""Specification of :class:`switch_moe.DiffusionPrior`: the table, the matching cost and the divergence."""

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


def matching_cost(selected: Tensor, table: Tensor) -> Tensor:
    """``C[a, b] = sum_t |selected[t, a] - table[t, b]|`` of two 0/1 tables ``[N, S]``, as float32 ``[S, S]``.

    By ``sum_t selected + sum_t table - 2 selected^T table``: a product instead of an ``[N, S, S]`` tensor.
    Exact up to N = 2^22: zeros and ones survive TF32 and bfloat16 products, and float32 counts to 2^24.
    """
    either = selected.sum(0)[:, None] + table.sum(0)
    return either - 2 * (selected.t() @ table)


def jensen_shannon(q: Tensor, u: Tensor) -> Tensor:
    """Jensen-Shannon divergence of rows of ``q`` and ``u [B, S]``, natural logarithm, mean over B."""
    middle = torch.log((q + u) / 2 + _EPSILON)
    of_q = (q * (torch.log(q + _EPSILON) - middle)).sum(-1)
    of_u = (u * (torch.log(u + _EPSILON) - middle)).sum(-1)
    return ((of_q + of_u) / 2).mean()
