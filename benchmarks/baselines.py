"""What expert_linear and expert_mlp are measured against."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


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


class _Take(torch.autograd.Function):
    """``x[take]``, every row ``copies`` times; ``back`` finds them again. No atomics either way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, take: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x[take]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        grad = grad[back]
        return grad if ctx.copies == 1 else grad.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class Groups:
    """Pairs (sample, expert) in the order of their experts, found on the device without waiting for it."""

    def __init__(self, expert_index: Tensor, num_experts: int, tokens: int) -> None:
        self.batch, self.top_k = expert_index.shape
        self.index, self.num_experts, self.tokens = expert_index, num_experts, tokens
        self.order = torch.argsort(expert_index.flatten(), stable=True)  # [B*k]

    @cached_property
    def inverse(self) -> Tensor:
        """Where each pair went, ``[B*k]``."""
        return torch.argsort(self.order)

    @cached_property
    def expert(self) -> Tensor:
        """The experts in order, ``[B*k]``."""
        return self.index.flatten()[self.order].long()

    @cached_property
    def ends(self) -> Tensor:
        """The last row of each expert + 1, int32 ``[M]``."""
        experts = torch.arange(self.num_experts, device=self.index.device)
        return (torch.searchsorted(self.expert, experts, right=True) * self.tokens).to(torch.int32)

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each expert, on the host, which waits for them."""
        counts = torch.bincount(self.index.flatten(), minlength=self.num_experts)
        return (counts * self.tokens).tolist()

    def gather(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` to rows ``[B*k*T, D]``."""
        return _Take.apply(x, self.order // self.top_k, self.inverse, self.top_k).flatten(0, 1)

    def add_bias(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """Each row plus the bias of its expert."""
        if bias is None:
            return rows
        return (rows.unflatten(0, (len(self.order), -1)) + bias[self.expert][:, None]).flatten(0, 1)

    def combine(self, rows: Tensor, expert_gate: Tensor) -> Tensor:
        """Rows ``[B*k*T, D]`` to ``[B, T, D]``: their sum over k, weighted by the gates in their type."""
        pairs = _Take.apply(rows.unflatten(0, (len(self.order), -1)), self.inverse, self.order, 1)
        gates = expert_gate.to(rows.dtype)[:, None]  # [B, 1, k]
        return (gates @ pairs.reshape(self.batch, self.top_k, -1)).view(self.batch, -1, rows.shape[1])


def expert_loop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert_index: Tensor,
    expert_gate: Tensor,
    groups: Groups | None = None,
) -> Tensor:
    """A loop over experts between a gather and an index_add, structured as the official Switch-DiT's mixture.

    The k copies of every sample are gathered in the order of their experts, each expert takes its part, the
    outputs are scaled by their gates and added to their samples. Shapes and result as in
    :func:`switch_moe.ops.expert_linear`; differentiable in the same arguments. ``groups``: made ahead.
    """
    batch, tokens, _ = x.shape
    groups = groups or Groups(expert_index, weight.shape[0], tokens)
    sample = groups.order // groups.top_k  # [B*k]
    rows = x[sample].reshape(-1, x.shape[2])  # [B*k*T, Din]
    out = _LoopOverExperts.apply(rows, weight, bias, groups.sizes)
    gates = expert_gate.flatten()[groups.order].to(x.dtype)
    scaled = out.view(-1, tokens, weight.shape[2]) * gates[:, None, None]
    total = torch.zeros(batch, tokens, weight.shape[2], dtype=x.dtype, device=x.device)
    return total.index_add(0, sample, scaled)


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor, expert_index: Tensor, expert_gate: Tensor,
    groups: Groups | None = None,
) -> Tensor:  # fmt: skip
    """Gather, one grouped product of torch, combine: what a generic mixture-of-experts library does.

    Shapes and result as in :func:`switch_moe.ops.expert_linear`; the gates are rounded to the type of ``x``.
    """
    groups = groups or Groups(expert_index, weight.shape[0], x.shape[1])
    rows = groups.add_bias(F.grouped_mm(groups.gather(x), weight, offs=groups.ends), bias)
    return groups.combine(rows, expert_gate)


def grouped_mlp(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None,
    expert_index: Tensor, expert_gate: Tensor, gated: bool, groups: Groups | None = None,
) -> Tensor:  # fmt: skip
    """As :func:`grouped_linear`, with two products. Shapes as in :func:`switch_moe.ops.expert_mlp`."""
    groups = groups or Groups(expert_index, weight_in.shape[0], x.shape[1])
    hidden = groups.add_bias(F.grouped_mm(groups.gather(x), weight_in, offs=groups.ends), bias_in)
    hidden = activation(hidden, gated)
    rows = groups.add_bias(F.grouped_mm(hidden, weight_out, offs=groups.ends), bias_out)
    return groups.combine(rows, expert_gate)


def activation(hidden: Tensor, gated: bool) -> Tensor:
    """SwiGLU of the two halves, or GELU (tanh)."""
    if gated:
        a, b = hidden.chunk(2, dim=-1)
        return F.silu(a) * b
    return F.gelu(hidden, approximate="tanh")
