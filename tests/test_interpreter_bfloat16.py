"""The cure of bfloat16 in Triton's interpreter: exactly what torch computes, for numbers of every size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreter_bfloat16 import narrow, widen
from torch import Tensor

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes bfloat16 itself")


def numbers(count: int, seed: int = 0) -> Tensor:
    """float32 of every exponent and sign, with infinities, NaN, zeros and what lies between two bfloat16."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32)
    halfway = bits[: count // 4] & 0xFFFF0000 | 0x8000
    special = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF], dtype=np.uint32)
    return torch.from_numpy(np.concatenate([bits[: -len(halfway) - 6], halfway, special]).view(np.float32))


def same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def test_rounding_is_that_of_torch() -> None:
    x = numbers(1 << 16)
    rounded = torch.from_numpy(narrow(x.numpy()).copy()).view(torch.bfloat16)
    assert same(rounded, x.bfloat16())
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    assert same(torch.from_numpy(widen(every.view(torch.uint16).numpy())), every.float())


@triton.jit
def _operators_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, a + b)
    tl.store(out_ptr + N + i, a - b)
    tl.store(out_ptr + 2 * N + i, a * b)
    tl.store(out_ptr + 3 * N + i, tl.where(a < b, a, b))
    tl.store(out_ptr + 4 * N + i, (a.to(tl.float32) * 0.3).to(tl.bfloat16))


def test_operators() -> None:
    a, b = numbers(256, 1).bfloat16(), numbers(256, 2).bfloat16()
    out = torch.empty(5, 256, dtype=torch.bfloat16)
    _operators_kernel[(1,)](a, b, out, N=256)
    expected = [a + b, a - b, a * b, torch.where(a < b, a, b), (a.float() * 0.3).bfloat16()]
    for found, right in zip(out, expected, strict=True):
        assert same(found, right)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j))
    tl.store(out_ptr + i * N + j, product)


def test_products() -> None:
    """Exact: small whole numbers, whose sums float32 holds."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (16, 16), generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, N=16)
    assert torch.equal(out, a.float() @ b.float())
