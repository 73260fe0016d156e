"""expert_linear against a dense linear layer, a loop over experts, grouped products and libraries."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.case import Case
from benchmarks.cases import linear_case
from benchmarks.measure import measure

SHAPES = {
    "cpu": ((32, 384), (16, 768), (8, 1152)),
    "cuda": ((128, 384), (128, 768), (128, 1024), (128, 1152)),
}


def cases(device: str, quick: bool) -> Iterator[tuple[str, Case]]:
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for batch, size in SHAPES[device][: 1 if quick else None]:
            batch = batch // 4 if quick else batch
            yield "expert_linear", linear_case(device, dtype, batch, 256, size, compiled=size == 768)
        if not quick:
            yield "expert_linear", linear_case(device, dtype, 64, 16, 384)  # few tokens: grouped, not merged


def test_expert_linear(benchmark, recorder, measured) -> None:
    measure(measured, benchmark, recorder)
