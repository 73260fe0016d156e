"""Loads what ``setup.py`` compiled from ``csrc``, and says why a part is missing.

torch is imported first: the compiled CPU kernels run on the threads of its OpenMP pool.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .sources import checksum


def address(tensor: Tensor | None, dtype: torch.dtype, size: int, device: str = "cpu") -> int:
    """The address of a tensor's ``size`` numbers of type ``dtype``, for a compiled function; 0 for None.

    Compiled functions trust what they are given, so this is the one place that hands out addresses.

    Raises:
        ValueError: the tensor is on another kind of device, holds another count of numbers, is not contiguous
            or begins between two numbers. TypeError: it has another type.
    """
    if tensor is None:
        return 0
    if tensor.dtype is not dtype:
        raise TypeError(f"a compiled function was given {tensor.dtype}; it takes {dtype} here")
    pointer: int = tensor.data_ptr()
    there = tensor.is_cpu if device == "cpu" else tensor.device.type == device
    if not there or tensor.numel() != size or not tensor.is_contiguous() or pointer % dtype.itemsize:
        raise ValueError(
            f"a compiled function was given a tensor of shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()} on {tensor.device}; it takes {size} numbers side by side on a {device} device"
        )
    return pointer


def _hidden_copy(name: str) -> str:
    """Where an installed copy has the module, that the folder of this package hides; empty without one."""
    folder, module = Path(__file__).resolve().parent, name.rpartition(".")[2]
    for entry in sys.path:
        other = Path(entry or ".").resolve() / folder.name
        if other != folder and any(other.glob(f"{module}.*")):
            return f" in {folder}, which hides the installed {other}"
    return ""


class NativeModule:
    """A compiled module that may be absent; ``reason`` then says why and what to do."""

    def __init__(self, name: str, remedy: str) -> None:
        self.module: ModuleType | None = None
        self.reason: str | None = None
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            built = importlib.util.find_spec(name) is not None
            why = f"was built but does not load ({error})" if built else f"is not built{_hidden_copy(name)}"
        else:
            here = checksum()
            if here is None or getattr(module, "sources", None) == here:
                self.module = module
                return
            why = "was built from other sources than those here"
        self.reason = f"{name} {why}; {remedy}"

    def require(self) -> ModuleType:
        """The module; ``RuntimeError`` with the reason where it is missing."""
        if self.module is None:
            raise RuntimeError(self.reason)
        return self.module


cpu = NativeModule(f"{__package__}._cpu", "build it with: pip install -e .  (needs g++)")
cuda = NativeModule(
    f"{__package__}._cuda",
    "build it where nvcc is (CUDA_HOME names the toolkit) with: SWITCH_MOE_CUDA=1 pip install -e .",
)
