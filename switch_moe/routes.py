"""Routes: which rows go to which experts, when each token chooses, or each expert does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .ops._checks import (
    FLOATS,
    as_gate,
    check_device,
    check_dtype,
    check_integers,
    check_range,
    check_shape,
    check_tensors,
)
from .ops.route_pairs import route_pairs


class Routes(NamedTuple):
    """P pairs of a row and an expert, where a row has 0 to S experts.

    Pairs stand by expert and, for one expert, by row. Shapes do not depend on the choices: where fewer pairs
    are chosen than there is room for, those from ``offsets[M]`` on are padding, which nothing reads.
    """

    offsets: Tensor  # [M + 1] int32: expert e has the pairs offsets[e] up to offsets[e + 1]
    row: Tensor  # [P] int32: the row of each pair, in [0, R)
    slot: Tensor  # [R, S] int32: the pairs of each row in the order in which they are added, -1 for none
    gate: Tensor  # [P] float32 (or float64, for the reference), differentiable

    @property
    def num_experts(self) -> int:
        """M."""
        return self.offsets.shape[0] - 1

    @staticmethod
    def of_rows(
        expert_index: Tensor, expert_gate: Tensor, num_experts: int, *, backend: str = "auto"
    ) -> Routes:
        """Routes of rows that chose their experts.

        Args:
            expert_index: ``[R, S]`` int32 or int64, experts in ``[0, M)``, or -1 for none.
            expert_gate: ``[R, S]``, their gates; gradients flow back to them.
            num_experts: M.
            backend: see :func:`switch_moe.ops.route_pairs`.

        Raises ``ValueError`` or ``TypeError`` for an argument that does not fit.
        """
        check_tensors(expert_index=expert_index, expert_gate=expert_gate)
        check_shape("expert_index", expert_index, ("R", "S"))
        _check_gate(expert_gate, expert_index)
        offsets, pair, slot = route_pairs(expert_index, num_experts, backend=backend)
        gate = expert_gate.flatten().index_select(0, pair)
        return Routes(offsets, pair // max(1, expert_index.shape[1]), slot, as_gate(gate, gate))

    @staticmethod
    def of_experts(row_index: Tensor, expert_gate: Tensor, rows: int) -> Routes:
        """Routes of experts that each chose C rows.

        Args:
            row_index: ``[M, C]`` int32 or int64, rows in ``[0, R)``, of one expert all different.
            expert_gate: ``[M, C]``, their gates; gradients flow back to them.
            rows: R.

        Raises ``ValueError`` or ``TypeError`` for an argument that does not fit.
        """
        check_tensors(row_index=row_index, expert_gate=expert_gate)
        check_shape("row_index", row_index, ("M", "C"))
        _check_gate(expert_gate, row_index)
        check_dtype("row_index", row_index, torch.int32, torch.int64)
        check_integers(0, rows=rows)
        check_range("row_index", row_index, rows, "the rows")
        num_experts, count = row_index.shape
        device = row_index.device
        offsets = torch.arange(num_experts + 1, dtype=torch.int32, device=device) * count
        pairs = torch.arange(row_index.numel(), dtype=torch.int32, device=device).view_as(row_index)
        experts = torch.arange(num_experts, device=device)[:, None]
        place = row_index.long() * num_experts + experts
        slot = torch.full((rows * num_experts,), -1, dtype=torch.int32, device=device)
        slot = slot.scatter(0, place.flatten(), pairs.flatten()).view(rows, num_experts)
        return Routes(
            offsets, row_index.flatten().to(torch.int32), slot, as_gate(expert_gate.flatten(), expert_gate)
        )

    @staticmethod
    def to_one(x: Tensor) -> Routes:
        """Every row of ``x [R, D]`` to the only expert, with a gate of one: a dense layer."""
        check_tensors(x=x)
        check_shape("x", x, ("R", "D"))
        rows = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
        offsets = torch.arange(2, dtype=torch.int32, device=x.device) * x.shape[0]
        gate = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
        return Routes(offsets, rows, rows[:, None], gate)


def _check_gate(expert_gate: Tensor, index: Tensor) -> None:
    check_shape("expert_gate", expert_gate, tuple(index.shape))
    check_dtype("expert_gate", expert_gate, *FLOATS)
    check_device("expert_gate", expert_gate, index.device)


torch.serialization.add_safe_globals([Routes])  # for torch.load with weights_only
