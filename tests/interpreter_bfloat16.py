"""bfloat16 in Triton's interpreter, for tests: it has none of its own (triton-lang/triton issue 11584).

numpy has no bfloat16, so the interpreter holds the 16 bits as uint16, and at three places it takes them for
numbers or loses some:

- ``tl.dot`` multiplies the bits as integers;
- operators on two tensors (``+``, ``*``, ``<``, ``maximum``) take them as integers too;
- float32 becomes bfloat16 by cutting bits off, where GPUs round to nearest even. That doubles the error.

The cure computes in float32 and rounds each result once, as a GPU's units do. It is applied to Triton 3.6 and
later, whose interpreters have these functions; a Triton without one of them fails here, loudly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def widen(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 numbers as float32."""
    return np.left_shift(bits.astype(np.uint32), 16).view(np.float32)


def narrow(numbers: np.ndarray) -> np.ndarray:
    """float32 numbers as bits of bfloat16, rounded to nearest even; NaN stays NaN."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    bits = numbers.view(np.uint32).astype(np.uint64)
    odd = (bits >> 16) & 1
    rounded = ((bits + 0x7FFF + odd) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Cures the interpreter of this process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast, binary = (getattr(InterpreterBuilder, n) for n in ("create_dot", "cast_impl", "binary_op"))

    def is_bfloat16(handle: Any) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def widened(handle: Any) -> Any:
        return TensorHandle(widen(handle.data), tl.float32) if is_bfloat16(handle) else handle

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if is_bfloat16(source) and kind.scalar == tl.float32:
            return widened(source)
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            return TensorHandle(narrow(source.data), tl.bfloat16)
        return cast(self, source, kind)

    def binary_op(self: Any, left: Any, right: Any, operator: Callable[..., np.ndarray]) -> Any:
        if not is_bfloat16(left):
            return binary(self, left, right, operator)
        found = operator(widened(left).data, widened(right).data)
        if found.dtype == np.bool_:
            return TensorHandle(found, tl.int1)
        return TensorHandle(narrow(found), tl.bfloat16)

    for function in (create_dot, cast_impl, binary_op):
        setattr(InterpreterBuilder, function.__name__, function)
