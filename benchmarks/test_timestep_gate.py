"""timestep_gate: the routing of all blocks in one call, of all timesteps and a batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.case import SWITCH_MOE, Case, Contender, Inputs, Outputs
from switch_moe.ops import timestep_gate
from switch_moe.reference.timestep_gate import timestep_gate as reference_gate


def cases(device: str, quick: bool) -> Iterator[Case]:
    for depth, size in ((12, 384), (28, 1152))[: 1 if quick else None]:
        yield gate_case(device, 1000 + 128, size, depth)


def test_timestep_gate(bench, case, which) -> None:
    bench.measure(case, which)


def gate_case(device: str, rows: int, size: int, depth: int, experts: int = 3, top_k: int = 2) -> Case:
    """Routers of ``depth`` blocks for ``rows`` embeddings."""

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = {
            "embedding": (rows, size), "weight": (depth, experts, size), "bias": (depth, experts),
            "grad_probs": (depth, rows, experts), "grad_gate": (depth, rows, top_k),
        }  # fmt: skip
        inputs = {n: torch.randn(s, generator=generator, device=device) for n, s in shapes.items()}
        inputs["weight"] /= size**0.5
        return inputs

    def one_call(i: Inputs) -> Outputs:
        probs, _, gate = timestep_gate(i["embedding"], i["weight"], i["bias"], top_k)
        return probs, gate

    def reference(i: Inputs) -> Outputs:
        probs, _, gate = reference_gate(i["embedding"], i["weight"], i["bias"], top_k)
        return probs, gate

    def each_block(i: Inputs) -> Outputs:
        each = [
            timestep_gate(i["embedding"], i["weight"][j : j + 1], i["bias"][j : j + 1], top_k)
            for j in range(depth)
        ]
        return torch.cat([probs for probs, _, _ in each]), torch.cat([gate for _, _, gate in each])

    def exact(i: Inputs, _: Outputs) -> Outputs:
        return reference(i)

    leaves = ("embedding", "weight", "bias")
    contenders = [
        Contender(SWITCH_MOE, one_call, exact, leaves, (), True),
        Contender("reference", reference, exact, leaves, ()),
        Contender("a call for each block", each_block, exact, leaves, ()),
    ]
    shape: dict[str, int | str] = {"D": size, "L": depth, "rows": rows, "M": experts, "k": top_k}
    outputs = {"probs": "grad_probs", "gate": "grad_gate"}
    return Case("timestep_gate", shape, torch.float32, make, contenders, outputs)
