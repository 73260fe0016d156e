"""Learning rates, AdamW, clipping, and float16 with a scaled loss."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from switch_dit.data import load_data
from switch_dit.devices import resolve_precision
from switch_dit.optimisation import (
    DECAYS,
    Optimisation,
    clip_gradients,
    create_optimizer,
    learning_rate,
)
from switch_dit.settings import TrainConfig
from switch_dit.trainer import Trainer
from switch_dit.weightings import UncertaintyWeighting
from torch import Tensor


@pytest.mark.parametrize("lr_decay", ["cosine", "constant"])
def test_the_rate_of_the_trainer(lr_decay: str) -> None:
    """Linear warm-up, then a constant rate or a cosine to zero, as published with the default run."""
    trainer = Trainer(TrainConfig(steps=90, warmup=7, lr_decay=lr_decay), load_data("digits"))
    for step in range(90):
        decay = 0.5 * (1 + math.cos(math.pi * step / 90)) if lr_decay == "cosine" else 1.0
        assert trainer.rate_at(step) == pytest.approx(4e-3 * min(1.0, (step + 1) / 7) * decay, rel=1e-12)


@given(
    decay=st.sampled_from(DECAYS),
    steps=st.integers(1, 500),
    warmup=st.integers(0, 600),
    step=st.integers(0, 600),
)
@settings(max_examples=200, deadline=None)
def test_rates_stay_between_zero_and_the_peak(decay: str, steps: int, warmup: int, step: int) -> None:
    rate = learning_rate(step, lr=0.1, steps=steps, warmup=warmup, decay=decay)
    assert 0 <= rate <= 0.1
    if step + 1 < warmup and decay != "cosine":
        assert rate == pytest.approx(0.1 * (step + 1) / warmup)


def test_inverse_square_root() -> None:
    def rate(step: int, **extra: int) -> float:
        return learning_rate(step, lr=1.0, steps=10_000, decay="inverse-sqrt", **extra)

    assert rate(0) == 1
    assert rate(99, warmup=100) == 1
    assert rate(399, warmup=100) == pytest.approx(0.5)
    assert rate(399, warmup=100, plateau=400) == 1
    assert rate(1599, warmup=100, plateau=400) == pytest.approx(0.5)


def model_and_optimizer(**settings: object) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.SiLU(), torch.nn.Linear(8, 3))
    return model, create_optimizer(model.parameters(), torch.tensor(1e-2), **settings)


def train(optimisation: Optimisation, model: torch.nn.Module, steps: int, parts: int = 1) -> list[Tensor]:
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    losses = []
    low = optimisation.dtype != torch.float32
    for _ in range(steps):
        total = torch.zeros(())
        for part in x.chunk(parts):
            with torch.autocast("cpu", optimisation.dtype, enabled=low):
                loss = (model(part) - part[:, :3]).float().square().mean() / parts
            optimisation.backward(loss)
            total += loss.detach()
        optimisation.step()
        losses.append(total)
    return losses


def test_float32_is_plain_adamw() -> None:
    model, optimizer = model_and_optimizer()
    train(Optimisation(optimizer), model, 5)
    expected, plain = model_and_optimizer()
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        plain.zero_grad()
        (expected(x) - x[:, :3]).square().mean().backward()
        plain.step()
    for ours, value in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, value)


@pytest.mark.parametrize("max_norm", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [1, 3])
def test_half_types_train_like_float32(dtype: torch.dtype, max_norm: float, parts: int) -> None:
    model, optimizer = model_and_optimizer()
    losses = train(Optimisation(optimizer, dtype, max_norm), model, 30, parts)
    expected_model, expected_optimizer = model_and_optimizer()
    expected = train(Optimisation(expected_optimizer, max_norm=max_norm), expected_model, 30)
    assert losses[-1] < 0.9 * losses[0]
    assert_close("losses", torch.stack(losses), torch.stack(expected), 0.02)


def test_scaling_does_not_change_the_clipped_norm() -> None:
    norms = []
    for dtype in (torch.float32, torch.float16):
        model, optimizer = model_and_optimizer()
        optimisation = Optimisation(optimizer, dtype, max_norm=1e-3)
        optimisation.backward(model(torch.ones(2, 6)).square().mean())  # in float32, but for the factor
        norms.append(optimisation.step())
    assert_close("norm", norms[1], norms[0], 1e-5)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_a_broken_float16_step_changes_no_weight(max_norm: float, wrong: float) -> None:
    model, optimizer = model_and_optimizer()
    optimisation = Optimisation(optimizer, torch.float16, max_norm, scale=1024.0)
    train(optimisation, model, 2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    state = [value.clone() for each in optimizer.state.values() for value in each.values()]
    optimisation.backward(model(torch.ones(2, 6)).square().mean() * wrong)
    norm = optimisation.step()
    assert norm is None or not norm.isfinite()
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None
    for value, old in zip(
        (v for each in optimizer.state.values() for v in each.values()), state, strict=True
    ):
        assert torch.equal(value, old)
    assert optimisation.state_dict() == {"scale": 512.0, "growth_tracker": 0}
    train(optimisation, model, 1)
    assert not torch.equal(next(model.parameters()), before[0])


def test_small_gradients_survive_in_float16() -> None:
    """The gradient of a product in float16 is a float16 number: 1e-8 is zero there, unless scaled."""
    for scale, alive in ((1.0, False), (2.0**16, True)):
        weight = torch.nn.Parameter(torch.ones(4, 4))
        optimisation = Optimisation(
            create_optimizer([weight], torch.tensor(1e-2)), torch.float16, scale=scale
        )
        with torch.autocast("cpu", torch.float16):
            out = torch.nn.functional.linear(torch.ones(1, 4), weight)
        optimisation.backward(out.float().sum() * 1e-8)
        optimisation.step()
        assert bool((weight != 1).any()) == alive


def test_the_scale_goes_through_json() -> None:
    model, optimizer = model_and_optimizer()
    optimisation = Optimisation(optimizer, torch.float16, scale=4096.0)
    assert optimisation.state_dict() == {"scale": 4096.0, "growth_tracker": 0}
    train(optimisation, model, 3)
    saved = json.loads(json.dumps(optimisation.state_dict()))
    assert saved == {"scale": 4096.0, "growth_tracker": 3}
    model, optimizer = model_and_optimizer()
    resumed = Optimisation(optimizer, torch.float16)
    resumed.load_state_dict(saved)
    train(resumed, model, 1)
    assert resumed.state_dict() == {"scale": 4096.0, "growth_tracker": 4}
    plain = Optimisation(optimizer)
    assert plain.state_dict() == {}
    plain.load_state_dict({})
    with pytest.raises(ValueError, match=r"state is .* with torch.float32 it must hold nothing"):
        plain.load_state_dict(saved)


@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1e3])
def test_clipping(max_norm: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    before = torch.cat([p.grad.flatten() for p in parameters])
    norm = clip_gradients(parameters, max_norm)
    after = torch.cat([p.grad.flatten() for p in parameters])
    if max_norm == 0:
        assert norm is None
        assert torch.equal(after, before)
        return
    assert_close("norm", norm, before.norm(), 1e-6)
    assert_close("gradient", after, before * min(1.0, max_norm / float(before.norm())), 1e-3)


def test_uncertainty_has_its_own_rate() -> None:
    uncertainty = UncertaintyWeighting()
    model, optimizer = model_and_optimizer(weight_decay=0.1, uncertainty=uncertainty)
    assert [group["lr"] for group in optimizer.param_groups] == [torch.tensor(1e-2), 0.025]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    optimisation = Optimisation(optimizer, torch.float16)
    losses = model(torch.ones(4, 6)).square().mean(1)
    optimisation.backward(uncertainty(losses, torch.tensor([0, 300, 600, 999])).mean())
    optimisation.step()
    moved = uncertainty.loss_scale.detach().abs()
    assert_close("scales", moved, torch.full((8,), 0.025), 1e-3)  # Adam's first step


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_precisions_have_names(precision: str) -> None:
    assert resolve_precision(precision, torch.device("cpu")) == getattr(torch, precision)
    with pytest.raises(ValueError, match="precision is 'half'; it must be one of float32, bfloat16, float16"):
        resolve_precision("half", torch.device("cpu"))


P = torch.nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: learning_rate(0, lr=0.1, steps=5, decay="linear"), ValueError, "decay is 'linear'"),
        (lambda: learning_rate(-1, lr=0.1, steps=5), ValueError, "step is -1"),
        (lambda: learning_rate(0, lr=0, steps=5), ValueError, "lr is 0"),
        (lambda: learning_rate(0, lr=0.1, steps=0), ValueError, "steps is 0"),
        (lambda: learning_rate(0, lr=0.1, steps=5, warmup=1.5), TypeError, "warmup is 1.5"),
        (
            lambda: learning_rate(0, lr=0.1, steps=5, decay="inverse-sqrt", plateau=0),
            ValueError,
            "plateau is 0",
        ),
        (lambda: create_optimizer([P], 0.1), TypeError, "lr is 0.1"),
        (lambda: create_optimizer([P], torch.zeros(1)), ValueError, "lr is torch.float32"),
        (lambda: create_optimizer([torch.zeros(2)], torch.tensor(0.1)), ValueError, "parameters has none"),
        (lambda: create_optimizer([P], torch.tensor(0.1), weight_decay=-1), ValueError, "weight_decay is -1"),
        (lambda: create_optimizer([P], torch.tensor(0.1), betas=(0.9, 1)), ValueError, "betas is 1"),
        (lambda: clip_gradients([P], -1.0), ValueError, "max_norm is -1.0; it must be 0 for none"),
        (
            lambda: Optimisation(create_optimizer([P], torch.tensor(0.1)), torch.float64),
            ValueError,
            "dtype is torch.float64; it must be one of torch.float32",
        ),
        (
            lambda: Optimisation(create_optimizer([P], torch.tensor(0.1)), scale=0.0),
            ValueError,
            r"scale is 0\.0",
        ),
    ],
)
def test_errors(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
