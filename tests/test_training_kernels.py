"""A Switch-DiT trained with the Triton kernels against the same one trained with the reference."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers import assert_close, random_model

OPERATIONS = ("timestep_gate", "expert_linear", "diffusion_prior")


def train(backend: str, steps: int, device: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The losses of the steps, then the final parameters."""
    for name in OPERATIONS:
        module = importlib.import_module(f"switch_moe.ops.{name}")
        monkeypatch.setattr(module, "choose", lambda *_, **__: backend)
    model = random_model(in_channels=1, num_heads=2, num_classes=3, num_timesteps=20).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 1, 8, 8, generator=generator).to(device)
        t = torch.randint(20, (4,), generator=generator).to(device)
        y = torch.randint(3, (4,), generator=generator).to(device)
        out, prior = model.forward_with_prior(x, t, y)
        loss = (out - x.repeat(1, 2, 1, 1)).square().mean() + prior
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *(parameter.detach() for parameter in model.parameters())]


def test_training_agrees_with_the_reference(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels = train("triton", 4, device, monkeypatch)
    expected = train("reference", 4, device, monkeypatch)
    assert expected[0][-1] < expected[0][0]
    for i, (a, e) in enumerate(zip(with_kernels, expected, strict=True)):
        # Adam steps by the sign of a gradient at first: parameters agree less than the losses do
        assert_close("losses" if i == 0 else f"parameter {i}", a, e, 1e-5 if i == 0 else 1e-3)
