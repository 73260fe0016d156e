"""What every operation shares: registration with torch, the choice of a backend, and argument checks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from switch_moe import native

LIBRARY = torch.library.Library("switch_moe", "DEF")

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # looked for, not imported

BACKENDS = ("auto", "reference", "native", "triton")


def register(
    schema: str, fake: Callable[..., Any], key: str = "CompositeExplicitAutograd"
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


def register_autocast(name: str, rule: Callable[..., Any]) -> None:
    """What ``switch_moe::<name>`` does under autocast on CPU and CUDA; the public functions cast before they
    save for the backward, so this serves direct calls of the operator.

    ``rule`` gets the arguments of the operator and returns those to call it with, autocast off.
    """
    for device_type in ("cpu", "cuda"):

        def implementation(*args: Any, device_type: str = device_type) -> Any:
            cast = rule(*args, dtype=torch.get_autocast_dtype(device_type))
            with torch.autocast(device_type, enabled=False):
                return getattr(torch.ops.switch_moe, name)(*cast)

        LIBRARY.impl(name, implementation, f"Autocast{device_type.upper()}")


def native_reason(device_type: str) -> str | None:
    """Why the compiled kernels cannot run on a device of this type, or None."""
    if device_type == "cpu":
        return native.cpu.reason
    if device_type == "cuda":
        return native.cuda.reason
    return f"there are no compiled kernels for {device_type} tensors; use backend='reference'"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def triton_reason(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on ``device``, or None."""
    if not _TRITON_INSTALLED:
        return "Triton is not installed; pip install triton"
    if device.type == "cpu":
        if interpreting():
            return None
        return (
            "a CPU runs Triton kernels in its interpreter only; set TRITON_INTERPRET=1 before the first "
            "of them runs"
        )
    if device.type != "cuda":
        return f"Triton kernels run on CUDA tensors, not on {device.type} tensors; use backend='reference'"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs; use backend='reference'"
    return _cuda_triton_reason(device.index or 0)


def _cuda_triton_reason(index: int) -> str | None:
    if not torch.cuda.is_available():  # the tensor is fake, and stands for one on a GPU
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return (
            f"the kernels need compute capability 8.0, {torch.cuda.get_device_name(index)} has "
            f"{major}.{minor}; use backend='reference'"
        )
    return None


def choose(
    op: str, backend: str, device: torch.device, native_devices: tuple[str, ...], triton: bool = False
) -> str:
    """'triton', 'native' or 'reference' for a call of ``op`` on ``device``.

    ``auto`` takes Triton kernels for CUDA tensors where ``op`` has some, then compiled kernels where there
    are some for the device. A backend that is named and cannot run raises ``RuntimeError``: nothing is
    silently replaced.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return "reference"
    if backend == "triton":
        reason = triton_reason(device) if triton else "it has no Triton kernel; use backend='auto'"
        if reason is not None:
            raise RuntimeError(f"backend 'triton' of {op} cannot run: {reason}")
        return "triton"
    if backend == "auto" and triton and device.type == "cuda" and triton_reason(device) is None:
        return "triton"
    if device.type not in native_devices:
        if backend == "auto":
            return "reference"
        only = f", only for {' and '.join(native_devices)} tensors" if native_devices else ""
        raise RuntimeError(
            f"{op} has no compiled kernel for {device.type} tensors{only}; use backend='auto' or 'reference'"
        )
    native_state = native_reason(device.type)
    if native_state is None:
        return "native"
    if backend == "auto":
        return "reference"
    raise RuntimeError(f"backend 'native' of {op} cannot run: {native_state}")


def check_triton_dtype(op: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses bfloat16 in Triton's interpreter (``RuntimeError``): its products there are silently wrong."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        raise RuntimeError(
            f"backend 'triton' of {op} cannot run: bfloat16 products are wrong in Triton's interpreter; use "
            "float32 or float16"
        )


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
