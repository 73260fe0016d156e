"""Argument checks that operations share; each error names the argument, what it was and what it must be."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..torch_compat import tracing, values

_INTEGRAL: tuple[Any, ...] = (numbers.Integral, torch.SymInt)
_REAL: tuple[Any, ...] = (numbers.Real, torch.SymFloat)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(**tensors: Any) -> None:
    """``TypeError`` unless all are tensors in memory, neither sparse nor quantized."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {_shown(tensor)}; it must be a tensor")
        if tensor.layout is not torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else tensor.layout
            raise TypeError(f"{name} is {kind}; it must be a dense tensor, see Tensor.to_dense")


def check_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """``ValueError`` unless ``tensor`` has ``shape``; a string entry names a size that may be anything."""
    sizes = tensor.shape
    if sizes == shape:
        return
    fits = len(sizes) == len(shape)
    for size, want in zip(sizes, shape, strict=False):
        fits = fits and (want.__class__ is str or size == want)
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(sizes)}; it must be [{wanted}]")


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


def check_like(name: str, tensor: Tensor, x: Tensor, shape: tuple[int | str, ...]) -> None:
    """Of ``shape``, in the type of ``x`` and on its device."""
    check_shape(name, tensor, shape)
    check_dtype(name, tensor, x.dtype)
    check_device(name, tensor, x.device)


def check_integers(low: int = 1, high: int = 2**31 - 1, **settings: Any) -> None:
    """``TypeError`` unless all settings are integers, ``ValueError`` unless they are in [low, high]."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, _INTEGRAL):
            raise TypeError(f"{name} is {_shown(value)}; it must be an integer")
        if value < low:
            raise ValueError(f"{name} is {value}; it must be at least {low}")
        if value > high:
            raise ValueError(f"{name} is {value}; it must be at most {high}")


def check_numbers(
    low: float = -math.inf, high: float = math.inf, wanted: str = "a finite number", **settings: Any
) -> None:
    """``TypeError`` unless all are numbers, ``ValueError`` unless they are finite and in [low, high]."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, _REAL):
            raise TypeError(f"{name} is {_shown(value)}; it must be {wanted}")
        # A comparison also takes the symbols of torch.compile, and integers that no float holds.
        if not (-sys.float_info.max <= value <= sys.float_info.max and low <= value <= high):
            raise ValueError(f"{name} is {str(value)[:40]}; it must be {wanted}")


def check_positive(**settings: Any) -> None:
    """``TypeError`` unless all are numbers, ``ValueError`` unless they are finite and above zero."""
    check_numbers(math.ulp(0.0), wanted="a positive finite number", **settings)


def check_flags(**settings: Any) -> None:
    """``TypeError`` unless all settings are True or False."""
    for name, value in settings.items():
        if value is not True and value is not False:
            raise TypeError(f"{name} is {_shown(value)}; it must be True or False")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """``ValueError`` unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        shown = repr(value) if isinstance(value, str) else _shown(value)
        raise ValueError(f"{name} is {shown}; it must be one of {', '.join(choices)}")


def check_top_k(top_k: int, num_experts: int) -> None:
    """``ValueError`` unless 1 <= top_k <= num_experts."""
    check_integers(1, num_experts=num_experts)
    check_integers(-num_experts, top_k=top_k)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}; it must be between 1 and the number of experts, {num_experts}")


def has_values(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device: on a CPU, outside a compiled program.

    Other classes of tensors, fake ones among them, may have none.
    """
    plain = tensor.__class__ is Tensor or tensor.__class__ is torch.nn.Parameter
    return plain and tensor.device.type == "cpu" and not (torch.compiler.is_compiling() or tracing())


def check_range(name: str, tensor: Tensor, size: int, what: str) -> None:
    """``ValueError`` unless all are in ``[0, size)``; looks where :func:`has_values` allows it."""
    if tensor.numel() and has_values(tensor):
        low, high = (bound.item() for bound in values(tensor).aminmax())
        if not (low >= 0 and high < size):  # NaN too
            raise ValueError(f"{name} holds {low} to {high}; it must stay in [0, {size}), {what}")


def check_zero_one(name: str, tensor: Tensor) -> None:
    """``ValueError`` unless all are 0 or 1; looks where :func:`has_values` allows it."""
    if tensor.dtype != torch.bool and has_values(tensor):
        found = values(tensor)
        wrong = (found != 0) & (found != 1)
        if wrong.any():
            raise ValueError(f"{name} holds {found[wrong][0].item()}; every entry must be 0 or 1")


def check_experts(
    x: Tensor, rows: int, expert_index: Tensor, expert_gate: Tensor, experts: dict[str, Tensor | None]
) -> None:
    """Checks what the expert operations share: routing, one type and one device for all.

    ``expert_index`` and ``expert_gate`` are ``[rows, k]``; ``experts`` are weights and biases by name.
    """
    check_shape("expert_index", expert_index, (rows, "k"))
    check_shape("expert_gate", expert_gate, tuple(expert_index.shape))
    check_dtype("expert_index", expert_index, torch.int32, torch.int64)
    check_dtype("expert_gate", expert_gate, *FLOATS)
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


def as_gate(expert_gate: Tensor, x: Tensor) -> Tensor:
    """Gates in float32, or as they are where they and x are float64, which only the reference takes."""
    if expert_gate.dtype == torch.float32 or x.dtype == expert_gate.dtype == torch.float64:
        return expert_gate
    return expert_gate.float()


def _shown(value: Any) -> str:
    """A value with its type, cut short."""
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"
