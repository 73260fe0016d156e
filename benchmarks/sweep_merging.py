"""Where merging experts beats grouping samples by expert: the measurement behind ``merging_pays``.

    python -m benchmarks.sweep_merging                 # forward + backward, ratios grouped / merged

A ratio above 1 means merging was faster; a star marks the shapes that ``merging_pays`` decides wrongly.
"""

from __future__ import annotations

import itertools

import torch

from benchmarks.timing import interleaved_medians
from switch_moe.ops.expert_linear import (
    _fused_backward,
    _grouped_backward,
    _grouped_forward,
    _lanes,
    _merged_backward,
    _merged_forward,
    merging_pays,
)

WANTED = [True, True, False, True]


def main() -> None:
    torch.manual_seed(0)
    print(
        f"{'D':>5} {'k of M':>7} {'B':>4} "
        + " ".join(f"T={tokens:<10}" for tokens in (4, 8, 16, 32, 64, 128, 256))
    )
    for size, (top_k, experts), dtype in itertools.product(
        (128, 192, 256, 384, 768, 1152), ((1, 3), (2, 3), (4, 8)), (torch.float32, torch.bfloat16)
    ):
        cells = []
        for tokens in (4, 8, 16, 32, 64, 128, 256):
            batch = max(8, min(128, (1 << 21) // (tokens * size)))
            x = torch.randn(batch, tokens, size).to(dtype)
            grad = torch.randn_like(x)
            weight = (torch.randn(experts, size, size) / size**0.5).to(dtype)
            index = torch.rand(batch, experts).argsort(1)[:, :top_k].int().contiguous()
            gate = torch.rand(batch, top_k)
            lanes = _lanes(dtype)
            backward = _fused_backward if lanes else _merged_backward
            found = interleaved_medians(
                {
                    "merged": lambda: (
                        _merged_forward(x, weight, None, index, gate, [1] * batch, lanes),  # noqa: B023
                        backward(grad, x, weight, index, gate, WANTED),  # noqa: B023
                    ),
                    "grouped": lambda: (
                        _grouped_forward(x, weight, None, index, gate),  # noqa: B023
                        _grouped_backward(grad, x, weight, index, gate, WANTED),  # noqa: B023
                    ),
                },
                rounds=7,
            )
            ratio = found["grouped"] / found["merged"]
            wrong = (ratio > 1) != merging_pays(tokens, top_k, size, size, dtype, lanes > 0)
            cells.append(f"{ratio:5.2f}{'*' if wrong else ' '}{batch:>4}  ")
        print(
            f"{size:>5} {top_k:>3} of {experts} {str(dtype).removeprefix('torch.'):>9} " + " ".join(cells),
            flush=True,
        )


if __name__ == "__main__":
    main()
