"""Merged weights in memory, for samples that share a route: one launch for the matrices and the biases."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch
from ._tile import chosen

_BLOCK = 1024


@triton.jit
def _merge_block(
    source_ptr, out_ptr, index_ptr, gate_ptr, route, block, SIZE: tl.constexpr, M: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one merged row of ``SIZE``."""
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    merged = tl.zeros([BLOCK], tl.float32)
    for j in range(TOP_K):
        expert, gate = chosen(index_ptr, gate_ptr, route * TOP_K + j, M)
        merged += gate * tl.load(source_ptr + expert * SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    tl.store(out_ptr + route.to(tl.int64) * SIZE + i, merged.to(out_ptr.dtype.element_ty), mask=i < SIZE)


@triton.jit
def _merge_kernel(
    weight_ptr, bias_ptr, index_ptr, gate_ptr, merged_ptr, shift_ptr, SIZE: tl.constexpr,
    BIAS_SIZE: tl.constexpr, M: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``merged_r = sum_j gate_rj weight_index_rj`` and the same of the biases, BIAS_SIZE 0 for none.

    A program owns BLOCK numbers of one route, of its matrix or of its bias.
    """
    WEIGHT_BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    BLOCKS: tl.constexpr = WEIGHT_BLOCKS + (BIAS_SIZE + BLOCK - 1) // BLOCK
    route, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    if block < WEIGHT_BLOCKS:
        _merge_block(weight_ptr, merged_ptr, index_ptr, gate_ptr, route, block, SIZE, M, TOP_K, BLOCK)
    else:
        _merge_block(
            bias_ptr, shift_ptr, index_ptr, gate_ptr, route, block - WEIGHT_BLOCKS, BIAS_SIZE, M, TOP_K, BLOCK
        )


def forward(weight: Tensor, bias: Tensor | None, index: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """``[R, Din, Dout]`` and ``[R, Dout]``, the second empty without a bias; arguments contiguous."""
    (num_experts, d_in, d_out), (routes, top_k) = weight.shape, index.shape
    merged = weight.new_empty(routes, d_in, d_out)
    shift = weight.new_empty((routes, d_out) if bias is not None else 0)
    bias_size = 0 if bias is None else d_out
    launch(
        _merge_kernel, routes * (cdiv(d_in * d_out, _BLOCK) + cdiv(bias_size, _BLOCK)),
        weight, weight if bias is None else bias, index, gate, merged, merged if bias is None else shift,
        SIZE=d_in * d_out, BIAS_SIZE=bias_size, M=num_experts, TOP_K=top_k, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return merged, shift
