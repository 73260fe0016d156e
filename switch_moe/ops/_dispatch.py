"""What every operation shares: registration with torch, the choice of a backend, and argument checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from switch_moe import native

LIBRARY = torch.library.Library("switch_moe", "DEF")

BACKENDS = ("auto", "reference", "native", "triton")


def register(
    schema: str, fake: Callable[..., Any], key: str = "CPU"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define the operator ``switch_moe::<schema>``; the decorated function computes it for ``key``.

    Gradients come from an autograd.Function around the operator: less host time than torch.library.custom_op.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"switch_moe::{name}", fake, lib=LIBRARY)

    def decorate(implementation: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.impl(name, implementation, key)
        return implementation

    return decorate


def native_reason(device_type: str) -> str | None:
    """Why the compiled kernels cannot run on a device of this type, or None."""
    if device_type == "cpu":
        return native.cpu.reason
    if device_type == "cuda":
        return native.cuda.reason
    return f"there are no compiled kernels for {device_type} tensors; use backend='reference'"


def choose(op: str, backend: str, device: torch.device, native_devices: tuple[str, ...]) -> str:
    """'native' or 'reference' for a call of ``op`` on ``device``.

    ``auto`` takes the compiled kernels where there are some for the device. A backend that is named and
    cannot run raises ``RuntimeError``: nothing is silently replaced.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return "reference"
    if backend == "triton":
        raise RuntimeError(f"{op} has no Triton kernel in this version; use backend='auto' or 'reference'")
    if device.type not in native_devices:
        if backend == "auto":
            return "reference"
        only = f", only for {' and '.join(native_devices)} tensors" if native_devices else ""
        raise RuntimeError(
            f"{op} has no compiled kernel for {device.type} tensors{only}; use backend='auto' or 'reference'"
        )
    reason = native_reason(device.type)
    if reason is None:
        return "native"
    if backend == "auto":
        return "reference"
    raise RuntimeError(f"backend 'native' of {op} cannot run: {reason}")


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
