"""How operators are registered with torch, and what their implementations do to their arguments first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ._flops import register as register_flops

NAMESPACE = "switch_moe"
"""All operators live in ``torch.ops.<NAMESPACE>``."""

LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# Asked once, because torch.compile of 2.11 cannot trace the question.
_WITH_AUTOCAST = [kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)]


def _none(*_: Any) -> int:
    return 0


def operator(
    name: str,
    fake: Callable[..., Any],
    *,
    flops: Callable[..., int] = _none,
    mutates: Iterable[str] = (),
    autocast: int | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the operator ``name`` and returns the operator in its place.

    The schema comes from the annotations of the function. Gradients come from an autograd.Function around the
    operator, which takes less host time than ``torch.library.custom_op``.

    Args:
        name: name in the namespace.
        fake: returns uninitialised tensors of the shapes and types of the results.
        flops: floating-point operations of the products of a call, from its arguments, for torch's
            FlopCounterMode; none by default.
        mutates: arguments that the function changes in place.
        autocast: under autocast the first ``autocast`` arguments are cast to its type, and autocast is off
            inside; None registers nothing. The public functions cast before they save for the backward, so
            this serves direct calls of the operator.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates), op_name=name)
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        register_flops(packet, flops)
        registered: Callable[..., Any] = packet.default
        if autocast is not None:
            for device_type in ("cpu", "cuda"):
                key = f"Autocast{device_type.upper()}"
                LIBRARY.impl(name, _under_autocast(registered, device_type, autocast), key)
        return registered

    return decorate


def _under_autocast(function: Callable[..., Any], device_type: str, count: int) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return function(*cast(dtype, *arguments[:count]), *arguments[count:])

    return call


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast wants on ``device``, or None where autocast is off."""
    if device.type in _WITH_AUTOCAST and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Turns autocast off on a device, where it exists there."""
    if device.type in _WITH_AUTOCAST:
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def cast(dtype: torch.dtype | None, *tensors: Any) -> tuple[Any, ...]:
    """The tensors as ``dtype``; None stays None, and with ``dtype`` None all stay as they are."""
    if dtype is None:
        return tensors
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def contiguous(*tensors: Any, aligned: bool = False) -> tuple[Any, ...]:
    """The tensors laid out row by row, as the kernels read them; None stays None.

    With ``aligned`` they begin at a multiple of 16 bytes, by a copy where they do not. For other addresses
    Triton compiles other code, which loads a number at a time and spills.
    """
    found = []
    for tensor in tensors:
        if tensor is not None:
            tensor = tensor.contiguous()
            if aligned and tensor.data_ptr() % 16:
                tensor = tensor.clone()
        found.append(tensor)
    return tuple(found)
