"""The loop that expert_linear is compared with computes the same function."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import assert_close

from switch_moe.reference.expert_linear import expert_linear


@pytest.mark.parametrize("experts", [3, 8])
def test_expert_loop(experts: int) -> None:
    path = Path(__file__).parent.parent / "benchmarks" / "baselines.py"
    spec = importlib.util.spec_from_file_location("baselines", path)
    baselines = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(baselines)
    torch.manual_seed(0)
    tensors = [torch.randn(4, 5, 6), torch.randn(experts, 6, 7), torch.randn(experts, 7), torch.rand(4, 2)]
    index = torch.rand(4, experts).argsort(1)[:, :2].int()
    grad = torch.randn(4, 5, 7)
    found = []
    for function in (baselines.expert_loop, expert_linear):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = function(leaves[0], leaves[1], leaves[2], index, leaves[3])
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    for name, a, e in zip(("out", "x", "weight", "bias", "gate"), *found, strict=True):
        assert_close(name, a, e, 1e-5)
