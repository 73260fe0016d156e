"""expert_mlp, experts of two layers; on a CPU ours is plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.case import Case
from benchmarks.cases import mlp_case
from benchmarks.measure import measure


def cases(device: str, quick: bool) -> Iterator[tuple[str, Case]]:
    dtype, batch = (torch.bfloat16, 32) if device == "cuda" else (torch.float32, 2)
    yield "expert_mlp", mlp_case(device, dtype, batch, 256, 384, 8, 2, gated=False)
    if not quick:
        yield "expert_mlp", mlp_case(device, dtype, batch, 256, 384, 8, 2, gated=True)
    if device == "cuda" and not quick:  # what some libraries have, all of a GPU
        yield "expert_mlp", mlp_case(device, dtype, batch, 256, 384, 8, 2, gated=True, bias=False)


def test_expert_mlp(benchmark, recorder, measured) -> None:
    measure(measured, benchmark, recorder)
