"""Specification of :func:`switch_moe.ops.routed_mlp`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..experts import RoutedExperts
from ..torch_compat import silu


def routed_mlp(x: Tensor, experts: RoutedExperts, base: Tensor | None, activation: str) -> Tensor:
    """``base + sum_p gate_p MLP_e(p)(x_row(p))`` by every expert on every row. Differentiable."""
    gates = dense_gates(experts, len(x))  # [R, M]
    out = torch.zeros_like(x) if base is None else base
    for e, (w_in, w_out) in enumerate(zip(experts.weight_in, experts.weight_out, strict=True)):
        hidden = _linear(x, w_in, None if experts.bias_in is None else experts.bias_in[e])
        mlp = _linear(
            activate(hidden, activation), w_out, None if experts.bias_out is None else experts.bias_out[e]
        )
        out = out + (gates[:, e : e + 1] * mlp).to(out.dtype)
    return out


def dense_gates(experts: RoutedExperts, rows: int) -> Tensor:
    """The gates of all rows and experts, ``[R, M]``, zero where a row does not go; several add up."""
    num_experts, pairs = len(experts.weight_in), torch.arange(len(experts.row), device=experts.row.device)
    expert = torch.searchsorted(experts.offsets[1:].contiguous(), pairs, right=True)  # M for padding
    place = experts.row.long() * (num_experts + 1) + expert
    gates = experts.gate.new_zeros(rows * (num_experts + 1)).index_add(0, place, experts.gate)
    return gates.view(rows, num_experts + 1)[:, :num_experts]


def activate(hidden: Tensor, activation: str) -> Tensor:
    """``[R, W]`` before the activation to ``[R, H]`` units."""
    if activation.startswith("swiglu"):
        first, second = hidden.chunk(2, dim=-1)
        return silu(first) * second if activation == "swiglu" else first * silu(second)
    if activation == "relu":
        return F.relu(hidden)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu" else "none")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x @ weight
    return out if bias is None else out + bias
