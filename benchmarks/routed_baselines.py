"""What routed_mlp is measured against: layers structured as DiT-MoE's and EC-DIT's code, grouped products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import activation


def dit_moe(x: Tensor, experts: Sequence[Sequence[Tensor]], index: Tensor, gate: Tensor) -> Tensor:
    """The training forward of DiT-MoE (arXiv 2407.11633): k copies of every row, a mask for each expert.

    Args:
        x: rows, ``[R, D]``. experts: of each the weights of nn.Linear that make SwiGLU, ``[H, D]``,
            ``[H, D]`` and ``[D, H]``. index, gate: ``[R, k]``.
    """
    copies = x.repeat_interleave(index.shape[1], 0)
    chosen, out = index.flatten(), torch.empty_like(copies)
    for e, expert in enumerate(experts):
        mask = chosen == e
        out[mask] = swiglu(copies[mask], *expert)
    return (out.view(*index.shape, -1) * gate.to(x.dtype)[..., None]).sum(1)


def swiglu(x: Tensor, first: Tensor, second: Tensor, down: Tensor) -> Tensor:
    """``SiLU(x first^T) (x second^T)`` through ``down``."""
    return F.linear(F.silu(F.linear(x, first)) * F.linear(x, second), down)


def ec_dit(x: Tensor, experts: Sequence[Sequence[Tensor]], index: Tensor, gate: Tensor) -> Tensor:
    """Experts that choose their rows (EC-DIT, arXiv 2410.02098): gather, expert, scatter with gates.

    Args:
        x: rows, ``[R, D]``. experts: of each the weight and bias of two nn.Linear around GELU (tanh).
            index, gate: the rows of each expert, ``[M, C]``.
    """
    out = torch.zeros_like(x)
    for rows, gates, (w_in, b_in, w_out, b_out) in zip(index, gate.to(x.dtype), experts, strict=True):
        hidden = F.gelu(F.linear(x[rows], w_in, b_in), approximate="tanh")
        out = out.index_add(0, rows, F.linear(hidden, w_out, b_out) * gates[:, None])
    return out


def grouped(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None,
    row: Tensor, expert: Tensor, ends: Tensor, gate: Tensor,
) -> Tensor:  # fmt: skip
    """A gather, two grouped products and an index_add; SwiGLU without biases, else GELU (tanh).

    Args:
        x: rows, ``[R, D]``. Weights and biases as in :func:`switch_moe.ops.routed_mlp`.
        row, expert, gate: of the pairs by expert, ``[P]``. ends: the last pair of each expert + 1, int32
            ``[M]``.
    """
    hidden = F.grouped_mm(x[row], weight_in, offs=ends)
    hidden = hidden if bias_in is None else hidden + bias_in[expert]
    out = F.grouped_mm(activation(hidden, bias_in is None), weight_out, offs=ends)
    out = out if bias_out is None else out + bias_out[expert]
    return torch.zeros_like(x).index_add(0, row, out * gate.to(x.dtype)[:, None])
