"""Gumbel noise, which makes a draw out of a choice of the largest."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops._checks import check_device, check_shape, check_tensors


def gumbel_of(uniform: Tensor) -> Tensor:
    """Gumbel numbers ``-log(-log u)`` from uniform ones in (0, 1)."""
    return -(-uniform.log()).log()


def gumbel_like(logits: Tensor) -> Tensor:
    """Gumbel noise of the shape, type and device of ``logits``, from torch's generator.

    The largest of ``log p + G`` is a draw from p, and the k largest are k draws without replacement. Unlike
    ``torch.multinomial`` this asks a GPU for nothing, so the host does not wait.
    """
    drawn = torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_()
    return -drawn.clamp_(min=torch.finfo(drawn.dtype).tiny).log()


def check_noise(noise: Tensor, x: Tensor, num_experts: int) -> None:
    """``ValueError`` or ``TypeError`` unless ``noise`` is ``[B, T, M]`` beside tokens x ``[B, T, D]``."""
    check_tensors(noise=noise)
    check_shape("noise", noise, (*x.shape[:2], num_experts))
    check_device("noise", noise, x.device)
