"""Losses that keep a mixture of experts in balance, and their gradient without a place in the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops._checks import check_shape, check_tensors


def load_balance_loss(load: Tensor, importance: Tensor, tokens: int) -> Tensor:
    """``M sum_e f_e P_e``: f_e is the share of all pairs that expert e has, P_e its mean score.

    Of Switch Transformer (arXiv 2101.03961, equation 4), for any k; 1 where all is even. No gradient flows
    through f.

    Args:
        load: pairs of each expert, ``[M]``. importance: sums of their scores over all tokens, ``[M]``.
        tokens: how many there were.
    """
    share = load / load.sum().clamp(min=1)
    return len(load) * (share * importance).sum() / max(1, tokens)


def z_loss(logits: Tensor) -> Tensor:
    """The mean squared logarithm of the softmax's denominator, which keeps logits small.

    Of ST-MoE (arXiv 2202.08906, equation 5); logits ``[.., M]``, computed in float32.
    """
    squares = logits.float().logsumexp(-1).square()
    return squares.sum() / max(1, squares.numel())


def add_gradient_of(loss: Tensor, out: Tensor) -> Tensor:
    """``out``, whose backward adds the gradient of ``loss`` (a scalar) with a factor of exactly one.

    DiT-MoE's code trains its balance this way: whatever scales the main loss, be it a scaler for float16 or
    the share of an accumulated batch, does not scale the balance. To have both scaled alike, add ``loss`` to
    the main loss instead.
    """
    check_tensors(loss=loss, out=out)
    check_shape("loss", loss, ())
    result: Tensor = _AddGradient.apply(out, loss)
    return result


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return grad, torch.ones((), dtype=dtype, device=device)
