"""The diffusion process. Official numbers are in test_golden.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import assert_close
from switch_dit import GaussianDiffusion
from switch_dit.diffusion import discretized_gaussian_log_likelihood, gaussian_kl


def test_weightings() -> None:
    diffusion = GaussianDiffusion("cosine")
    snr = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    assert (diffusion.mse_weight("constant") == 1).all()
    np.testing.assert_allclose(diffusion.mse_weight("p2"), 1 / (1 + snr))
    np.testing.assert_allclose(diffusion.mse_weight("min_snr_2.5"), np.minimum(snr, 2.5) / snr)
    for wrong in ("min_snr", "min_snr_0", "min_snr_-1", "P2", ""):
        with pytest.raises(ValueError, match="weighting is"):
            GaussianDiffusion(weighting=wrong)
    with pytest.raises(ValueError, match="schedule is 'quadratic'; it must be one of linear, cosine"):
        GaussianDiffusion("quadratic")


def test_the_weighting_scales_mse_only() -> None:
    x, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 10, 999])
    out = torch.randn(3, 4, 4, 4)
    plain, weighted = GaussianDiffusion(), GaussianDiffusion(weighting="p2")
    x_t = plain.q_sample(x, t, noise)
    a, b = plain.training_losses(out, x, x_t, t, noise), weighted.training_losses(out, x, x_t, t, noise)
    assert_close("mse", b["mse"], a["mse"] * torch.from_numpy(plain.mse_weight("p2"))[t], 1e-5)
    assert torch.equal(a["vb"], b["vb"])
    assert set(plain.training_losses(out[:, :2], x, x_t, t, noise)) == {"mse"}


def test_the_bound_trains_the_variance_only() -> None:
    x, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 10, 999])
    out = torch.randn(3, 4, 4, 4, requires_grad=True)
    diffusion = GaussianDiffusion()
    losses = diffusion.training_losses(out, x, diffusion.q_sample(x, t, noise), t, noise)
    (gradient,) = torch.autograd.grad(losses["vb"].sum(), out, retain_graph=True)
    assert gradient[:, :2].count_nonzero() == 0
    assert gradient[:, 2:].count_nonzero() > 0
    (gradient,) = torch.autograd.grad(losses["mse"].sum(), out)
    assert gradient[:, 2:].count_nonzero() == 0


def test_divergence_and_likelihood() -> None:
    zero = torch.zeros(())
    assert gaussian_kl(zero, zero, zero, zero) == 0
    assert gaussian_kl(zero, zero, zero + 2, zero) == pytest.approx(2.0)
    values = torch.linspace(-1, 1, 256)
    for mean, log_scale in ((0.1, -1.0), (-0.7, -4.0)):
        mass = discretized_gaussian_log_likelihood(values, torch.tensor(mean), torch.tensor(log_scale)).exp()
        assert mass.sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 10, 250, 1000])
def test_respaced(steps: int) -> None:
    diffusion = GaussianDiffusion("cosine")
    respaced, kept = diffusion.respaced(steps)
    assert len(set(kept.tolist())) == steps
    assert kept[-1] == 999
    np.testing.assert_allclose(respaced.alphas_cumprod, diffusion.alphas_cumprod[kept], rtol=1e-6)


@pytest.mark.parametrize("steps", [0, 1001])
def test_respaced_errors(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps is {steps}; it must be between 1 and the 1000"):
        GaussianDiffusion().respaced(steps)
