"""Specification of :func:`switch_moe.ops.expert_linear`: every chosen expert applied on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..experts import LinearExperts


def expert_linear(x: Tensor, experts: LinearExperts, modulate: bool = False) -> Tensor:
    """``m(x_b) = sum_j gate_bj (x_b W_j + b_j)``, or ``x (1 + m(x))`` with ``modulate``. Differentiable.

    Shapes as in :func:`switch_moe.ops.expert_linear`. Products and sums are in the type of ``x``; the gates
    stay float32 until they scale an expert's output.
    """
    weight, bias, expert_index, expert_gate = experts
    mixture = torch.zeros((), dtype=x.dtype, device=x.device)
    for j in range(expert_index.shape[1]):
        chosen = expert_index[:, j].long()
        # The gradient of index_select adds in a fixed order; that of indexing does not on a CPU.
        y_BTD = torch.bmm(x, weight.index_select(0, chosen))
        if bias is not None:
            y_BTD = y_BTD + bias.index_select(0, chosen)[:, None]
        mixture = mixture + (expert_gate[:, j, None, None] * y_BTD).to(x.dtype)
    return x + x * mixture if modulate else mixture
