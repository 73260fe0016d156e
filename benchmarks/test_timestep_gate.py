"""timestep_gate: the routing of all blocks in one call against a call for each block, forward + backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks.timing import interleaved_medians
from switch_moe.ops import timestep_gate

ROWS = 1000 + 128  # all timesteps and a batch


@pytest.mark.parametrize(("depth", "size"), [(12, 384), (28, 1152)], ids=["S", "XL"])
def test_timestep_gate(benchmark, ratios: list[str], depth: int, size: int) -> None:
    torch.manual_seed(0)
    embedding = torch.randn(ROWS, size, requires_grad=True)
    weight = torch.randn(depth, 3, size, requires_grad=True)
    bias = torch.randn(depth, 3, requires_grad=True)

    def one_call() -> None:
        timestep_gate(embedding, weight, bias, 2)[0].square().sum().backward()

    def call_for_each_block() -> None:
        probs = [timestep_gate(embedding, weight[i : i + 1], bias[i : i + 1], 2)[0] for i in range(depth)]
        torch.cat(probs).square().sum().backward()

    benchmark.group = f"L = {depth}, D = {size}"
    benchmark(one_call)
    medians = interleaved_medians({"one": one_call, "each": call_for_each_block})
    ratios.append(
        f"timestep_gate L={depth} D={size}: one call takes {medians['one'] / medians['each']:.2f} of L calls"
    )
