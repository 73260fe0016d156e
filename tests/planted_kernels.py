"""Kernels that must be found out, for test_compiled_kernels.py; benchmarks.compiled compiles them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from switch_moe.kernels._launch import launch
from switch_moe.kernels._tile import Tile


@triton.jit
def product(
    a_ptr, b_ptr, out_ptr, depth, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = a b``, one tile [BLOCK_M, BLOCK_N], BLOCK_K at a time."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * depth + k0 + k[None, :])
        b = tl.load(b_ptr + (k0 + k)[:, None] * BLOCK_N + n[None, :])
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(out_ptr + m[:, None] * BLOCK_N + n[None, :], total.to(out_ptr.dtype.element_ty))


@triton.jit
def refused(a_ptr, BLOCK: tl.constexpr):
    """Does not compile: 3 is no power of two."""
    tl.store(a_ptr + tl.arange(0, BLOCK), 0.0)


def call_product(dtype: torch.dtype, block: int, depth: int, precision: str, warps: int, stages: int) -> None:
    a = torch.empty(block, 256, dtype=dtype, device="meta")
    out = torch.empty(block, block, dtype=dtype, device="meta")
    tile = Tile(block, block, depth, warps, stages)
    launch(product, 1, a, a.t(), out, 256, PRECISION=precision, **tile._asdict())


def calls(everything: bool) -> Iterator[Callable[[], None]]:
    half, single = torch.bfloat16, torch.float32
    for shape in (
        (half, 64, 64, "ieee", 4, 2),  # sound
        (half, 256, 32, "ieee", 4, 2),  # too large for the registers
        (half, 128, 128, "ieee", 8, 4),  # too large for the shared memory
        (single, 32, 32, "ieee", 4, 2),
        (single, 64, 32, "tf32", 4, 2),
    ):
        yield lambda shape=shape: call_product(*shape)
    yield lambda: launch(refused, 1, torch.empty(3, device="meta"), BLOCK=3, num_warps=4)
