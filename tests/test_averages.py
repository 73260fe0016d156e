"""Moving averages of the weights, and the reconstruction of any width from snapshots."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from switch_dit.averages import (
    WIDEST,
    MovingAverage,
    PowerAverage,
    Snapshot,
    gamma_of,
    reconstruction,
    sigma_rel_of,
)
from torch import Tensor


def walk(steps: int, size: int = 50, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Weights of a run: a random walk with drift, two tensors."""
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(steps, size, generator=generator, dtype=torch.float64) * 0.1 + 0.01
    return [{"a": row[:-1].to(dtype), "b.c": row[-1:].view(1, 1).to(dtype)} for row in moves.cumsum(0)]


def flat(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in parameters.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.995])
def test_moving_average(decay: float, dtype: torch.dtype) -> None:
    run = walk(60, dtype=dtype)
    average = MovingAverage(run[0], decay)
    expected = flat(run[0]).double()
    for step, parameters in enumerate(run):
        average.update(parameters, step)
        keep = min(decay, step / (9 + step))
        expected = keep * expected + (1 - keep) * flat(parameters).double()
    assert flat(average.state_dict()).dtype == dtype
    assert_close("average", flat(average.state_dict()), expected, 1e-6)
    assert set(average.state_dict()) == {"a", "b.c"}


def test_the_average_is_todays() -> None:
    """Bitwise the trainer's update, in the tensors of a copy of the model."""
    torch.manual_seed(0)
    model, copy = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    expected = [parameter.detach().clone() for parameter in copy.parameters()]
    named = dict(model.named_parameters())
    average = MovingAverage(named, 0.995, averaged=dict(copy.named_parameters()))
    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(named, step)
        change = torch._foreach_sub([p.detach() for p in model.parameters()], expected)
        torch._foreach_mul_(change, torch.tensor(1 - min(0.995, step / (9 + step))))
        torch._foreach_add_(expected, change)
    for ours, value in zip(copy.parameters(), expected, strict=True):
        assert torch.equal(ours, value)
        assert ours.requires_grad


@given(sigma_rel=st.floats(1e-4, WIDEST))
@settings(max_examples=200, deadline=None)
def test_width_and_exponent(sigma_rel: float) -> None:
    gamma = gamma_of(sigma_rel)
    assert gamma >= 0
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-6)
    assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, rel=1e-6, abs=1e-6)


def test_known_widths() -> None:
    assert gamma_of(WIDEST) == pytest.approx(0, abs=1e-9)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)  # EDM2, section 3.1
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, WIDEST])
def test_the_profile(sigma_rel: float) -> None:
    """The average of unit vectors is the profile: it sums to one, and its standard deviation is the width."""
    steps = 1000
    average = PowerAverage({"w": torch.zeros(steps, dtype=torch.float64)}, sigma_rel)
    for step in range(steps):
        average.update({"w": torch.nn.functional.one_hot(torch.tensor(step), steps).double()}, step)
    weights = average.parameters["w"]
    time = (torch.arange(steps) + 0.5) / steps
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    mean = (weights * time).sum()
    assert float((weights * (time - mean).square()).sum().sqrt()) == pytest.approx(sigma_rel, rel=2e-3)
    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    assert_close("profile", weights, (edges ** (gamma_of(sigma_rel) + 1)).diff(), 1e-5)


def run_with_snapshots(steps: int, every: int, *widths: float) -> tuple[list[Snapshot], list[PowerAverage]]:
    run = walk(steps)
    averages = [PowerAverage(run[0], width) for width in widths]
    snapshots = []
    for step, parameters in enumerate(run):
        for average in averages:
            average.update(parameters, step)
        if (step + 1) % every == 0:
            snapshots += [average.snapshot(step + 1) for average in averages[:2]]
    return snapshots, averages


def test_a_tracked_width_comes_back() -> None:
    snapshots, averages = run_with_snapshots(1000, 100, 0.05, 0.10)
    for average in averages:
        again = PowerAverage.reconstruct(snapshots, average.sigma_rel)
        assert set(again) == set(average.parameters)
        assert_close("average", flat(again), flat(average.state_dict()), 1e-6)
        earlier = next(s for s in snapshots if s.steps == 300 and s.sigma_rel == average.sigma_rel)
        again = PowerAverage.reconstruct(snapshots, average.sigma_rel, steps=300)
        assert_close("earlier", flat(again), flat(earlier.parameters), 1e-6)
        coefficients = reconstruction([(s.steps, s.sigma_rel) for s in snapshots], average.sigma_rel)
        exact = [float(s.steps == 1000 and s.sigma_rel == average.sigma_rel) for s in snapshots]
        np.testing.assert_allclose(coefficients, exact, atol=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.06, 0.08, 0.15, 0.2])
