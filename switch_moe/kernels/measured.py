"""Which kernels of ``expert_linear`` ``backend="auto"`` takes on a GPU: Triton's or the CUDA ones.

Triton's, but for shapes of which ``measured.json`` says that the CUDA kernels are faster on GPUs of this
compute capability. ``python -m benchmarks.report`` derives that file from ``benchmarks/results``; nobody
edits it. One decision holds for the forward and the backward, so that training and evaluation compute the
same numbers, a recomputed forward is the one before it, and :func:`switch_moe.warm_up` compiles what will
run. So the CUDA kernels must be faster both in a forward alone and in a forward with its backward.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..experts import LinearExperts
from .expert_linear_hopper import device_reason

FILE = Path(__file__).with_name("measured.json")


class Measured(NamedTuple):
    """One measured shape, what was faster there, and the numbers in words."""

    batch: int
    tokens: int
    backend: str
    words: str


Key = tuple[Any, ...]  # dtype, M, Din, Dout, k, modulate
Table = dict[str, dict[Key, list[Measured]]]  # by compute capability, as "sm_90"


def table(rows: Iterable[dict[str, Any]]) -> Table:
    """The rows of the file by what a call must share with them; those of more tokens come first."""
    found: Table = {}
    for row in sorted(rows, key=lambda row: row["B"] * row["T"], reverse=True):
        key = (getattr(torch, row["dtype"]), row["M"], row["Din"], row["Dout"], row["k"], row["modulate"])
        words = (
            f"the CUDA kernels took {row['forward']:.2f} of Triton's time forward and "
            f"{row['forward+backward']:.2f} with the backward at B={row['B']} T={row['T']} "
            f"({row['results']}, commit {row['commit'][:7]})"
        )
        of_key = found.setdefault(row["architecture"], {}).setdefault(key, [])
        of_key.append(Measured(row["B"], row["T"], row["backend"], words))
    return found


TABLE = table(json.loads(FILE.read_text()))
_here: dict[int, tuple[dict[Key, list[Measured]], str]] = {}  # of each GPU, asked for once


def fastest(x: Tensor, experts: LinearExperts, modulate: bool) -> tuple[str, str]:
    """'triton' or 'cuda' for a call on CUDA tensors, and why.

    A measured shape speaks for calls of the same type, Din, Dout, M, k and ``modulate`` whose T is a multiple
    of its T, so that tiles waste no more at the ends of samples, and that have at least as many samples. Of
    several the one with the most tokens decides.
    """
    shapes, why = _on(x.device)
    if not shapes or x.dim() != 3 or experts.weight.dim() != 3 or experts.expert_index.dim() != 2:
        return "triton", why
    (batch, tokens, _), (num_experts, d_in, d_out) = x.shape, experts.weight.shape
    key = (x.dtype, num_experts, d_in, d_out, experts.expert_index.shape[1], modulate)
    for one in shapes.get(key, ()):
        if batch >= one.batch and tokens % one.tokens == 0:
            return one.backend, one.words
    return "triton", why


def summary(device: torch.device) -> str:
    """What :func:`fastest` returns on a GPU, for all shapes together."""
    shapes, why = _on(device)
    measured = [one for of_key in shapes.values() for one in of_key]
    faster = [one.words for one in measured if one.backend == "cuda"]
    if not faster:
        return f"triton: {why}"
    like = f"{len(faster)} of the {len(measured)} that were measured"
    return f"cuda for calls like {like}, else triton: {faster[0]}"


def _on(device: torch.device) -> tuple[dict[Key, list[Measured]], str]:
    """What was measured on GPUs like this one and its kernels can run, and why other calls take Triton."""
    if torch.compiler.is_compiling():
        # A traced program that reads _here depends on it, and would be compiled again once it is filled.
        return _look(device)
    index = device.index or 0
    found = _here.get(index)
    if found is None:
        found = _here[index] = _look(device)
    return found


def architecture(device: torch.device) -> str:
    """The compute capability of a GPU, as "sm_90"; a fake tensor may be on none."""
    if not torch.cuda.is_available():
        return "no GPU"
    major, minor = torch.cuda.get_device_capability(device.index or 0)
    return f"sm_{major}{minor}"


def _look(device: torch.device) -> tuple[dict[Key, list[Measured]], str]:
    if (reason := device_reason(device)) is not None:
        return {}, reason
    name = architecture(device)
    shapes = TABLE.get(name, {})
    if any(one.backend == "cuda" for of_key in shapes.values() for one in of_key):
        return shapes, f"no call like it was measured on {name}"
    return shapes, (
        f"no results file of {name} shows the CUDA kernels right and faster; name backend='cuda' to try them"
    )
