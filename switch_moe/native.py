"""Loads what ``setup.py`` compiled from ``csrc``, and says why a part is missing.

torch is imported first: the compiled CPU kernels run on the threads of its OpenMP pool.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from torch import Tensor


def address(tensor: Tensor | None) -> int:
    """The address of the data of a tensor, as the compiled functions take it; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


class NativeModule:
    """A compiled module that may be absent; ``reason`` then says why and what to do."""

    def __init__(self, name: str, remedy: str) -> None:
        self.module: ModuleType | None = None
        self.reason: str | None = None
        try:
            self.module = importlib.import_module(name)
        except ImportError as error:
            built = importlib.util.find_spec(name) is not None
            self.reason = f"{name} was built but does not load ({error})" if built else f"{name} is not built"
            self.reason += f"; {remedy}"

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