def test_other_widths_come_near(sigma_rel: float) -> None:
    """Near to what would have been tracked, far nearer than the tracked widths are, and better with more."""
    snapshots, averages = run_with_snapshots(1000, 50, 0.05, 0.10, sigma_rel)
    truth = flat(averages[2].state_dict())

    def distance(other: dict[str, Tensor]) -> float:
        return float((flat(other) - truth).norm())

    error = distance(PowerAverage.reconstruct(snapshots, sigma_rel))
    nearest = min(distance(average.state_dict()) for average in averages[:2])
    assert error < 0.05 * nearest
    fewer = [snapshot for snapshot in snapshots if snapshot.steps % 200 == 0]
    assert error < distance(PowerAverage.reconstruct(fewer, sigma_rel))
    total = reconstruction([(s.steps, s.sigma_rel) for s in snapshots], sigma_rel).sum()
    assert total == pytest.approx(1, abs=5e-3)


def test_inner_products() -> None:
    """The least squares of the closed form are those of profiles on a fine grid."""
    tracked = [(400, 0.05), (700, 0.1), (1000, 0.05), (1000, 0.1)]
    time = (np.arange(200_000) + 0.5) / 200_000 * 1000

    def profile(steps: int, sigma_rel: float) -> np.ndarray:
        gamma = gamma_of(sigma_rel)
        return np.where(time < steps, (gamma + 1) * (time / steps) ** gamma / steps, 0)

    expected = np.linalg.lstsq(np.stack([profile(*each) for each in tracked], 1), profile(900, 0.08))[0]
    np.testing.assert_allclose(reconstruction(tracked, 0.08, 900), expected, rtol=1e-3, atol=1e-4)


def test_equal_snapshots_and_a_mapping_that_reads() -> None:
    """A snapshot that is there twice changes nothing; parameters may be read one by one."""
    snapshots, averages = run_with_snapshots(200, 50, 0.05, 0.10)
    again = PowerAverage.reconstruct(snapshots + snapshots, 0.05)
    assert_close("twice", flat(again), flat(averages[0].state_dict()), 1e-6)
    single = PowerAverage.reconstruct(snapshots[-1:], 0.10)
    assert_close("alone", flat(single), flat(averages[1].state_dict()), 1e-6)


def test_resumed_bitwise() -> None:
    run = walk(40)
    for make in (lambda: MovingAverage(run[0], 0.9), lambda: PowerAverage(run[0], 0.1)):
        whole = make()
        for step, parameters in enumerate(run):
            whole.update(parameters, step)
        first, second = make(), make()
        for step, parameters in enumerate(run[:17]):
            first.update(parameters, step)
        second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
        for step, parameters in enumerate(run[17:], 17):
            second.update(parameters, step)
        assert torch.equal(flat(second.state_dict()), flat(whole.state_dict()))


W = {"w": torch.zeros(2)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MovingAverage(W, 1.0), ValueError, "decay is 1.0"),
        (lambda: MovingAverage({}), TypeError, "parameters is a dict; it must hold tensors by name"),
        (lambda: MovingAverage([torch.zeros(2)]), TypeError, "parameters is a list"),
        (lambda: MovingAverage(W, averaged={"v": torch.zeros(2)}), ValueError, r"parameters lacks \['v'\]"),
        (lambda: MovingAverage(W, averaged={"w": torch.zeros(3)}), ValueError, r"averaged\['w'\] has shape"),
        (lambda: MovingAverage(W).update({"v": W["w"]}, 0), ValueError, r"lacks \['w'\] and has \['v'\]"),
        (lambda: MovingAverage(W).update(W, -1), ValueError, "step is -1"),
        (lambda: MovingAverage(W).load_state_dict({"w": torch.zeros(3)}), ValueError, r"state\['w'\] has"),
        (lambda: PowerAverage(W, 0.3), ValueError, "sigma_rel is 0.3; it must be between 1e-4 and"),
        (lambda: PowerAverage(W, math.nan), ValueError, "sigma_rel is nan"),
        (lambda: PowerAverage(W, 0.0), ValueError, "sigma_rel is 0.0"),
        (lambda: PowerAverage(W).snapshot(0), ValueError, "steps is 0"),
        (lambda: PowerAverage.reconstruct([], 0.1), ValueError, "snapshots is empty"),
        (lambda: PowerAverage.reconstruct([Snapshot(9, 0.1, W)], 0.1, 10), ValueError, "at most 9, the time"),
        (lambda: PowerAverage.reconstruct([Snapshot(0, 0.1, W)], 0.1), ValueError, "steps is 0"),
        (
            lambda: PowerAverage.reconstruct([Snapshot(9, 0.1, W), Snapshot(9, 0.05, {})], 0.1),
            ValueError,
            r"parameters lacks \['w'\]",
        ),
        (lambda: sigma_rel_of(-1), ValueError, "gamma is -1"),
    ],
)  # fmt: skip
def test_errors(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
