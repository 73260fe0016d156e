"""What expert_linear is measured against."""

from __future__ import annotations

import torch
from torch import Tensor


def expert_loop(x: Tensor, weight: Tensor, bias: Tensor, expert_index: Tensor, expert_gate: Tensor) -> Tensor:
    """A loop over experts with gather and index_add, as the official Switch-DiT structures its mixture.

    Each expert takes the samples that chose it, and its gated outputs are added to theirs. Shapes and result
    as in :func:`switch_moe.ops.expert_linear`; gradients by autograd.
    """
    out = torch.zeros(*x.shape[:2], weight.shape[2], dtype=x.dtype, device=x.device)
    for expert in range(weight.shape[0]):
        rows, slot = torch.nonzero(expert_index == expert, as_tuple=True)
        if rows.numel() == 0:
            continue
        tokens = x.index_select(0, rows)
        y = torch.matmul(tokens, weight[expert]) + bias[expert]
        gated = y * expert_gate[rows, slot][:, None, None]
        out = out.index_add(0, rows, gated.to(out.dtype))
    return out
