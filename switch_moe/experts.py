"""The experts and the routing of a call, as operators hand them to a backend, and the shapes of the results.

Operators and backends allocate their results here, and torch's fake tensors come from here too, so that a
shape is written down once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class LinearExperts(NamedTuple):
    """Arguments of ``expert_linear``."""

    weight: Tensor  # [M, Din, Dout]
    bias: Tensor | None  # [M, Dout]
    expert_index: Tensor  # [B, k] int32
    expert_gate: Tensor  # [B, k] float32

    def empty_outputs(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """The output and the mixture m(x), both ``[B, T, Dout]``; the second is empty unless kept."""
        shape = (x.shape[0], x.shape[1], self.weight.shape[2])
        return empty_like(x, shape), empty_like(x, shape if keep else 0)

    def empty_gradients(self, x: Tensor, wanted: Iterable[bool]) -> list[Tensor]:
        """Gradients of x, weight, bias and gate."""
        return empty_gradients(wanted, x, self.weight, self.bias, self.expert_gate)


class MLPExperts(NamedTuple):
    """Arguments of ``expert_mlp``; W is H, the hidden width, or 2H for SwiGLU."""

    weight_in: Tensor  # [M, D, W]
    bias_in: Tensor | None  # [M, W]
    weight_out: Tensor  # [M, H, D]
    bias_out: Tensor | None  # [M, D]
    expert_index: Tensor  # [B, k] int32
    expert_gate: Tensor  # [B, k] float32

    def empty_outputs(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """The output ``[B, T, D]`` and the hidden layer before its activation ``[B, k, T, W]``, if kept."""
        return empty_like(x, x.shape), empty_like(x, self.hidden_shape(x) if keep else 0)

    def hidden_shape(self, x: Tensor) -> tuple[int, ...]:
        """``[B, k, T, W]``."""
        return (x.shape[0], self.expert_index.shape[1], x.shape[1], self.weight_in.shape[2])

    def empty_gradients(self, x: Tensor, wanted: Iterable[bool]) -> list[Tensor]:
        """Gradients of x, weight_in, bias_in, weight_out, bias_out and gate."""
        return empty_gradients(wanted, x, *self[:4], self.expert_gate)


class RoutedExperts(NamedTuple):
    """Arguments of ``routed_mlp``; W is H, the hidden width, or 2H for SwiGLU. Routes as in ``Routes``."""

    weight_in: Tensor  # [M, D, W]
    bias_in: Tensor | None  # [M, W]
    weight_out: Tensor  # [M, H, D]
    bias_out: Tensor | None  # [M, D]
    offsets: Tensor  # [M + 1] int32
    row: Tensor  # [P] int32
    slot: Tensor  # [R, S] int32
    gate: Tensor  # [P] float32

    def empty_outputs(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """The output ``[R, D]`` and the hidden layer before its activation ``[P, W]``, if kept."""
        return empty_like(x, x.shape), empty_like(x, self.hidden_shape() if keep else 0)

    def hidden_shape(self) -> tuple[int, int]:
        """``[P, W]``."""
        return (self.row.shape[0], self.weight_in.shape[2])

    def empty_gradients(self, x: Tensor, wanted: Iterable[bool]) -> list[Tensor]:
        """Gradients of x, weight_in, bias_in, weight_out, bias_out and gate."""
        return empty_gradients(wanted, x, *self[:4], self.gate)


class TokenChoice(NamedTuple):
    """Settings of ``token_gate``: what is a score, who chooses by it, and how gates follow."""

    quota: int  # experts of a token, k, or tokens of an expert, C
    by_expert: bool  # whether experts choose tokens
    score: str
    pool: int
    normalise: bool
    scale: float
    groups: int
    top_groups: int

    def chosen_shape(self, logits: Tensor) -> tuple[int, int, int]:
        """``[B, T, k]``, or ``[B / pool, M, C]``."""
        batch, tokens, num_experts = logits.shape
        if self.by_expert:
            return (batch // self.pool, num_experts, self.quota)
        return (batch, tokens, self.quota)

    def empty_outputs(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Scores ``[B, T, M]``, choices and gates, load and importance ``[2, M]``, and places.

        The places ``[M, B * T]`` int32 say which of an expert's C tokens each token is, -1 for none. They are
        empty where tokens choose.
        """
        batch, tokens, num_experts = logits.shape
        chosen = self.chosen_shape(logits)
        single, index, device = torch.float32, torch.int32, logits.device
        return (
            torch.empty(logits.shape, dtype=single, device=device),
            torch.empty(chosen, dtype=index, device=device),
            torch.empty(chosen, dtype=single, device=device),
            torch.empty((2, num_experts), dtype=single, device=device),
            torch.empty((num_experts, batch * tokens) if self.by_expert else 0, dtype=index, device=device),
        )


def empty_gradients(wanted: Iterable[bool], first: Tensor, *others: Tensor | None) -> list[Tensor]:
    """An uninitialised gradient for each input; one that is not wanted, or has no input, is empty."""
    inputs = (first, *(first if tensor is None else tensor for tensor in others))
    return [
        empty_like(tensor, tensor.shape if want else 0) for tensor, want in zip(inputs, wanted, strict=True)
    ]


def empty_like(x: Tensor, shape: int | tuple[int, ...]) -> Tensor:
    """An uninitialised tensor of another shape: what ``x.new_empty`` does, in less host time."""
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def schedule_size(batch: int, top_k: int, num_experts: int) -> int:
    """Numbers in the schedule of the kernels: B samples, B*k pairs and M+1 offsets.

    Rounded up, so that each of the schedules of L blocks begins at a multiple of 16 bytes.
    """
    return 4 * ((batch + batch * top_k + num_experts + 1 + 3) // 4)
