"""What the GPU report measures, in its order, and the same at tiny shapes.

python -m benchmarks.plans --small       # our kernels at tiny shapes, checked: for compute-sanitizer
python -m benchmarks.plans --warm 1/8    # compile every 8th case's kernels into the caches on disk
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

import torch

from benchmarks.case import ANY_K, COMPILED, Case, check
from benchmarks.cases import (
    assignment_case,
    dispatch_case,
    gate_case,
    layer_case,
    linear_case,
    matching_case,
    mlp_case,
)


def full_plan(device: str) -> Iterator[Case]:
    """All that the report measures, the most important first."""
    bf16 = torch.bfloat16
    for size in (1152, 384, 768, 1024):
        for batch in (128, 256, 64, 32):
            yield linear_case(device, bf16, batch, 256, size)
    for routing in ("random", "fresh"):
        yield matching_case(device, 28, 256, routing)
    yield gate_case(device, 1256, 1152, 28)
    yield gate_case(device, 1256, 384, 12)
    for experts in (3, 4, 8, 16):
        yield linear_case(device, bf16, 128, 256, 1152, experts, range(1, experts + 1), note=ANY_K)
    for tokens in (64, 16):
        yield linear_case(device, bf16, 128, tokens, 1152)
    for size in (1152, 384):
        for gated in (False, True):
            yield mlp_case(device, bf16, 32, 256, size, 8, 2, gated)
    yield dispatch_case(device, 128, 3, 2)
    yield dispatch_case(device, 128, 16, 16)
    for experts in (3, 4, 8, 16):
        yield linear_case(device, bf16, 128, 256, 384, experts, range(1, experts + 1), note=ANY_K)
    for size in (1152, 384, 768, 1024):
        yield linear_case(device, bf16, 128, 256, size, note=COMPILED)


def tiny_plan(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """The same at sizes that take no time: for tests without a GPU, and for compute-sanitizer."""
    yield linear_case(device, dtype, 5, 24, 48)
    yield matching_case(device, 4, 6, "random")
    yield matching_case(device, 4, 6, "fresh")
    yield matching_case(device, 4, 6, "smooth", loss=False)
    yield assignment_case(device, 9)
    yield layer_case(device, dtype, 4, 6, 16)
    yield mlp_case(device, dtype, 3, 16, 32, 4, 2, gated=True, bias=False)
    yield gate_case(device, 37, 40, 3)
    yield linear_case(device, dtype, 4, 20, 32, 4, range(1, 5), note=ANY_K)
    yield mlp_case(device, dtype, 3, 16, 32, 4, 2, gated=False)
    yield mlp_case(device, dtype, 3, 16, 32, 4, 2, gated=True)
    yield dispatch_case(device, 9, 4, 2)
    yield linear_case(device, dtype, 3, 16, 32, note=COMPILED)


def run_small(device: str, dtype: torch.dtype) -> list[str]:
    """Our contenders of the tiny plan; what is right is computed on the host. Returns what is wrong."""
    wrong = []
    for case in tiny_plan(device, dtype):
        for contender in case.contenders:
            if contender.ours:
                failure = check(case, contender, case.make(0), host=True)["failure"]
                wrong += [f"{case.name}, {contender.name}: {failure}"] if failure else []
    return wrong


def warm_up(device: str, part: int, parts: int) -> None:
    """Runs our contenders and compiled ones once, so that others find their kernels in the caches on disk."""
    pairs = [(case, contender) for case in full_plan(device) for contender in case.contenders]
    pairs = [(a, b) for a, b in pairs if b.ours or b.name == COMPILED]
    for case, contender in pairs[part - 1 :: parts]:
        inputs = case.make(0)
        for which in case.passes:
            with contextlib.suppress(Exception):  # the report runs it too, and says what it raised
                case.step(contender, inputs, which)()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--warm", metavar="I/N")
    arguments = parser.parse_args()
    if arguments.warm:
        warm_up("cuda", *(int(number) for number in arguments.warm.split("/")))
    wrong = run_small("cuda", torch.bfloat16) if arguments.small else []
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
