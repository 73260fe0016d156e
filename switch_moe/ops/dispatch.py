"""The order in which kernels take samples, made once for all blocks of a model and both directions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..experts import schedule_size
from ._backend import triton_reason
from ._checks import (
    as_int32,
    check_device,
    check_dtype,
    check_integers,
    check_range,
    check_shape,
    check_tensors,
    has_values,
)
from ._operator import contiguous, operator


def dispatch(expert_index: Tensor, num_experts: int) -> Tensor:
    """The ``schedule`` that :func:`expert_linear` and :func:`expert_mlp` take, in one launch for all blocks.

    Their Triton kernels read samples in an order in which neighbours share experts, and know which samples
    chose an expert. Without a schedule every call makes its own, which is one launch more. The work grows
    with the square of B*k: for tokens see :func:`route_pairs`.

    Args:
        expert_index: chosen experts, ``[B, k]`` or of L blocks ``[L, B, k]``, int32 (int64 is converted), on
            a GPU, or on a CPU in Triton's interpreter.
        num_experts: M.

    Returns:
        ``[S]`` or ``[L, S]`` int32, where S depends on B, k and M only; nothing waits for the device.

    Raises:
        ValueError: a shape or, on a CPU, an index does not fit. TypeError: a type does not.
        RuntimeError: Triton kernels cannot run on this device.
    """
    check_tensors(expert_index=expert_index)
    check_dtype("expert_index", expert_index, torch.int32, torch.int64)
    check_integers(num_experts=num_experts)
    check_range("expert_index", expert_index, num_experts, "the experts")
    reason = triton_reason(expert_index.device)
    if reason is not None:
        raise RuntimeError(f"dispatch cannot run: {reason}")
    found: Tensor = schedule_of(expert_index, num_experts)
    return found


def _check(expert_index: Tensor) -> None:
    shape = ("B", "k") if expert_index.dim() == 2 else ("L", "B", "k")
    check_shape("expert_index", expert_index, shape)


def _fake(expert_index: Tensor, num_experts: int) -> Tensor:
    _check(expert_index)
    *blocks, batch, top_k = expert_index.shape
    shape = (*blocks, schedule_size(batch, top_k, num_experts))
    return expert_index.new_empty(shape, dtype=torch.int32)


@operator("dispatch", fake=_fake)
def schedule_of(expert_index: Tensor, num_experts: int) -> Tensor:
    """The operator: a schedule of experts that nobody checked."""
    from ..kernels.dispatch import dispatch as launch_dispatch

    _check(expert_index)
    (index,) = contiguous(as_int32(expert_index, num_experts), aligned=True)
    return launch_dispatch(index, num_experts)


def check_schedule(schedule: Tensor | None, expert_index: Tensor, num_experts: int) -> None:
    """Raises unless ``schedule`` has the shape, type and device of one of ``expert_index [B, k]``."""
    if schedule is not None:
        batch, top_k = expert_index.shape
        check_shape("schedule", schedule, (schedule_size(batch, top_k, num_experts),))
        check_dtype("schedule", schedule, torch.int32)
        check_device("schedule", schedule, expert_index.device)


def check_given_schedule(schedule: Tensor | None, expert_index: Tensor, num_experts: int) -> None:
    """The same for one that a caller gave; on a CPU it must also be that of these very experts."""
    if schedule is None:
        return
    check_tensors(schedule=schedule)
    check_shape("expert_index", expert_index, ("B", "k"))
    check_schedule(schedule, expert_index, num_experts)
    if triton_reason(expert_index.device) is None and has_values(schedule) and has_values(expert_index):
        used = expert_index.shape[0] + expert_index.numel() + num_experts + 1  # the rest is padding
        if not torch.equal(schedule[:used], schedule_of(expert_index, num_experts)[:used]):
            raise ValueError(
                "schedule is of other experts than expert_index; it must be ops.dispatch(expert_index, M)"
            )
