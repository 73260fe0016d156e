"""The diffusion process and sampling with known posteriors. Official numbers are in test_golden.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import assert_close
from switch_dit import GaussianDiffusion, SwitchDiT, sample
from switch_dit.diffusion import discretized_gaussian_log_likelihood, gaussian_kl
from switch_dit.objectives import FlowObjective, Objective, create_objective


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


OF_NOISE = ("ddim", "ddpm", "dpm-solver++")


class GaussianModel(SwitchDiT):
    """The exact noise predictor of data ~ N(mean_y, 0.3^2), with channels of unequal means."""

    def __init__(self, diffusion: GaussianDiffusion, learn_sigma: bool) -> None:
        super().__init__(4, 2, 4, 24, 1, 3, num_classes=2, learn_sigma=learn_sigma, routing="none")
        self.alphas_cumprod = torch.from_numpy(diffusion.alphas_cumprod)
        self.mean = torch.tensor([[-0.5, 0.0, 0.5, 3.0], [0.5, 0.0, -0.5, -3.0], [0.0] * 4])[:, :, None, None]

    def forward(self, x, t, y=None):
        alpha_bar = self.alphas_cumprod[t].float()[:, None, None, None]
        mean = self.mean[y]
        variance = alpha_bar * 0.3**2 + 1 - alpha_bar
        noise = (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * mean) / variance
        return torch.cat([noise, torch.zeros_like(noise)], dim=1) if self.learn_sigma else noise


@pytest.mark.parametrize("scheduler", OF_NOISE)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_samplers_reach_a_known_distribution(scheduler: str, schedule: str, learn_sigma: bool) -> None:
    """Channels reach 3.0, past [-1, 1]: a sampler that clips, or guides 3 of 4 channels, fails."""
    diffusion = GaussianDiffusion(schedule)
    model = GaussianModel(diffusion, learn_sigma)
    labels = torch.tensor([0, 1] * 100)
    steps = 50 if scheduler == "dpm-solver++" else 250  # the others are of first order
    generator = torch.Generator().manual_seed(0)
    out = sample(model, diffusion, labels, steps=steps, scheduler=scheduler, guidance=1, generator=generator)
    for label in (0, 1):
        got = out[labels == label]
        assert_close("mean", got.mean((0, 2, 3)) + 1, model.mean[label].flatten() + 1, 0.03)
        assert got.std((0, 2, 3)).sub(0.3).abs().max() < 0.03


@pytest.mark.parametrize("scheduler", OF_NOISE)
@pytest.mark.parametrize("steps", [2, 3])
def test_few_steps_of_the_cosine_schedule_stay_finite(scheduler: str, steps: int) -> None:
    diffusion = GaussianDiffusion("cosine")
    model = GaussianModel(diffusion, learn_sigma=True)
    out = sample(model, diffusion, torch.tensor([0, 1]), steps=steps, scheduler=scheduler, guidance=1)
    assert out.isfinite().all()


@pytest.mark.parametrize("scheduler", OF_NOISE)
def test_guidance_reaches_every_channel(scheduler: str) -> None:
    diffusion = GaussianDiffusion()
    model = GaussianModel(diffusion, learn_sigma=True)
    labels = torch.zeros(50, dtype=torch.int64)
    out = sample(
        model, diffusion, labels, steps=50, scheduler=scheduler, guidance=2.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert_close("mean", out.mean((0, 2, 3)), 2 * model.mean[0].flatten(), 0.06)


class OneImage(SwitchDiT):
    """The exact predictor of data that are one image: it knows what x_t is made of."""

    def __init__(self, objective: Objective, image: torch.Tensor) -> None:
        super().__init__(4, 2, 4, 24, 1, 3, num_classes=0, learn_sigma=False, routing="none")
        self.objective, self.image = objective, image

    def forward(self, x, t, y=None):
        if isinstance(self.objective, FlowObjective):
            return (x - self.image) / (t.float() / self.num_timesteps)[:, None, None, None]
        alpha_bar = torch.from_numpy(self.objective.diffusion.alphas_cumprod)[t].float()[:, None, None, None]
        noise = (x - alpha_bar.sqrt() * self.image) / (1 - alpha_bar).sqrt()
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * self.image


@pytest.mark.parametrize(
    ("name", "scheduler"), [*(("v", scheduler) for scheduler in (None, *OF_NOISE)), ("flow", None)]
)
def test_velocity_and_flow_reach_the_image(name: str, scheduler: str | None) -> None:
    objective = create_objective(name)
    image = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    options = {"count": 3, "steps": 20, "scheduler": scheduler, "generator": generator}
    out = sample(OneImage(objective, image), objective, None, **options)
    # The last step of dpm-solver++ ends at the first timestep, whose noise is 0.01.
    assert_close("samples", out, image.expand_as(out), 2e-2 if scheduler == "dpm-solver++" else 1e-3)
    wrong = "ddim" if name == "flow" else "euler"
    with pytest.raises(ValueError, match="scheduler is"):
        sample(OneImage(objective, image), objective, None, count=1, steps=2, scheduler=wrong)


def test_samples_follow_the_generator() -> None:
    diffusion = GaussianDiffusion()
    model, labels = GaussianModel(diffusion, True), torch.tensor([0, 1])

    def draw(seed: int) -> torch.Tensor:
        return sample(model, diffusion, labels, steps=4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_sample_errors() -> None:
    diffusion = GaussianDiffusion()
    model = GaussianModel(diffusion, True)
    with pytest.raises(ValueError, match="scheduler is 'euler'; a model of 'eps' takes ddim"):
        sample(model, diffusion, torch.tensor([0]), steps=4, scheduler="euler")
    with pytest.raises(ValueError, match=r"labels holds \[0, 2\]; each must be in \[0, 2\)"):
        sample(model, diffusion, torch.tensor([0, 2]), steps=4)
    with pytest.raises(ValueError, match="labels is None; the model has 2 classes"):
        sample(model, diffusion, None, steps=4, count=3)


def test_unconditional_samples() -> None:
    model = SwitchDiT(4, 2, 3, 24, 1, 3, num_classes=0).eval()
    out = sample(model, GaussianDiffusion(), None, count=3, steps=2)
    assert out.shape == (3, 3, 4, 4)
    assert math.isfinite(out.sum())
