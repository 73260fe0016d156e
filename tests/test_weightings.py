"""Weightings of the loss: formulas, learned weights, and parity with golden/loss_weights."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from switch_dit.diffusion import GaussianDiffusion
from switch_dit.weightings import UncertaintyWeighting, cluster_bounds, snr_weight

SCHEDULES = ("linear", "cosine")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_official_weights(schedule: str) -> None:
    tensors, _ = golden("loss_weights")
    diffusion = GaussianDiffusion(schedule)
    for name in ("min_snr_1", "min_snr_5", "p2_gamma0.5_k1", "p2_gamma1_k1"):
        weight = torch.from_numpy(diffusion.mse_weight(name))
        assert_close(name, weight, tensors[f"{schedule}.{name}"].double(), 1e-5)
    np.testing.assert_array_equal(diffusion.mse_weight("p2"), diffusion.mse_weight("p2_gamma1_k1"))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("batch", [16, 24])
def test_official_uncertainty(schedule: str, batch: int) -> None:
    tensors, sizes = golden("loss_weights")
    given = {
        key.split(f"uw{batch}.")[1]: value
        for key, value in tensors.items()
        if f"{schedule}.uw{batch}." in key
    }
    uncertainty = UncertaintyWeighting(sizes["num_timesteps"], sizes["uw_clusters"])
    uncertainty.load_state_dict({"loss_scale": given["state_dict.loss_scale"]})
    diffusion = GaussianDiffusion(schedule)
    out, t, x_start, noise = (given[key] for key in ("model_output", "t", "x_start", "noise"))
    out.requires_grad_()
    losses = diffusion.training_losses(out, x_start, diffusion.q_sample(x_start, t, noise), t, noise)
    for term in ("mse", "vb"):
        assert_close(term, losses[term], given[term], 1e-5)
    loss = uncertainty(losses["mse"] + losses["vb"], t).mean()
    assert_close("loss", loss[None], given["loss"], 1e-5)
    assert_close("cluster_weight", uncertainty.cluster_weight(), given["cluster_weight"], 1e-5)
    loss.backward()
    assert_close("gradient of model_output", out.grad, given["grad.model_output"], 1e-4)
    assert_close("gradient of loss_scale", uncertainty.loss_scale.grad, given["grad.loss_scale"], 1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weighting", ["min_snr_5", "min_snr_0.5", "p2", "p2_gamma0.5_k2"])
def test_a_weighting_is_one_function_of_time(schedule: str, weighting: str) -> None:
    """The weighted error of a prediction is the same number, stated as noise and as velocity."""
    diffusion = GaussianDiffusion(schedule)
    of_noise, of_velocity = (
        GaussianDiffusion(schedule, weighting=weighting).mse_weight(weighting, kind) for kind in ("eps", "v")
    )
    np.testing.assert_allclose(of_velocity, of_noise * diffusion.alphas_cumprod, rtol=1e-9)
    snr = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    if weighting == "min_snr_5":  # as the paper writes it
        np.testing.assert_allclose(of_velocity, np.minimum(snr, 5) / (snr + 1), rtol=1e-12)
    assert (snr_weight("constant", snr, "v") == 1).all()


@pytest.mark.parametrize(
    "weighting",
    ["min_snr", "min_snr_0", "min_snr_-1", "P2", "", "p2_gamma1", "p2_gamma1_k0", "p2_gamma-1_k1", "uw", 5],
)
def test_wrong_weightings_are_named(weighting: object) -> None:
    with pytest.raises(
        ValueError, match=r"weighting is .*; it must be constant, p2 or min_snr_<gamma>, like"
    ):
        snr_weight(weighting, np.ones(3))
    with pytest.raises(ValueError, match="prediction is 'x'; it must be one of eps, v"):
        snr_weight("constant", np.ones(3), "x")


@given(n=st.integers(1, 2000), clusters=st.integers(1, 50))
@settings(max_examples=50, deadline=None)
def test_clusters_part_the_timesteps(n: int, clusters: int) -> None:
    if clusters > n:
        with pytest.raises(ValueError, match=f"clusters is {clusters}; it must be at most"):
            cluster_bounds(n, clusters)
        return
    bounds = cluster_bounds(n, clusters)
    assert bounds[0] == 0
    assert bounds[-1] == n
    assert bounds == sorted(set(bounds))
    of_timestep = UncertaintyWeighting(n, clusters).cluster(torch.arange(n))
    for cluster, (low, high) in enumerate(itertools.pairwise(bounds)):
        assert (of_timestep[low:high] == cluster).all()
    between = torch.arange(n) + 0.75
    assert torch.equal(UncertaintyWeighting(n, clusters).cluster(between), of_timestep)


@given(
    t=st.lists(st.sampled_from([0, 124, 125, 500, 874, 875, 999]), max_size=9),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=50, deadline=None)
def test_uncertainty_in_any_order(t: list[int], dtype: torch.dtype) -> None:
    """Empty clusters, an empty batch, any order: equal to the sums of the formula, written as loops."""
    uncertainty = UncertaintyWeighting()
    with torch.no_grad():
        uncertainty.loss_scale.copy_(torch.linspace(-1, 2, 8))
    losses = torch.linspace(0.5, 3, len(t)).to(dtype)
    out = uncertainty(losses, torch.tensor(t, dtype=torch.int64))
    assert out.dtype == torch.float32
    assert out.shape == (len(t),)
    if not t:
        return
    expected = 0.0
    for cluster, scale in enumerate(uncertainty.loss_scale.tolist()):
        inside = sum(float(x) for x, time in zip(losses, t, strict=True) if time // 125 == cluster) / len(t)
        expected += 0.5 * (math.exp(-scale) * inside + scale)
    assert float(out.detach().mean()) == pytest.approx(expected, rel=1e-5)


def test_a_broken_loss_stays_with_its_sample() -> None:
    uncertainty = UncertaintyWeighting()
    losses = torch.tensor([1.0, math.nan, 2.0, math.inf])
    out = uncertainty(losses, torch.tensor([0, 200, 999, 400]))
    assert out.isfinite().tolist() == [True, False, True, False]
    out.mean().backward()
    assert (~uncertainty.loss_scale.grad.isfinite()).nonzero().flatten().tolist() == [1, 3]


def test_uncertainty_errors() -> None:
    uncertainty = UncertaintyWeighting()
    losses, t = torch.ones(3), torch.tensor([0, 1, 2])
    for arguments, error, message in [
        ((losses, t[:2]), ValueError, r"t has shape \(2,\); it must be \[3\]"),
        ((losses, t + 998), ValueError, "t holds 998 to 1000; it must stay in"),
        ((losses, t.half()), TypeError, "t is torch.float16"),
        ((losses.long(), t), TypeError, "losses is torch.int64"),
        ((losses[None], t), ValueError, "losses has shape"),
        ((None, t), TypeError, "losses is None"),
        ((losses, None), TypeError, "t is None"),
    ]:
        with pytest.raises(error, match=message):
            uncertainty(*arguments)
    with pytest.raises(TypeError, match=r"clusters is 8\.0"):
        UncertaintyWeighting(1000, 8.0)
    assert set(uncertainty.state_dict()) == {"loss_scale"}
