"""What expert_linear is measured against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _LoopOverExperts(torch.autograd.Function):
    """Rows sorted by expert, one product per expert into a shared buffer; gradients likewise, not taped."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.sizes = sizes
        out = rows.new_empty(len(rows), weight.shape[2])
        for expert, (rows_e, out_e) in enumerate(zip(rows.split(sizes), out.split(sizes), strict=True)):
            torch.mm(rows_e, weight[expert], out=out_e)
            out_e.add_(bias[expert])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
        grad_bias = weight.new_empty(weight.shape[0], weight.shape[2])
        parts = zip(rows.split(ctx.sizes), grad.split(ctx.sizes), grad_rows.split(ctx.sizes), strict=True)
        for expert, (rows_e, grad_e, grad_rows_e) in enumerate(parts):
            torch.mm(grad_e, weight[expert].t(), out=grad_rows_e)
            torch.mm(rows_e.t(), grad_e, out=grad_weight[expert])
            torch.sum(grad_e, dim=0, out=grad_bias[expert])
        return grad_rows, grad_weight, grad_bias, None


def expert_loop(x: Tensor, weight: Tensor, bias: Tensor, expert_index: Tensor, expert_gate: Tensor) -> Tensor:
    """A loop over experts between a gather and an index_add, structured as the official Switch-DiT's mixture.

    The k copies of every sample are gathered in the order of their experts, each expert takes its part, the
    outputs are scaled by their gates and added to their samples. Shapes and result as in
    :func:`switch_moe.ops.expert_linear`; differentiable in the same arguments.
    """
    batch, tokens, _ = x.shape
    top_k = expert_index.shape[1]
    by_expert = torch.argsort(expert_index.flatten(), stable=True)  # [B*k]
    sample = by_expert // top_k
    sizes = (torch.bincount(expert_index.flatten(), minlength=weight.shape[0]) * tokens).tolist()
    rows = x[sample].reshape(-1, x.shape[2])  # [B*k*T, Din]
    out = _LoopOverExperts.apply(rows, weight, bias, sizes)
    scaled = out.view(-1, tokens, weight.shape[2]) * expert_gate.flatten()[by_expert][:, None, None].to(
        x.dtype
    )
    return torch.zeros(batch, tokens, weight.shape[2], dtype=x.dtype).index_add(0, sample, scaled)
