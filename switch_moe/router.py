"""Timestep routing: the gates of every block, known before the first block runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from switch_moe.ops.timestep_gate import timestep_gate


class Routing(NamedTuple):
    """Where samples go. For one block the shapes are without the leading L."""

    probs: Tensor  # [L, B, M] float32
    expert_index: Tensor  # [L, B, k] int32
    expert_gate: Tensor  # [L, B, k] float32

    def block(self, index: int) -> Routing:
        """The routing of one block of a routing of L blocks."""
        return Routing(self.probs[index], self.expert_index[index], self.expert_gate[index])

    def selected(self) -> Tensor:
        """0/1 float32 ``[B, L*M]`` of a routing of L blocks: one where an expert is among the top k."""
        chosen = torch.zeros_like(self.probs).scatter(2, self.expert_index.long(), 1.0)
        return chosen.transpose(0, 1).flatten(1)


class HasRouter(Protocol):
    """What :func:`route` needs of a layer; :class:`switch_moe.SwitchMoE` has it."""

    @property
    def router_weight(self) -> Tensor:
        """[M, D] float32."""

    @property
    def router_bias(self) -> Tensor:
        """[M] float32."""

    @property
    def top_k(self) -> int:
        """Experts per sample."""


def route(layers: Sequence[HasRouter], embedding: Tensor) -> Routing:
    """The routing of all ``layers`` for timestep embeddings ``[B, D]``, in one call of ``timestep_gate``.

    All layers must have the same ``top_k`` and number of experts (``ValueError``). ``SwitchMoE.forward``
    takes ``routing=result.block(i)``.
    """
    if not layers:
        raise ValueError("layers is empty; there must be at least one layer to route for")
    kinds = sorted({(layer.top_k, layer.router_weight.shape[0]) for layer in layers})
    if len(kinds) > 1:
        raise ValueError(
            f"layers have (top_k, experts) {kinds}; all layers routed together must have the same"
        )
    sizes = sorted({layer.router_weight.shape[1] for layer in layers})
    if sizes != [embedding.shape[-1]]:
        raise ValueError(
            f"embedding has shape {tuple(embedding.shape)}; the layers' hidden sizes are {sizes}"
        )
    weight = torch.stack([layer.router_weight for layer in layers]).float()
    bias = torch.stack([layer.router_bias for layer in layers]).float()
    return Routing(*timestep_gate(embedding, weight, bias, layers[0].top_k))
