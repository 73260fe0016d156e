"""SwitchMoE from the time embedding on, against layers made of other parts and the official one."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.case import Case
from benchmarks.cases import layer_case
from benchmarks.measure import measure
from benchmarks.test_expert_linear import SHAPES


def cases(device: str, quick: bool) -> Iterator[tuple[str, Case]]:
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    for dtype in dtypes[: 1 if quick else None]:
        for batch, size in SHAPES[device][: 1 if quick else None]:
            yield "layer", layer_case(device, dtype, batch // 4 if quick else batch, 256, size)


def test_layer(benchmark, recorder, measured) -> None:
    measure(measured, benchmark, recorder)
