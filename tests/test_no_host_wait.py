"""Nothing in a training step waits for the host.

On a GPU torch itself raises. Without one the step runs on meta tensors, which stand for a GPU's: they have no
values, so whatever reads one fails, and a dispatch mode sees every copy to the host. (Fake CUDA tensors would
need a torch that is built with CUDA: others have no device guard for them.)
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext

import pytest
import torch
from helpers import random_model
from switch_dit import GaussianDiffusion, SwitchDiT
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counts import WAITS
from switch_moe import Routes, ops

OPERATIONS = (
    "timestep_gate", "expert_linear", "diffusion_prior", "linear_assignment", "token_gate", "route_pairs"
)  # fmt: skip


class HostWaits(TorchDispatchMode):
    """Names of the operators that would wait for the host."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.found, self.seen = device, [], set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().split("::")[-1].split(".")[0]
        self.seen.add(name)
        if name in WAITS:
            self.found.append(str(operator))
        out = operator(*args, **(kwargs or {}))
        tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
        from_device = any(t.device.type == self.device for t in tensors[:1])
        if from_device and any(t.device.type == "cpu" and t.dim() > 0 for t in tensors):
            self.found.append(f"{operator} between {self.device} and the CPU")
        return out


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choices that CUDA tensors get, for meta tensors."""
    for name in OPERATIONS:
        module = importlib.import_module(f"switch_moe.ops.{name}")
        path = "native" if name == "linear_assignment" else "triton"
        monkeypatch.setattr(module, "choose", lambda *_, path=path, **__: path)
    autocast = torch.autocast  # knows no meta tensors
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: nullcontext() if kind == "meta" else autocast(kind, *a, **k)
    )


def step(model: SwitchDiT, device: str) -> None:
    """Forward, losses and backward on random data."""
    diffusion = GaussianDiffusion("linear")
    x, noise = (torch.randn(4, 1, 8, 8, device=device) for _ in range(2))
    t, y = torch.randint(1000, (4,), device=device), torch.randint(3, (4,), device=device)
    diffusion.q_sample(x, t, noise)  # its tables move to the device once, before the steps
    diffusion.training_losses(torch.randn(4, 2, 8, 8, device=device), x, x, t, noise)
    with HostWaits(device) as waits:
        x_t = diffusion.q_sample(x, t, noise)
        out, prior = model.forward_with_prior(x_t, t, y)
        losses = diffusion.training_losses(out, x, x_t, t, noise)
        (losses["mse"].mean() + losses["vb"].mean() + prior).backward()
    assert waits.found == []
    ours = {"timestep_gate", "timestep_gate_backward", "expert_linear", "expert_linear_backward"}
    assert ours | {"diffusion_prior_loss", "linear_assignment"} <= waits.seen
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_on_meta_tensors(as_on_a_gpu) -> None:
    step(random_model(in_channels=1).to("meta").train(), "meta")


def routes(device: str) -> None:
    """Both ways to route tokens and what follows from them, with gradients; and the route to one expert."""
    logits = torch.randn(4, 8, 3, device=device).requires_grad_()
    with HostWaits(device) as waits:
        by_tokens = ops.token_gate(logits, 2, normalise=True)
        found = Routes.of_rows(by_tokens.chosen.flatten(0, 1), by_tokens.gate.flatten(0, 1), 3)
        by_experts = ops.token_gate(logits, capacity=5, pool=4)
        chosen = Routes.of_experts(by_experts.chosen[0], by_experts.gate[0], 32)
        one = Routes.to_one(logits.flatten(0, 1))
        loss = found.gate.sum() + chosen.gate.sum() + (by_tokens.load * by_tokens.importance).sum()
        loss.backward()
    assert waits.found == []
    assert {"token_gate", "token_gate_backward", "route_pairs"} <= waits.seen
    assert logits.grad is not None
    assert one.slot.shape == (32, 1)


def test_routes_on_meta_tensors(as_on_a_gpu) -> None:
    routes("meta")


def test_routed_mlp_on_meta_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("switch_moe.ops.routed_mlp")
    monkeypatch.setattr(module, "choose", lambda *_, **__: "triton")
    shapes = (6, 8), (3, 8, 4), (3, 4), (3, 4, 8), (3, 8)
    leaves = [torch.randn(shape, device="meta", requires_grad=True) for shape in shapes]
    gate = torch.rand(6, 2, device="meta", requires_grad=True)
    index = torch.zeros(6, 2, dtype=torch.int32, device="meta")
    with HostWaits("meta") as waits:
        out = module.routed_mlp(*leaves, Routes.of_rows(index, gate, 3))
        found = torch.autograd.grad(out.sum(), [*leaves, gate])
    assert waits.found == []
    assert {"routed_mlp", "routed_mlp_backward"} <= waits.seen
    assert [grad.shape for grad in found] == [leaf.shape for leaf in (*leaves, gate)]


def test_a_planted_wait_is_seen() -> None:
    with HostWaits("meta") as waits:
        x = torch.randn(3, device="meta")
        with pytest.raises(NotImplementedError):
            x.nonzero()
        with pytest.raises(RuntimeError, match="meta tensors"):
            x.sum().item()
    assert waits.found == ["aten.nonzero.default", "aten._local_scalar_dense.default"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    model = random_model(in_channels=1).cuda().train()
    step(model, "cuda")  # the first step compiles, and may wait
    routes("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, "cuda")
        routes("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
