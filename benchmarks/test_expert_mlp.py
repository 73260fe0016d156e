"""expert_mlp, experts of two layers with a hidden layer of 4 D."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.case import SWITCH_MOE, Case, Contender, Inputs, Outputs
from benchmarks.peers import GROUPED_MM, Peer, peers
from benchmarks.test_expert_linear import random_index
from switch_moe.ops import expert_mlp

reference = functools.partial(expert_mlp, backend="reference")
NAMES = ("weight_in", "bias_in", "weight_out", "bias_out")


def cases(device: str, quick: bool) -> Iterator[Case]:
    dtype, batch = (torch.bfloat16, 32) if device == "cuda" else (torch.float32, 2)
    yield mlp_case(device, dtype, batch, 256, 384, gated=False)
    if not quick:
        yield mlp_case(device, dtype, batch, 256, 384, gated=True)
    if device == "cuda" and not quick:
        yield mlp_case(device, dtype, batch, 256, 1152, gated=True)
        yield mlp_case(device, dtype, batch, 256, 384, gated=True, bias=False)  # what SonicMoE has


def test_expert_mlp(bench, case, which) -> None:
    bench.measure(case, which)


def mlp_case(
    device: str, dtype: torch.dtype, batch: int, tokens: int, size: int, experts: int = 8, top_k: int = 2, *,
    gated: bool, bias: bool = True,
) -> Case:  # fmt: skip
    """One shape, with GELU or (``gated``) SwiGLU."""
    hidden = 4 * size
    width = 2 * hidden if gated else hidden
    able = [GROUPED_MM, *(peer for peer in peers()[0] if peer.mlp is not None)]
    able = [peer for peer in able if not peer.only_swiglu or (gated and not bias)]
    leaves = ("x", *(name for name in NAMES if bias or "bias" not in name), "gate")

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = {
            "x": (batch, tokens, size), "weight_in": (experts, size, width), "bias_in": (experts, width),
            "weight_out": (experts, hidden, size), "bias_out": (experts, size), "grad": (batch, tokens, size),
        }  # fmt: skip
        inputs = {n: torch.randn(s, generator=generator, device=device) for n, s in shapes.items()}
        inputs["weight_in"] /= size**0.5
        inputs["weight_out"] /= hidden**0.5
        inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        for peer in able:
            if peer.only_swiglu:
                own = peer.layout(inputs["weight_in"], inputs["weight_out"])
                inputs[f"{peer.name} weight_in"], inputs[f"{peer.name} weight_out"] = own
        inputs["index"] = random_index(batch, experts, top_k, generator)
        inputs["gate"] = torch.rand(batch, top_k, generator=generator, device=device)
        return inputs

    def weights(i: Inputs) -> list[Tensor | None]:
        return [i[name] if name in leaves else None for name in NAMES]

    def call(function: Callable[..., Tensor], i: Inputs) -> Outputs:
        return (function(i["x"], *weights(i), i["index"], i["gate"], gated),)

    def exact(i: Inputs, _: Outputs) -> Outputs:
        return call(reference, i)

    def of_peer(peer: Peer) -> Contender:
        own = [f"{peer.name} weight_in", f"{peer.name} weight_out"] if peer.only_swiglu else []

        def run(i: Inputs) -> Outputs:
            metadata = peer.metadata(i["index"], experts, tokens)
            given = [i[own[0]], None, i[own[1]], None] if own else weights(i)
            return (peer.mlp(i["x"], *given, i["gate"], metadata, gated),)

        def exact_of_own(i: Inputs, _: Outputs) -> Outputs:
            weight_in, weight_out = peer.restore(i[own[0]], i[own[1]])
            return (reference(i["x"], weight_in, None, weight_out, None, i["index"], i["gate"], gated),)

        if own:
            return Contender(peer.name, run, exact_of_own, ("x", *own, "gate"), ("index",))
        return Contender(peer.name, run, exact, leaves, ("index",))

    contenders = [
        Contender(SWITCH_MOE, lambda i: call(expert_mlp, i), exact, leaves, ("index",), True),
        Contender("reference", lambda i: call(reference, i), exact, leaves, ("index",)),
        *map(of_peer, able),
    ]
    shape: dict[str, int | str] = {"D": size, "B": batch, "T": tokens, "M": experts, "k": top_k}
    shape["act"] = ("SwiGLU" if gated else "GELU") + ("" if bias else ", no bias")
    return Case("expert_mlp", shape, dtype, make, contenders, {"out": "grad"})
