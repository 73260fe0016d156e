"""Timestep routing in Triton: all gates of all blocks in one launch, and their gradients in two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _every_fourth(x, A: tl.constexpr, B: tl.constexpr):
    """[A, B, 128] as four [A, B, 32]; a thread that loaded 4 neighbours gets one of each: nothing moves."""
    even, odd = tl.split(tl.reshape(x, [A, B, 32, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    embedding_ptr, weight_ptr, bias_ptr, probs_ptr, index_ptr, gate_ptr, selected_ptr, rows,
    L: tl.constexpr, M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, SELECTED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """p = softmax(SiLU(e) W^T + b), and its K largest entries with their indices.

    Inputs are e [N', D], W [L, M, D] and b [L, M]; outputs are probs [L, N', M], index and gate [L, N', K],
    and with SELECTED the 0/1 table [N', L*M]. MP is M up to a power of two.

    A program owns BLOCK_N rows and BLOCK_L blocks (C = BLOCK_L * MP columns). It reads embedding [BLOCK_N, D]
    and weight [C, D] once, and writes all outputs of its tile. Each lane of the one warp sums its own
    channels of every product, 4 neighbours of each 128, so operands go from global memory to registers. A
    tl.dot in float32 stages them in shared memory, where reads down a column conflict 4 and 8 ways.
    """
    LB: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    C: tl.constexpr = BLOCK_L * MP
    l0 = tl.program_id(0) % LB * BLOCK_L
    n0 = tl.program_id(0) // LB * BLOCK_N
    rn = tl.arange(0, BLOCK_N)[:, None, None]
    rd = tl.arange(0, 128)[None, None, :]
    column = tl.arange(0, C)
    block, expert = l0 + column // MP, column % MP
    real = (block < L) & (expert < M)
    e_tile = embedding_ptr + n0.to(tl.int64) * D + rn * D + rd
    w_tile = weight_ptr + (block * M + expert)[None, :, None] * D + rd
    acc = tl.zeros([BLOCK_N, C, 32], tl.float32)
    for d0 in range(0, D, 128):
        e_mask = rn < rows - n0
        w_mask = real[None, :, None]
        if D % 128 != 0:
            e_mask = e_mask & (rd < D - d0)
            w_mask = w_mask & (rd < D - d0)
        e = tl.load(e_tile + d0, mask=e_mask, other=0.0).to(tl.float32)
        w = tl.load(w_tile + d0, mask=w_mask, other=0.0)
        h0, h1, h2, h3 = _every_fourth(_silu(e), BLOCK_N, 1)
        w0, w1, w2, w3 = _every_fourth(w, 1, C)
        acc += h0 * w0
        acc += h1 * w1
        acc += h2 * w2
        acc += h3 * w3
    # A lane knows the expert of every column at compile time: with this the padding of M costs no product.
    acc = tl.where((expert < M)[None, :, None], acc, 0.0)
    # After the sum every lane holds the whole tile. The gather deals it out, so that the rest is done once,
    # not by all 32 lanes: 1,256 machine instructions in all for L = 28, M = 3; without it about 3,000.
    flat = tl.gather(tl.reshape(tl.sum(acc, 2), [BLOCK_N * C]), tl.arange(0, BLOCK_N * C), 0)
    bias = tl.load(bias_ptr + block * M + expert, mask=real, other=0.0)
    logits = tl.reshape(tl.reshape(flat, [BLOCK_N, C]) + bias[None, :], [BLOCK_N, BLOCK_L, MP])

    rm = tl.arange(0, MP)[None, None, :]
    rl = l0 + tl.arange(0, BLOCK_L)[None, :, None]
    logits = tl.where(rm < M, logits, float("-inf"))
    power = tl.exp(logits - tl.max(logits, 2)[:, :, None])
    probs = power / tl.sum(power, 2)[:, :, None]
    row = rl.to(tl.int64) * rows + n0 + rn
    mask = (rl < L) & (rn < rows - n0)
    tl.store(probs_ptr + row * M + rm, probs, mask=mask & (rm < M))
    # NaN ranks first, as in torch.sort, and K <= M: an index can only name an expert.
    key = tl.where(rm < M, tl.where(probs == probs, probs, 2.0), -1.0)
    for j in tl.static_range(K):
        best = tl.min(tl.where(key == tl.max(key, 2)[:, :, None], rm, MP), 2)[:, :, None]
        gate = tl.sum(tl.where(rm == best, probs, 0.0), 2)[:, :, None]
        tl.store(index_ptr + row * K + j, best, mask=mask)
        tl.store(gate_ptr + row * K + j, gate, mask=mask)
        key = tl.where(rm == best, -1.0, key)
    if SELECTED:
        place = (n0 + rn).to(tl.int64) * (L * M) + rl * M + rm
        tl.store(selected_ptr + place, tl.where(key < 0, 1.0, 0.0), mask=mask & (rm < M))


@triton.jit
def _grad_logits(
    grad_probs_ptr, grad_gate_ptr, probs_ptr, index_ptr, rows, n0, l0,
    L: tl.constexpr, M: tl.constexpr, K: tl.constexpr, FROM_PROBS: tl.constexpr, FROM_GATE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """p * (g - <g, p>) as [BLOCK_N, BLOCK_L * MP], where g is the gradient of p, with that of the gates."""
    rn = tl.arange(0, BLOCK_N)[:, None, None]
    rl = l0 + tl.arange(0, BLOCK_L)[None, :, None]
    rm = tl.arange(0, MP)[None, None, :]
    row = rl.to(tl.int64) * rows + n0 + rn
    mask = (rl < L) & (rn < rows - n0)
    entries = mask & (rm < M)
    probs = tl.load(probs_ptr + row * M + rm, mask=entries, other=0.0)
    if FROM_PROBS:
        grad = tl.load(grad_probs_ptr + row * M + rm, mask=entries, other=0.0)
    else:
        grad = tl.zeros([BLOCK_N, BLOCK_L, MP], tl.float32)
    if FROM_GATE:
        for j in tl.static_range(K):
            chosen = tl.load(index_ptr + row * K + j, mask=mask, other=-1)
            grad += tl.where(rm == chosen, tl.load(grad_gate_ptr + row * K + j, mask=mask, other=0.0), 0.0)
    grad = probs * (grad - tl.sum(grad * probs, 2)[:, :, None])
    return tl.reshape(grad, [BLOCK_N, BLOCK_L * MP])


@triton.jit(do_not_specialize=["rows"])
def _grad_weight_kernel(
    grad_probs_ptr, grad_gate_ptr, embedding_ptr, probs_ptr, index_ptr, grad_weight_ptr, grad_bias_ptr, rows,
    L: tl.constexpr, M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, FROM_PROBS: tl.constexpr,
    FROM_GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, MP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dW = dlogits^T SiLU(e) [L, M, D], db = sum of dlogits over the rows [L, M].

    A program owns [BLOCK_L * MP, BLOCK_D] of dW, and with the first channels also its part of db. It passes
    over all rows of the embedding's BLOCK_D channels, in order.
    """
    DB: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    l0 = tl.program_id(0) // DB * BLOCK_L
    d0 = tl.program_id(0) % DB * BLOCK_D
    rn = tl.arange(0, BLOCK_N)[:, None]
    rd = d0 + tl.arange(0, BLOCK_D)[None, :]
    column = tl.arange(0, BLOCK_L * MP)
    block, expert = l0 + column // MP, column % MP
    real = (block < L) & (expert < M)
    grad_weight = tl.zeros([BLOCK_D, BLOCK_L * MP], tl.float32)  # transposed, see below
    grad_bias = tl.zeros([BLOCK_L * MP], tl.float32)
    for n0 in range(0, rows, BLOCK_N):
        grad = _grad_logits(
            grad_probs_ptr, grad_gate_ptr, probs_ptr, index_ptr, rows, n0, l0, L, M, K, FROM_PROBS, FROM_GATE,
            BLOCK_N, BLOCK_L, MP,
        )  # fmt: skip
        e_tile = embedding_ptr + (n0 + rn).to(tl.int64) * D + rd
        e = tl.load(e_tile, mask=(rn < rows - n0) & (rd < D), other=0.0).to(tl.float32)
        # The 32 channels are the rows: for 64 rows, Triton 3.6 and 3.7 multiply in TF32 on sm_100.
        grad_weight = tl.dot(tl.trans(_silu(e)), grad, grad_weight, input_precision="ieee")
        grad_bias += tl.sum(grad, 0)
    place = block * M + expert
    grad_weight = tl.trans(grad_weight)
    tl.store(grad_weight_ptr + place[:, None] * D + rd, grad_weight, mask=real[:, None] & (rd < D))
    if d0 == 0:
        tl.store(grad_bias_ptr + place, grad_bias, mask=real)


@triton.jit(do_not_specialize=["rows"])
def _grad_embedding_kernel(
    grad_probs_ptr, grad_gate_ptr, embedding_ptr, weight_ptr, probs_ptr, index_ptr, grad_embedding_ptr, rows,
    L: tl.constexpr, M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, FROM_PROBS: tl.constexpr,
    FROM_GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, MP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """de = (sum over the blocks of dlogits W) * SiLU'(e) [N', D].

    A program owns [BLOCK_N, BLOCK_D] of de. It reads BLOCK_D channels of all weights, BLOCK_L blocks at a
    time, in order.
    """
    DB: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    n0 = tl.program_id(0) // DB * BLOCK_N
    d0 = tl.program_id(0) % DB * BLOCK_D
    rn = tl.arange(0, BLOCK_N)[:, None]
    rd = d0 + tl.arange(0, BLOCK_D)[None, :]
    column = tl.arange(0, BLOCK_L * MP)[:, None]
    block, expert = column // MP, column % MP
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for l0 in range(0, L, BLOCK_L):
        grad = _grad_logits(
            grad_probs_ptr, grad_gate_ptr, probs_ptr, index_ptr, rows, n0, l0, L, M, K, FROM_PROBS, FROM_GATE,
            BLOCK_N, BLOCK_L, MP,
        )  # fmt: skip
        real = (l0 + block < L) & (expert < M) & (rd < D)
        w = tl.load(weight_ptr + ((l0 + block) * M + expert) * D + rd, mask=real, other=0.0)
        acc = tl.dot(grad, w, acc, input_precision="ieee")
    place = n0.to(tl.int64) * D + rn * D + rd
    mask = (rn < rows - n0) & (rd < D)
    e = tl.load(embedding_ptr + place, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(e)
    acc *= sigmoid * (1 + e * (1 - sigmoid))
    tl.store(grad_embedding_ptr + place, acc.to(grad_embedding_ptr.dtype.element_ty), mask=mask)


def _tile(num_experts: int, columns: int) -> tuple[dict[str, int], int]:
    """Blocks of a tile of ``columns`` columns, or one block if that takes more, and how many columns it has.

    The experts of a block are padded to a power of two. Tiles with more columns get fewer rows below, so that
    nothing spills for up to 64 experts.
    """
    padded = 1 << (num_experts - 1).bit_length()
    return {"BLOCK_L": max(1, columns // padded), "MP": padded}, max(columns, padded)


def forward(
    embedding: Tensor, weight: Tensor, bias: Tensor, top_k: int, selected: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """probs [L, N', M], expert_index and expert_gate [L, N', k], and the 0/1 table [N', L*M] or [0]."""
    depth, experts, size = weight.shape
    rows = embedding.shape[0]
    probs = weight.new_empty(depth, rows, experts)
    index = weight.new_empty(depth, rows, top_k, dtype=torch.int32)
    gate = weight.new_empty(depth, rows, top_k)
    table = weight.new_empty((rows, depth * experts) if selected else 0)
    # 64 sums a lane leave room for 12 warps on a multiprocessor; 2,198 programs for N' = 1256, L = 28, M = 3.
    tile, columns = _tile(experts, 16)
    block_n = max(1, 64 // columns)
    launch(
        _forward_kernel, cdiv(rows, block_n) * cdiv(depth, tile["BLOCK_L"]),
        embedding, weight, bias, probs, index, gate, table if selected else probs, rows,
        L=depth, M=experts, D=size, K=top_k, SELECTED=selected, BLOCK_N=block_n, **tile,
        num_warps=columns // 16 if block_n == 1 else 1, num_stages=1,
    )  # fmt: skip
    return probs, index, gate, table


def backward(
    grad_probs: Tensor | None, grad_gate: Tensor | None, embedding: Tensor, weight: Tensor, probs: Tensor,
    index: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of embedding, weight and bias; a gradient that is None counts as zero."""
    depth, experts, size = weight.shape
    rows = embedding.shape[0]
    grad_embedding, grad_weight = torch.empty_like(embedding), torch.empty_like(weight)
    grad_bias = weight.new_empty(depth, experts)
    grads = (probs if grad_probs is None else grad_probs, probs if grad_gate is None else grad_gate)
    common = {
        "L": depth, "M": experts, "D": size, "K": index.shape[2],
        "FROM_PROBS": grad_probs is not None, "FROM_GATE": grad_gate is not None,
    }  # fmt: skip
    tile, columns = _tile(experts, 16)
    launch(
        _grad_weight_kernel, cdiv(depth, tile["BLOCK_L"]) * cdiv(size, 32),
        *grads, embedding, probs, index, grad_weight, grad_bias, rows,
        **common, BLOCK_N=max(16, 512 // columns), **tile, BLOCK_D=32,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    tile, _ = _tile(experts, 32)
    launch(
        _grad_embedding_kernel, cdiv(rows, 16) * cdiv(size, 64),
        *grads, embedding, weight, probs, index, grad_embedding, rows,
        **common, BLOCK_N=16, **tile, BLOCK_D=64, num_warps=4, num_stages=1,
    )  # fmt: skip
    return grad_embedding, grad_weight, grad_bias
