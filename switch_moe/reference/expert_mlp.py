"""Specification of :func:`switch_moe.ops.expert_mlp`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..experts import MLPExperts
from ..torch_compat import silu


def expert_mlp(x: Tensor, experts: MLPExperts, gated: bool) -> Tensor:
    """``m(x_b) = sum_j gate_bj MLP_index_bj(x_b)``. Differentiable; shapes as in the operation."""
    weight_in, bias_in, weight_out, bias_out, expert_index, expert_gate = experts
    mixture = torch.zeros((), dtype=x.dtype, device=x.device)
    for j in range(expert_index.shape[1]):
        chosen = expert_index[:, j].long()
        hidden = _linear(x, weight_in, bias_in, chosen)  # [B, T, H or 2H]
        if gated:
            a, b = hidden.chunk(2, dim=-1)
            hidden = silu(a) * b
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        out = _linear(hidden, weight_out, bias_out, chosen)
        mixture = mixture + (expert_gate[:, j, None, None] * out).to(out.dtype)
    return mixture


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor) -> Tensor:
    # The gradient of index_select adds in a fixed order; that of indexing does not on a CPU.
    out = torch.bmm(x, weight.index_select(0, chosen))
    return out if bias is None else out + bias.index_select(0, chosen)[:, None].to(out.dtype)
