"""Where merging beats grouping on this CPU, for the constants of cpu/expert_linear.py's merging_pays.

    python -m benchmarks.sweep_merging

A cell is the time of grouping over that of merging, forward + backward; a star marks where merging_pays is
wrong.
"""

from __future__ import annotations

import itertools
from unittest import mock

import torch

from benchmarks.timing import Timed, time_together
from switch_moe.cpu import expert_linear as cpu
from switch_moe.experts import LinearExperts

TOKENS = (4, 8, 16, 32, 64, 128, 256)


def ratio(tokens: int, size: int, num_experts: int, top_k: int, dtype: torch.dtype) -> float:
    """The median over rounds of the time of grouping over that of merging."""
    batch = max(8, min(128, (1 << 21) // (tokens * size)))
    x, grad = torch.randn(2, batch, tokens, size).to(dtype)
    weight = (torch.randn(num_experts, size, size) / size**0.5).to(dtype)
    index = torch.rand(batch, num_experts).argsort(1)[:, :top_k].int().contiguous()
    experts = LinearExperts(weight, None, index, torch.rand(batch, top_k))

    def run(pays: bool) -> None:
        with mock.patch.object(cpu, "merging_pays", return_value=pays):
            cpu.forward(x, experts, False, False)
            cpu.backward(grad, x, experts, None, False, [True, True, False, True])

    timed = time_together({pays: [lambda pays=pays: run(pays)] for pays in (False, True)}, "cpu", seconds=0.5)
    grouped, merged = timed[False], timed[True]
    assert isinstance(grouped, Timed)
    assert isinstance(merged, Timed)
    return float((torch.tensor(grouped.seconds) / torch.tensor(merged.seconds)).median())


def main() -> None:
    torch.manual_seed(0)
    print(f"{'D':>5} {'k of M':>7} {'':>9} " + " ".join(f"T={tokens:<5}" for tokens in TOKENS))
    shapes = itertools.product((128, 192, 256, 384, 768, 1152), ((1, 3), (2, 3), (4, 8)))
    for (size, (top_k, num_experts)), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        cells = []
        for tokens in TOKENS:
            measured = ratio(tokens, size, num_experts, top_k, dtype)
            pays = cpu.merging_pays(tokens, top_k, size, size, dtype, cpu.vector_width(dtype) > 0)
            cells.append(f"{measured:5.2f}{'*' if (measured > 1) != pays else ' '} ")
        name = str(dtype).removeprefix("torch.")
        print(f"{size:>5} {top_k:>3} of {num_experts} {name:>9} " + " ".join(cells), flush=True)


if __name__ == "__main__":
    main()
