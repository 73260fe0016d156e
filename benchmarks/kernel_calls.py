"""Calls of every Triton kernel on meta tensors, at shapes that meet every tile: what compiled.py compiles."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from switch_moe.experts import LinearExperts, MLPExperts, RoutedExperts, TokenChoice
from switch_moe.ops.routed_mlp import ACTIVATIONS

DEPTHS = {384: 12, 768: 12, 1024: 24, 1152: 28}  # L of the published sizes, by D
DTYPES = ("float16", "bfloat16", "float32", "tf32")  # tf32: float32 of a user who allows TF32
TOKENS = (16, 32, 64, 128, 256)
EXPERTS = ((3, 2), (4, 4), (8, 8))  # M, k: kernels unroll a few of the k experts and loop over more
SCORES = ("softmax", "sigmoid", "identity")
ODD = (771, 770, 100)  # D of which no row, or not every row, is a multiple of 16 bytes
MORE_EXPERTS = ((3, 1), (3, 3), (8, 1), (8, 2), (8, 4), (16, 1), (16, 2), (16, 4))

# D, H, M, k at which the best published products over ragged routes are timed, with 5,034 rows; fewer rows
# leave 64, 32 and 16 of them to an expert on average.
ROUTED, ROWS = (2048, 768, 128, 8), (5034, 1024, 512, 256)


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def typed(operation: Callable[..., None], dtype: str, *shape: Any) -> Callable[[], None]:
    """``operation`` in one of DTYPES."""

    def call() -> None:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        operation(torch.float32 if dtype == "tf32" else getattr(torch, dtype), *shape)

    return call


def expert_linear(
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    size: int,
    experts: int,
    top_k: int,
    modulate: bool,
    train: bool,
) -> None:
    from switch_moe.kernels.dispatch import dispatch
    from switch_moe.kernels.expert_linear import backward, forward

    x = empty(dtype, batch, tokens, size)
    weight, bias = empty(dtype, experts, size, size), empty(dtype, experts, size)
    index, gate = empty(torch.int32, batch, top_k), empty(torch.float32, batch, top_k)
    chosen = LinearExperts(weight, bias, index, gate)
    schedule = dispatch(index, experts)
    _, mixture = forward(x, chosen, modulate, modulate and train, schedule)
    if train:
        backward(torch.empty_like(x), x, chosen, mixture, modulate, [True] * 4, schedule)


def expert_mlp(
    dtype: torch.dtype, batch: int, tokens: int, size: int, experts: int, top_k: int, gated: bool
) -> None:
    from switch_moe.kernels.dispatch import dispatch
    from switch_moe.kernels.expert_mlp import backward, forward

    hidden, width = 4 * size, 4 * size * (1 + gated)
    x = empty(dtype, batch, tokens, size)
    index, gate = empty(torch.int32, batch, top_k), empty(torch.float32, batch, top_k)
    weight_in, bias_in = empty(dtype, experts, size, width), empty(dtype, experts, width)
    weight_out, bias_out = empty(dtype, experts, hidden, size), empty(dtype, experts, size)
    chosen = MLPExperts(weight_in, bias_in, weight_out, bias_out, index, gate)
    schedule = dispatch(index, experts)
    _, hidden_layer = forward(x, chosen, gated, True, schedule)
    backward(torch.empty_like(x), x, chosen, hidden_layer, gated, [True] * 6, schedule)


def routed_mlp(
    dtype: torch.dtype, rows: int, size: int, hidden: int, experts: int, top_k: int, activation: str
) -> None:
    from switch_moe.kernels.routed_mlp import backward, forward

    width, pairs = hidden * (1 + activation.startswith("swiglu")), rows * top_k
    x = empty(dtype, rows, size)
    weight_in, bias_in = empty(dtype, experts, size, width), empty(dtype, experts, width)
    weight_out, bias_out = empty(dtype, experts, hidden, size), empty(dtype, experts, size)
    offsets, row, slot = (empty(torch.int32, *shape) for shape in ((experts + 1,), (pairs,), (rows, top_k)))
    chosen = RoutedExperts(
        weight_in, bias_in, weight_out, bias_out, offsets, row, slot, empty(torch.float32, pairs)
    )
    _, pre = forward(x, chosen, torch.empty_like(x), activation, True)
    backward(torch.empty_like(x), x, chosen, pre, activation, [True] * 6)


def merge_experts(dtype: torch.dtype, routes: int, size: int, experts: int, top_k: int) -> None:
    from switch_moe.kernels.merge_experts import forward

    weight, bias = empty(dtype, experts, size, size), empty(dtype, experts, size)
    forward(weight, bias, empty(torch.int32, routes, top_k), empty(torch.float32, routes, top_k))


def timestep_gate(dtype: torch.dtype, rows: int, size: int, experts: int, top_k: int, train: bool) -> None:
    from switch_moe.kernels.timestep_gate import backward, forward

    depth, single = DEPTHS[size], torch.float32
    embedding, weight = empty(dtype, rows, size), empty(single, depth, experts, size)
    probs, index, gate, _ = forward(embedding, weight, empty(single, depth, experts), top_k, True)
    if train:
        backward(torch.empty_like(probs), torch.empty_like(gate), embedding, weight, probs, index)


def diffusion_prior(dtype: torch.dtype, batch: int, depth: int, experts: int, top_k: int) -> None:
    from switch_moe.kernels.diffusion_prior import forward

    slots = depth * experts
    t, assignment = empty(torch.int64, batch), empty(torch.int64, slots)
    forward(empty(dtype, batch, slots), empty(dtype, 1000, slots), t, assignment, depth, depth * top_k)


def token_gate(dtype: torch.dtype, shape: tuple[int, int, int], *settings: Any) -> None:
    """``shape`` is that of the logits; the settings are those of TokenChoice."""
    from switch_moe.kernels.token_gate import backward, forward

    choice, logits, single = TokenChoice(*settings), empty(dtype, *shape), torch.float32
    biases = [empty(single, *size) for size in ((shape[0], shape[2]), shape[2:], shape[2:])]
    probs, chosen, gate, totals, places = forward(logits, *biases, choice)
    backward([probs, gate, totals[0]], logits, probs, chosen, places, [True, True], choice)


def route_pairs(dtype: torch.dtype, rows: int, slots: int, experts: int) -> None:
    from switch_moe.kernels.route_pairs import route_pairs as sort

    sort(empty(dtype, rows, slots), experts)


def calls(everything: bool) -> Iterator[Callable[[], None]]:
    """Every operation where its tile or its branches change, or at all the shapes above."""
    for dtype, size, tokens in itertools.product(DTYPES, DEPTHS, TOKENS):
        routings = (*EXPERTS, *MORE_EXPERTS) if everything else EXPERTS
        for experts, top_k in routings:
            both = everything or (dtype == "bfloat16" and (experts, top_k) == EXPERTS[0])
            for modulate in (False, True) if both else (True,):
                yield typed(expert_linear, dtype, 64, tokens, size, experts, top_k, modulate, True)
        for experts, top_k in routings if everything else ((8, 2),):
            for gated in (False, True) if everything or dtype != "tf32" else (True,):
                yield typed(expert_mlp, dtype, 64, tokens, size, experts, top_k, gated)
    for dtype, size, tokens in itertools.product(("bfloat16", "float32", "tf32"), ODD, (50, 256)):
        for experts, top_k in EXPERTS:
            yield typed(expert_linear, dtype, 64, tokens, size, experts, top_k, True, True)
        for gated in (False, True):
            yield typed(expert_mlp, dtype, 64, tokens, size, 8, 2, gated)
    activations = ACTIVATIONS if everything else ("gelu_erf", "swiglu")  # which take the most registers
    for activation in activations:
        for dtype, rows in itertools.product(DTYPES, ROWS):
            yield typed(routed_mlp, dtype, rows, *ROUTED, activation)
        for dtype, size, rows in itertools.product(("bfloat16", "float32", "tf32"), ODD, (50, 256)):
            yield typed(routed_mlp, dtype, 16 * rows, size, 4 * size, 32, 2, activation)
    for dtype, size, (experts, top_k) in itertools.product(("bfloat16", "float32"), (1152, 770), EXPERTS):
        yield typed(merge_experts, dtype, 1, size, experts, top_k)
    for size, depth in DEPTHS.items():
        for experts, top_k in (*EXPERTS, *MORE_EXPERTS, (64, 4)) if everything else (*EXPERTS[::2], (64, 4)):
            for dtype in DTYPES[:3] if everything or experts < 64 else ("bfloat16",):
                yield typed(timestep_gate, dtype, 1128, size, experts, top_k, True)
            yield typed(diffusion_prior, "float32", 128, depth, experts, top_k)
    for experts in (1, 3, 8, 16, 64, 256) if everything else (3, 64, 256):
        for normalise, score in itertools.product((False, True), SCORES if everything else SCORES[:1]):
            groups = 4 if normalise and experts % 4 == 0 else 1
            of_tokens = (min(2, experts), False, score, 1, normalise, 1.0, groups, min(2, groups))
            yield typed(token_gate, "bfloat16", (64, 256, experts), *of_tokens)
            for tokens in (256, 4096, 32768, 65536) if everything or experts == 64 else (256,):
                of_experts = (tokens // 8, True, score, 1, normalise, 1.0, 1, 1)
                yield typed(token_gate, "bfloat16", (2, tokens, experts), *of_experts)
        yield typed(route_pairs, "int32", 65536, 2, experts)
