"""expert_linear against one dense layer, a loop over experts, grouped products and libraries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import (
    COMPILED,
    LINEAR,
    MODULATED,
    SWITCH_MOE,
    WITH_CUDA,
    Case,
    Contender,
    Inputs,
    Outputs,
)
from benchmarks.environment import measures_cuda_kernels
from benchmarks.peers import EXPERT_LOOP, GROUPED_MM, Peer, peers
from switch_moe.ops import expert_linear

reference = functools.partial(expert_linear, backend="reference")
SHAPES = {  # B, D; the tokens T are 256
    "cpu": ((32, 384), (16, 768), (8, 1152)),
    "cuda": ((128, 384), (128, 768), (128, 1024), (128, 1152)),
}


def cases(device: str, quick: bool) -> Iterator[Case]:
    for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):
        if quick:
            yield linear_case(device, dtype, 8, 256, 384)
            continue
        for batch, size in SHAPES[device]:
            yield linear_case(device, dtype, batch, 256, size, compiled=size == 768)
        yield linear_case(device, dtype, 64, 16, 384)  # few tokens
        if device == "cuda":
            for batch in (64, 32):
                yield linear_case(device, dtype, batch, 256, 1152)


def test_expert_linear(bench, case, which) -> None:
    bench.measure(case, which)


def linear_case(
    device: str, dtype: torch.dtype, batch: int, tokens: int, size: int, experts: int = 3, top_k: int = 2,
    compiled: bool = False,
) -> Case:  # fmt: skip
    """One shape; ``compiled`` adds the reference under torch.compile, which takes half a minute."""

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        inputs = linear_inputs(generator, dtype, batch, tokens, size, experts)
        inputs["index"] = random_index(batch, experts, top_k, generator)
        inputs["gate"] = torch.rand(batch, top_k, generator=generator, device=device)
        return inputs

    def call(function: Callable[..., Tensor], i: Inputs, **options: bool | str) -> Outputs:
        return (function(i["x"], i["weight"], i["bias"], i["index"], i["gate"], **options),)

    def exact(i: Inputs, _: Outputs) -> Outputs:
        return call(reference, i)

    def of_peer(peer: Peer) -> Contender:
        def run(i: Inputs) -> Outputs:
            metadata = peer.metadata(i["index"], experts, tokens)
            return (peer.linear(i["x"], i["weight"], i["bias"], i["gate"], metadata),)

        return Contender(peer.name, run, exact, leaves, ("index",))

    def modulated(i: Inputs, _: Outputs) -> Outputs:
        return call(reference, i, modulate=True)

    def of_switch_moe(backend: str) -> list[Contender]:
        def run(i: Inputs) -> Outputs:
            return call(expert_linear, i, backend=backend)

        def run_modulated(i: Inputs) -> Outputs:
            return call(expert_linear, i, modulate=True, backend=backend)

        name = WITH_CUDA if backend == "cuda" else ""
        return [
            Contender(SWITCH_MOE + name, run, exact, leaves, ("index",), True),
            Contender(MODULATED + name, run_modulated, modulated, leaves, ("index",), True),
        ]

    leaves = ("x", "weight", "bias", "gate")
    contenders = [
        dense_layer(),
        *(one for backend in backends(device) for one in of_switch_moe(backend)),
        *(of_peer(peer) for peer in linear_peers()),
    ]  # fmt: skip
    if compiled:
        function = torch.compile(reference, dynamic=False)
        contenders.append(Contender(COMPILED, lambda i: call(function, i), exact, leaves, ("index",)))
    shape: dict[str, int | str] = {"D": size, "B": batch, "T": tokens, "M": experts, "k": top_k}
    return Case("expert_linear", shape, dtype, make, contenders, {"out": "grad"})


def backends(device: str) -> tuple[str, ...]:
    """Both kinds of kernels where both run, so that each is measured; else what auto takes."""
    return ("triton", "cuda") if device == "cuda" and measures_cuda_kernels() else ("auto",)


def dense_layer() -> Contender:
    """One linear layer without experts: the limit, since a mixture does its work and more."""

    def run(i: Inputs) -> Outputs:
        return (F.linear(i["x"], i["linear_weight"], i["linear_bias"]),)

    return Contender(LINEAR, run, lambda i, _: run(i), ("x", "linear_weight", "linear_bias"), ())


def linear_peers() -> list[Peer]:
    """Those that compute expert_linear."""
    return [EXPERT_LOOP, GROUPED_MM, *(peer for peer in peers()[0] if peer.linear is not None)]


def linear_inputs(
    generator: torch.Generator, dtype: torch.dtype, batch: int, tokens: int, size: int, experts: int
) -> Inputs:
    """Tokens, experts, a linear layer and a gradient, of unit scale."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)

    return {
        "x": normal(batch, tokens, size),
        "weight": normal(experts, size, size) / size**0.5,
        "bias": normal(experts, size),
        "grad": normal(batch, tokens, size),
        "linear_weight": normal(size, size) / size**0.5,
        "linear_bias": normal(size),
    }


def random_index(batch: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Different experts for each sample, ``[B, k]`` int32."""
    scores = torch.rand(batch, experts, generator=generator, device=generator.device)
    return scores.argsort(1)[:, :top_k].int().contiguous()
