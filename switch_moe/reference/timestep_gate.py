"""Specification of :func:`switch_moe.ops.timestep_gate`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..torch_compat import exporting_onnx, silu


def probabilities(embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Softmax over experts of SiLU(embedding) W^T + b, ``[L, N', M]`` in the type of ``weight``."""
    hidden = silu(embedding.to(weight.dtype))  # [N', D]
    return torch.softmax(torch.einsum("nd,lmd->lnm", hidden, weight) + bias[:, None], dim=-1)


def timestep_gate(
    embedding: Tensor, weight: Tensor, bias: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The probabilities, and their k largest entries.

    Shapes as in :func:`switch_moe.ops.timestep_gate`. Differentiable.
    """
    probs = probabilities(embedding, weight, bias)
    if exporting_onnx():  # it has no stable sort
        gate, index = torch.topk(probs, top_k, dim=-1)
        return probs, index.to(torch.int32), gate
    # A stable sort lets the lowest index win a tie.
    gate, index = torch.sort(probs, dim=-1, descending=True, stable=True)
    return probs, index[..., :top_k].to(torch.int32), gate[..., :top_k]
