"""A stable counting sort of (row, chosen expert) pairs by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.route_pairs import route_pairs as reference_route_pairs
from ._backend import choose, operation
from ._checks import check_dtype, check_integers, check_shape, check_tensors, has_values
from ._operator import contiguous, operator

_OPERATION = operation("route_pairs", triton=True, differentiable=False)


def route_pairs(
    expert_index: Tensor, num_experts: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the pairs ``r*S + j`` of rows and chosen experts by expert, then by number.

    Args:
        expert_index: the experts of each row, ``[R, S]`` int32 or int64 in ``[0, M)``; -1 is none.
        num_experts: M.
        backend: ``auto``, ``triton`` or ``reference``.

    Returns:
        ``offsets [M + 1]``: expert e has the sorted pairs ``offsets[e]`` up to ``offsets[e + 1]``;
        ``pair [R*S]``: the sorted pairs, those of no expert last; ``slot [R, S]``: the position of each pair
        among the sorted, -1 where there is no expert. All int32. Nothing waits for the device.

    Raises:
        ValueError: a shape or, on a CPU, an index does not fit. TypeError: a type does not.
        RuntimeError: the named backend cannot run here.
    """
    check_tensors(expert_index=expert_index)
    _check(expert_index, num_experts)
    if expert_index.numel() and has_values(expert_index):
        low, high = (bound.item() for bound in expert_index.aminmax())
        if low < -1 or high >= num_experts:
            raise ValueError(
                f"expert_index holds {low} to {high}; it must stay in [0, {num_experts}), the experts, or be "
                "-1 for none"
            )
    path = choose(_OPERATION, backend, expert_index)
    found: tuple[Tensor, Tensor, Tensor] = _route_pairs(expert_index, num_experts, path)
    return found


def _check(expert_index: Tensor, num_experts: int) -> None:
    check_shape("expert_index", expert_index, ("R", "S"))
    check_dtype("expert_index", expert_index, torch.int32, torch.int64)
    check_integers(num_experts=num_experts)
    if expert_index.numel() >= 2**31:
        raise ValueError(f"expert_index has {expert_index.numel()} pairs; it must have less than 2^31")


def _fake(expert_index: Tensor, num_experts: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    _check(expert_index, num_experts)
    shapes = ((num_experts + 1,), (expert_index.numel(),), tuple(expert_index.shape))
    offsets, pair, slot = (expert_index.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return offsets, pair, slot


@operator("route_pairs", fake=_fake)
def _route_pairs(expert_index: Tensor, num_experts: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    _check(expert_index, num_experts)
    if backend == "triton":
        from ..kernels.route_pairs import route_pairs as launch_route_pairs

        (expert_index,) = contiguous(expert_index, aligned=True)
        return launch_route_pairs(expert_index, num_experts)
    (expert_index,) = contiguous(expert_index)
    return reference_route_pairs(expert_index, num_experts)
