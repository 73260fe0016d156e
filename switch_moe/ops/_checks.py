"""Argument checks that operations share; each error names the argument, what it was and what it must be."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """``ValueError`` unless ``tensor`` has ``shape``; a string entry names a size that may be anything."""
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or size == want for size, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be [{wanted}]")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """``TypeError`` unless the type of ``tensor`` is one of ``allowed``."""
    if tensor.dtype not in allowed:
        raise TypeError(
            f"{name} is {tensor.dtype}; it must be {' or '.join(str(dtype) for dtype in allowed)}"
        )


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """``ValueError`` unless ``tensor`` is on ``device``."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {device}, like the first argument")


def check_top_k(top_k: int, num_experts: int) -> None:
    """``ValueError`` unless 1 <= top_k <= num_experts."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}; it must be between 1 and the number of experts, {num_experts}")


def check_expert_index(index: Tensor, num_experts: int) -> None:
    """``ValueError`` unless all are in ``[0, num_experts)``; reads the values, so for CPU tensors only."""
    if index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= num_experts:
            raise ValueError(
                f"expert_index holds {low} to {high}; it must stay in [0, {num_experts}), the experts"
            )


def check_experts(
    x: Tensor, expert_index: Tensor, expert_gate: Tensor, experts: dict[str, Tensor | None]
) -> None:
    """Checks what the expert operations share: routing, one type and one device for all.

    ``x [B, T, D]``, ``expert_index`` and ``expert_gate [B, k]``; ``experts`` are weights and biases by name.
    """
    check_shape("expert_index", expert_index, (x.shape[0], "k"))
    check_shape("expert_gate", expert_gate, tuple(expert_index.shape))
    check_dtype("expert_index", expert_index, torch.int32, torch.int64)
    exact = (torch.float64,) if x.dtype == torch.float64 else ()
    check_dtype("expert_gate", expert_gate, torch.float32, *exact)
    for name, tensor in experts.items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and x is {x.dtype}; cast one, or use autocast")
        check_device(name, tensor, x.device)
    check_device("expert_index", expert_index, x.device)
    check_device("expert_gate", expert_gate, x.device)
    if expert_index.shape[1] < 1:
        raise ValueError(
            f"expert_index has shape {tuple(expert_index.shape)}; at least one expert must be chosen"
        )


def as_int32(expert_index: Tensor, num_experts: int) -> Tensor:
    """The indices as int32. What is out of range stays out of range, where the kernels find it."""
    if expert_index.dtype == torch.int32:
        return expert_index
    return expert_index.clamp(-1, num_experts).to(torch.int32)
