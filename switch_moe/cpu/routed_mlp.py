"""Two-layer experts over routes on a CPU: a product for each expert, its rows gathered."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..experts import RoutedExperts
from ..reference.routed_mlp import activate


def forward(
    x: Tensor, experts: RoutedExperts, base: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """The output, and the hidden layer before its activation where kept, else an empty tensor."""
    total = torch.zeros(x.shape, dtype=torch.float32) if base is None else base.float()
    out, pre = experts.empty_outputs(x, keep)
    if base is not None and total.data_ptr() == base.data_ptr():
        total = total.clone()
    offsets = experts.offsets.tolist()
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        rows, gate = experts.row[start:end], experts.gate[start:end, None]
        hidden = x.index_select(0, rows) @ experts.weight_in[e]
        if experts.bias_in is not None:
            hidden += experts.bias_in[e]
        if keep:
            pre[start:end] = hidden
        mlp = activate(hidden, activation) @ experts.weight_out[e]
        if experts.bias_out is not None:
            mlp += experts.bias_out[e]
        total.index_add_(0, rows, mlp.float() * gate)
    return out.copy_(total), pre


def backward(
    grad: Tensor, x: Tensor, experts: RoutedExperts, pre: Tensor, activation: str, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, weight_in, bias_in, weight_out, bias_out and gate; empty where not wanted."""
    grads = [g.zero_() for g in experts.empty_gradients(x, wanted)]
    grad_x = torch.zeros(x.shape, dtype=torch.float32)
    offsets = experts.offsets.tolist()
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        rows, gate = experts.row[start:end], experts.gate[start:end, None]
        of_out = grad.index_select(0, rows)
        with torch.enable_grad():
            hidden = pre[start:end].detach().requires_grad_()
            units = activate(hidden, activation)
        of_units = of_out @ experts.weight_out[e].t()  # without the gate
        of_hidden = torch.autograd.grad(units, hidden, (of_units.float() * gate).to(x.dtype))[0]
        units = units.detach()
        if wanted[0]:
            grad_x.index_add_(0, rows, (of_hidden @ experts.weight_in[e].t()).float())
        if wanted[1]:
            grads[1][e] = x.index_select(0, rows).t() @ of_hidden
        if wanted[2] and experts.bias_in is not None:
            grads[2][e] = of_hidden.float().sum(0)
        scaled = (of_out.float() * gate).to(x.dtype)
        if wanted[3]:
            grads[3][e] = units.t() @ scaled
        if wanted[4] and experts.bias_out is not None:
            grads[4][e] = scaled.float().sum(0)
        if wanted[5]:
            found = (units.float() * of_units.float()).sum(1)
            if experts.bias_out is not None:
                found += of_out.float() @ experts.bias_out[e].float()
            grads[5][start:end] = found
    if wanted[0]:
        grads[0].copy_(grad_x)
    return tuple(grads)
