"""The calls that compare.py times in two revisions. It runs as a script with PYTHONPATH at a revision's tree:
``timing`` is the module beside this file, switch_moe the revision's. Outside host_time it uses the public API
alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import Sampler, sampler

import switch_moe
from switch_moe import ops

DEVICE = sys.argv[1]
DTYPES = (torch.bfloat16,) if DEVICE == "cuda" else (torch.float32, torch.bfloat16)
LARGER = 16 if DEVICE == "cuda" else 1
IDLE = 0.01  # seconds; the threads of the other process spin for a while after its call


def experts(dtype: torch.dtype, batch: int, tokens: int, *sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """x, the tensors of ``sizes``, index and gate; three experts, two chosen."""
    batch *= LARGER
    tensors = [torch.randn(size, device=DEVICE) / size[-1] ** 0.5 for size in sizes]
    x = torch.randn(batch, tokens, sizes[0][1], device=DEVICE)
    index = torch.rand(batch, 3, device=DEVICE).argsort(1)[:, :2].int().contiguous()
    floats = [tensor.to(dtype).requires_grad_() for tensor in (x, *tensors)]
    return [*floats, index, torch.rand(batch, 2, device=DEVICE, requires_grad=True)]


def both(function: Callable[..., Any], arguments: list[Any]) -> Callable[[], Any]:
    """Forward and backward of the first output."""
    leaves = [one for one in arguments if isinstance(one, torch.Tensor) and one.requires_grad]

    def run() -> Any:
        out = function(*arguments)
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out, leaves, out.detach(), allow_unused=True)

    return run


def host_time() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The Python of the kernels of expert_linear, on meta tensors and with launches left out."""
    kernels = importlib.import_module("switch_moe.kernels.expert_linear")
    experts = importlib.import_module("switch_moe.experts").LinearExperts
    for name, module in list(sys.modules.items()):
        if name.startswith("switch_moe.kernels.") and hasattr(module, "launch"):
            module.launch = lambda *_, **__: None

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, gate = empty(64, 256, 384), empty(64, 2, dtype=torch.float32)
    chosen = experts(empty(3, 384, 384), empty(3, 384), empty(64, 2, dtype=torch.int32), gate)

    def forward() -> Any:
        return kernels.forward(x, chosen, True, True)

    yield "Python of the kernels, forward", forward
    backward = lambda: kernels.backward(x, x, chosen, forward()[1], True, [True] * 4)  # noqa: E731
    yield "Python of the kernels, forward+backward", backward


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each case by name."""
    for dtype in DTYPES:
        for batch, tokens, d in ((8, 256, 384), (4, 256, 768), (2, 256, 1152), (64, 16, 384)):
            arguments = experts(dtype, batch, tokens, (3, d, d), (3, d))
            name = f"expert_linear D={d} B={batch * LARGER} T={tokens} {dtype}".replace("torch.", "")
            yield f"{name} forward", torch.no_grad()(lambda a=arguments: ops.expert_linear(*a))
            yield f"{name} forward+backward", both(ops.expert_linear, arguments)
    arguments = experts(DTYPES[0], 2, 256, (3, 384, 1536), (3, 1536), (3, 1536, 384), (3, 384))
    yield "expert_mlp D=384 forward+backward", both(ops.expert_mlp, arguments)
    embedding, weight, bias = (torch.randn(s, device=DEVICE) for s in ((1128, 384), (12, 3, 384), (12, 3)))
    arguments = [embedding.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), 2]
    yield "timestep_gate D=384 L=12 forward+backward", both(ops.timestep_gate, arguments)
    cost = torch.randint(1000, (84, 84), device=DEVICE)
    yield "linear_assignment n=84", lambda: ops.linear_assignment(cost)
    prior = switch_moe.DiffusionPrior(28, 3, 2, 1000).to(DEVICE)
    selected = torch.zeros(1000, 28, 3, device=DEVICE)
    selected.scatter_(2, torch.randn(1000, 28, 3, device=DEVICE).topk(2).indices, 1.0)
    yield "DiffusionPrior.match n=84", lambda: prior.match(selected.flatten(1))
    if DEVICE == "cpu":
        with contextlib.suppress(ImportError):  # without Triton there is none
            yield from host_time()


def main() -> None:
    """Prints the names of the cases, then a sample of each case that it reads: seconds, or null."""
    torch.manual_seed(0)
    known = dict(calls())
    ready: dict[str, Sampler] = {}
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(list(known)), file=answers, flush=True)
    for name in map(str.strip, sys.stdin):
        seconds = None
        try:
            if name not in ready:
                ready[name] = sampler([known[name]] * 2, DEVICE)
            time.sleep(IDLE)
            seconds = statistics.median(ready[name].sample() for _ in range(5))
        except Exception as error:  # this revision may lack it
            print(f"{name}: {type(error).__name__}: {error}")
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
