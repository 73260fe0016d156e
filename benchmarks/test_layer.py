"""SwitchMoE from the time embedding on, routing and experts, against layers of other parts and the official
one.

The official layer routes all 1,000 timesteps, which its prior loss needs; "switch_moe + table" does so too.
The other layers get their gates from timestep_gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import SWITCH_MOE, WITH_TABLE, Case, Contender, Inputs, Outputs
from benchmarks.peers import OFFICIAL, Peer, official_layer, peer_path
from benchmarks.test_expert_linear import SHAPES, dense_layer, linear_inputs, linear_peers
from switch_moe import SwitchMoE
from switch_moe.ops import expert_linear, timestep_gate
from switch_moe.reference.timestep_gate import timestep_gate as reference_gate

TIMESTEPS = 1000


def cases(device: str, quick: bool) -> Iterator[Case]:
    if quick:
        yield layer_case(device, torch.bfloat16 if device == "cuda" else torch.float32, 8, 256, 384)
        return
    for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):
        for batch, size in SHAPES[device]:
            yield layer_case(device, dtype, batch, 256, size)


def test_layer(bench, case, which) -> None:
    bench.measure(case, which)


def layer_case(
    device: str, dtype: torch.dtype, batch: int, tokens: int, size: int, experts: int = 3, top_k: int = 2
) -> Case:
    """One shape."""
    layer = SwitchMoE(size, experts, top_k).to(device)
    leaves = ("x", "time_table", "gate_weight", "gate_bias", "weight", "bias")

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        inputs = linear_inputs(generator, dtype, batch, tokens, size, experts)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        inputs["time_table"] = normal(TIMESTEPS, size)
        inputs["gate_weight"], inputs["gate_bias"] = normal(experts, size) / size**0.5, normal(experts)
        inputs["t"] = torch.randint(TIMESTEPS, (batch,), generator=generator, device=device)
        return inputs

    def route(i: Inputs, gate_of: Callable[..., Any], embedding: Tensor) -> tuple[Tensor, Tensor]:
        _, index, gate = gate_of(embedding, i["gate_weight"][None], i["gate_bias"][None], top_k)[:3]
        return index[0], gate[0]

    def exact(i: Inputs, _: Outputs) -> Outputs:
        index, gate = route(i, reference_gate, i["time_table"][i["t"]])
        gate = gate.to(i["time_table"].dtype)
        return (expert_linear(i["x"], i["weight"], i["bias"], index, gate, backend="reference"),)

    def run_layer(i: Inputs) -> Outputs:
        parameters = {
            "router.weight": i["gate_weight"][None], "router.bias": i["gate_bias"][None],
            "weight": i["weight"], "bias": i["bias"],
        }  # fmt: skip
        return (torch.func.functional_call(layer, parameters, (i["x"], i["time_table"][i["t"]])),)

    def run_with_table(i: Inputs) -> Outputs:
        with torch.no_grad():
            route(i, timestep_gate, i["time_table"])
        return run_layer(i)

    def of_peer(peer: Peer) -> Contender:
        def run(i: Inputs) -> Outputs:
            index, gate = route(i, timestep_gate, i["time_table"][i["t"]])
            return (peer.linear(i["x"], i["weight"], i["bias"], gate, peer.metadata(index, experts, tokens)),)

        return Contender(peer.name, run, exact, leaves, ("t",))

    contenders = [
        dense_layer(),
        Contender(SWITCH_MOE, run_layer, exact, leaves, ("t",), True),
        Contender(WITH_TABLE, run_with_table, exact, leaves, ("t",), True),
        *map(of_peer, linear_peers()),
    ]
    if peer_path(OFFICIAL) and dtype == torch.float32:
        official = official_layer(experts, top_k, size)

        def run_official(i: Inputs) -> Outputs:
            return (official(i["x"], *(i[name] for name in ("time_table", "t", *leaves[2:]))),)

        plus_one = lambda i, _: (1 + exact(i, _)[0],)  # noqa: E731
        contenders.append(Contender(OFFICIAL, run_official, plus_one, leaves, ("t",)))
    shape: dict[str, int | str] = {"D": size, "B": batch, "T": tokens, "M": experts, "k": top_k}
    return Case("layer", shape, dtype, make, contenders, {"out": "grad"})
