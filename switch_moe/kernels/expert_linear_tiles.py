"""Which tiles the kernels of expert_linear take, by shapes, type and device alone."""

from __future__ import annotations

import functools

from ._launch import Kind, cdiv
from ._tile import PARTIAL_BYTES, Tile, narrow

MAX_ACCUMULATORS = 4  # experts whose weight gradients fit the registers of one program, beside P
UNROLLED = 4  # chosen experts up to which their tiles are loaded side by side, not in a loop

# The tables hold the largest tiles that compile without spills (python -m benchmarks.compiled lists them):
# a FLOP takes less L2 traffic the larger the tile is.

# The tiles of the forward and of dx.
# Key: the kind of product and the architecture.
# Value: the tiles for more than 128 tokens, for 65 to 128, and for up to 64.
_PRODUCTS = {
    ("half", 80): (Tile(128, 128, 32, 8, 3), Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3)),
    ("half", 90): (Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3)),
    ("half", 100): (Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3)),
    ("tf32", 80): (Tile(64, 64, 32, 4, 2),) * 3,
    ("tf32", 90): (Tile(128, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    ("tf32", 100): (Tile(128, 64, 32, 8, 3),) * 3,
}
_IEEE_PRODUCT = Tile(64, 64, 32, 8, 2)
_NARROW_PRODUCT = Tile(64, 64, 32, 8, 2)  # where loads take fewer than 16 bytes, and so more registers

# The tiles of dW.
# Key: the kind of product and the architecture.
# Value: the tiles for up to 3 experts, for 4, and for more, where a program takes one expert.
_WEIGHTS = {
    ("half", 80): (Tile(64, 64, 32, 8, 3), Tile(64, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3)),
    ("half", 90): (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 8, 3), Tile(128, 128, 32, 8, 3)),
    ("half", 100): (Tile(64, 64, 64, 8, 3), Tile(64, 64, 64, 8, 3), Tile(128, 64, 64, 8, 3)),
    ("tf32", 80): (Tile(64, 32, 32, 4, 2), Tile(64, 32, 32, 4, 2), Tile(64, 64, 32, 8, 2)),
    ("tf32", 90): (Tile(64, 64, 32, 8, 2), Tile(64, 64, 32, 8, 2), Tile(64, 64, 32, 8, 2)),
    ("tf32", 100): (Tile(64, 64, 32, 8, 2), Tile(64, 64, 32, 8, 2), Tile(64, 64, 32, 8, 3)),
    ("ieee",): (Tile(32, 64, 16, 8, 3), Tile(32, 64, 16, 8, 3), Tile(64, 64, 16, 8, 3)),
}
_NARROW_WEIGHTS = Tile(64, 32, 16, 8, 2)


def _row(kind: Kind) -> tuple[str, int]:
    """The row of the tables.

    80 stands for all with at most 99 KiB of shared memory and no asynchronous tensor cores: 8.x and 12.x.
    """
    arch = kind.architecture
    return kind.precision, 80 if arch < 90 or arch >= 120 else 90 if arch < 100 else 100


@functools.cache
def product_tile(
    kind: Kind, batch: int, tokens: int, inner: int, columns: int, top_k: int, gradient: bool
) -> Tile:
    """The tile of the forward (or of dx), ``[B, T, inner]`` by ``[inner, columns]``: its rows are tokens."""
    precision, arch = _row(kind)
    if narrow(precision, inner, columns):
        return _NARROW_PRODUCT
    tile = _IEEE_PRODUCT
    if precision == "ieee" and gradient and top_k > UNROLLED:  # 8 bytes of spills with 8 warps
        tile = tile._replace(num_warps=4)
    if precision != "ieee":
        large, middle, small = _PRODUCTS[precision, arch]
        if gradient and (precision, arch) == ("half", 90):
            large = large._replace(BLOCK_K=32)
        filled = batch * cdiv(tokens, large.BLOCK_M) * cdiv(columns, large.BLOCK_N) >= kind.multiprocessors
        tile = large if tokens > 128 and filled else middle if tokens > 64 else small
    if 2 < top_k <= UNROLLED:  # more weight tiles in flight: shared memory
        tile = tile._replace(BLOCK_K=min(tile.BLOCK_K, 32), num_stages=2 if arch == 80 else tile.num_stages)
    return tile


@functools.cache
def weight_tile(kind: Kind, num_experts: int, d_in: int, d_out: int) -> Tile:
    """The tile of dW: rows and columns are those of the experts, the inner dimension is tokens."""
    precision, arch = _row(kind)
    if precision == "ieee":
        three, four, each = _WEIGHTS[("ieee",)]
    elif narrow(precision, d_in, d_out):
        return _NARROW_WEIGHTS
    else:
        three, four, each = _WEIGHTS[precision, arch]
    return three if num_experts <= 3 else four if num_experts <= MAX_ACCUMULATORS else each


@functools.cache
def sample_splits(kind: Kind, programs: int, samples: int, flops: float, size: int) -> int:
    """Into how many parts the samples are split, by shapes and the device alone: a fixed order of sums.

    There are ``programs`` tiles, and each takes ``flops`` over all its ``samples``. Parts fill the last wave
    of programs better, at two passes over ``size`` float32 numbers each, and together they take at most
    PARTIAL_BYTES. The rates are those of an H200: 2 TFLOP/s for a program bound by L2, 4.3 TB/s. For its 132
    multiprocessors 162 tiles are two waves, four parts of them 4.9.
    """
    most = max(1, min(16, samples, PARTIAL_BYTES // (4 * size)))

    def seconds(parts: int) -> float:
        waves = cdiv(programs * parts, kind.multiprocessors)
        return waves * flops / parts / 2e12 + (parts > 1) * parts * 8 * size / 4.3e12

    return min(range(1, most + 1), key=seconds)
