"""Specification of :func:`switch_moe.ops.merge_experts`."""

from __future__ import annotations

from torch import Tensor


def merge_experts(
    weight: Tensor, bias: Tensor | None, expert_index: Tensor, expert_gate: Tensor
) -> tuple[Tensor, Tensor | None]:
    """``sum_j gate_rj W_j`` and ``sum_j gate_rj b_j``, summed in the type of the gates and rounded once."""

    def merged(source: Tensor) -> Tensor:
        chosen = source.index_select(0, expert_index.flatten().long()).unflatten(0, expert_index.shape)
        gate = expert_gate.reshape(*expert_gate.shape, *[1] * (source.dim() - 1))
        total: Tensor = (gate * chosen).sum(1)
        return total.to(source.dtype)

    return merged(weight), None if bias is None else merged(bias)
