"""Sampling with known posteriors, for every objective and scheduler. Official samples: test_golden.py."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close, random_model
from switch_dit import GaussianDiffusion, SwitchDiT, sample
from switch_dit.objectives import Objective, create_objective
from switch_dit.sampling import SCHEDULERS
from torch import Tensor

PAIRS = [(name, scheduler) for name, fitting in SCHEDULERS.items() for scheduler in fitting]
DETERMINISTIC = [pair for pair in PAIRS if pair[1] != "ddpm"]


def make_objective(name: str, schedule: str = "linear", learn_sigma: bool = False) -> Objective:
    return create_objective(
        name, schedule="linear" if name == "flow" else schedule, learn_sigma=learn_sigma and name == "eps"
    )


class GaussianModel(SwitchDiT):
    """The exact predictor of data ~ N(mean_y, std^2); channels have unequal means, the null label has 0."""

    def __init__(self, objective: Objective, schedule: str = "linear", std: float = 0.3) -> None:
        learn_sigma = objective.learn_sigma
        super().__init__(4, 2, 4, 24, 1, 3, num_classes=2, learn_sigma=learn_sigma, routing="none")
        self.target, self.std = objective.name, std
        self.alphas_cumprod = torch.from_numpy(GaussianDiffusion(schedule).alphas_cumprod)
        self.mean = torch.tensor([[-0.5, 0.0, 0.5, 3.0], [0.5, 0.0, -0.5, -3.0], [0.0] * 4])[:, :, None, None]

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if self.target == "flow":
            rate = t / 1000
            signal = (1 - rate)[:, None, None, None]
            level = rate[:, None, None, None]
        else:
            alpha_bar = self.alphas_cumprod[t].float()[:, None, None, None]
            signal, level = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        mean = self.mean[y]
        share = (x - signal * mean) / (signal**2 * self.std**2 + level**2)
        noise, x_start = level * share, mean + signal * self.std**2 * share
        out = {"eps": noise, "v": signal * noise - level * x_start, "flow": noise - x_start}[self.target]
        return torch.cat([out, torch.zeros_like(out)], dim=1) if self.learn_sigma else out


@pytest.mark.parametrize(("name", "scheduler"), PAIRS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_samplers_reach_a_known_distribution(
    name: str, scheduler: str, schedule: str, learn_sigma: bool
) -> None:
    """Channels reach 3.0, past [-1, 1]: a sampler that clips, or guides 3 of 4 channels, fails."""
    if (name != "eps" and learn_sigma) or (name == "flow" and schedule == "cosine"):
        return  # there is no such setting
    objective = make_objective(name, schedule, learn_sigma)
    model = GaussianModel(objective, schedule)
    labels = torch.tensor([0, 1] * 100)
    steps = 50 if scheduler == "dpm-solver++" else 250  # the others are of first order
    generator = torch.Generator().manual_seed(0)
    out = sample(model, objective, labels, steps=steps, scheduler=scheduler, guidance=1, generator=generator)
    for label in (0, 1):
        got = out[labels == label]
        assert_close("mean", got.mean((0, 2, 3)) + 1, model.mean[label].flatten() + 1, 0.03)
        assert got.std((0, 2, 3)).sub(0.3).abs().max() < 0.03


@pytest.mark.parametrize(("name", "scheduler"), PAIRS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_model_that_knows_the_image_gives_it_back(name: str, scheduler: str, steps: int) -> None:
    """Only with the objective's own sign and time: every step's predicted image is the image."""
    objective = make_objective(name)
    model = GaussianModel(objective, std=0.0)
    labels = torch.tensor([0, 1, 1])
    out = sample(model, objective, labels, steps=steps, scheduler=scheduler, guidance=1)
    assert_close("image", out, model.mean[labels].expand_as(out), 1e-3 if steps == 1 else 1e-4)


@pytest.mark.parametrize("scheduler", SCHEDULERS["flow"])
@pytest.mark.parametrize("steps", [1, 3, 4, 1500])
def test_a_flow_takes_even_steps_from_noise_to_the_image(scheduler: str, steps: int) -> None:
    """Also more of them than the model has timesteps; the model's time is the objective's."""
    objective = make_objective("flow")
    model = GaussianModel(objective)
    asked, forward = [], model.forward
    model.forward = lambda x, t, y=None: asked.append(t) or forward(x, t, y)
    out = sample(model, objective, torch.tensor([1]), steps=steps, scheduler=scheduler, guidance=1)
    expected = objective.model_time(1 - torch.arange(steps, dtype=torch.float64) / steps)
    assert_close("time", torch.cat(asked), expected, 1e-6)
    assert torch.cat(asked).max() < 1000
    assert out.isfinite().all()


def test_steps_of_euler_are_those_of_the_equation() -> None:
    """dx/dt = v, from t = 1 to 0, in float64."""
    objective = make_objective("flow")
    model = GaussianModel(objective)
    start, labels = torch.randn(2, 4, 4, 4), torch.tensor([0, 1])
    out = sample(model, objective, labels, steps=5, guidance=1, start=start)
    x = start.double()
    for step in range(5):
        t = torch.full((1,), 1 - step / 5, dtype=torch.float64)
        x = x - model(x, t * 1000, labels) / 5
    assert_close("sample", out, x, 1e-5)


def test_dpm_solver_of_a_flow_is_of_second_order() -> None:
    """A quarter of the step divides its error by more than 8, and Euler's by 4.

    From 80 steps on: near 20 the error of DPM-Solver++ changes its sign.
    """
    objective = make_objective("flow")
    model = GaussianModel(objective)
    start, labels = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    mean = model.mean[labels]
    exact = mean + 0.3 * start  # the path of each number keeps its place in a Gaussian

    def error(scheduler: str, steps: int) -> float:
        out = sample(model, objective, labels, steps=steps, scheduler=scheduler, guidance=1, start=start)
        return float((out - exact).norm())

    euler, dpm = ([error(name, steps) for steps in (80, 320)] for name in ("euler", "dpm-solver++"))
    assert dpm[0] > 8 * dpm[1]
    assert 3.6 * euler[1] < euler[0] < 4.4 * euler[1]
    assert dpm[1] < 0.1 * euler[1]


@pytest.mark.parametrize(("name", "scheduler"), PAIRS)
@pytest.mark.parametrize("steps", [2, 3])
def test_few_steps_of_the_cosine_schedule_stay_finite(name: str, scheduler: str, steps: int) -> None:
    objective = make_objective(name, "cosine", learn_sigma=True)
    model = GaussianModel(objective, "cosine")
    out = sample(model, objective, torch.tensor([0, 1]), steps=steps, scheduler=scheduler, guidance=1)
    assert out.isfinite().all()


@pytest.mark.parametrize(("name", "scheduler"), PAIRS)
def test_guidance_reaches_every_channel(name: str, scheduler: str) -> None:
    objective = make_objective(name, learn_sigma=True)
    model = GaussianModel(objective)
    labels = torch.zeros(50, dtype=torch.int64)
    out = sample(
        model, objective, labels, steps=50, scheduler=scheduler, guidance=2.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert_close("mean", out.mean((0, 2, 3)), 2 * model.mean[0].flatten(), 0.06)


@pytest.mark.parametrize(("name", "scheduler"), PAIRS)
def test_samples_follow_the_generator(name: str, scheduler: str) -> None:
    objective = make_objective(name)
    model, labels = GaussianModel(objective), torch.tensor([0, 1])

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(model, objective, labels, steps=4, scheduler=scheduler, generator=generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize(("name", "scheduler"), DETERMINISTIC)
@pytest.mark.parametrize("guidance", [1, 1.5])
def test_samples_do_not_depend_on_their_batch(name: str, scheduler: str, guidance: float) -> None:
    """A scheduler that remembers the batch before, as a multistep one would, fails."""
    objective = make_objective(name)
    model, labels = random_model(in_channels=3, learn_sigma=False).eval(), torch.arange(5)
    start = torch.randn(5, 3, 8, 8)
    whole, parts = (
        sample(
            model, objective, labels, steps=5, scheduler=scheduler, guidance=guidance, start=start,
            batch_size=batch_size,
        )
        for batch_size in (5, 2)
    )  # fmt: skip
    assert_close("samples", parts, whole, 1e-5)


@pytest.mark.parametrize(("name", "default"), [("eps", "ddim"), ("v", "ddim"), ("flow", "euler")])
def test_the_default_scheduler(name: str, default: str) -> None:
    objective = make_objective(name)
    model, start = GaussianModel(objective), torch.randn(2, 4, 4, 4)
    labels = torch.tensor([0, 1])
    found = {
        scheduler: sample(model, objective, labels, steps=3, scheduler=scheduler, start=start)
        for scheduler in (None, *SCHEDULERS[name])
    }
    assert [key for key, images in found.items() if torch.equal(images, found[None])] == [None, default]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("name", "scheduler"), PAIRS)
def test_pixels_are_clipped_and_latents_are_not(name: str, scheduler: str, schedule: str) -> None:
    """One and three channels are pixels; ``clip`` decides otherwise."""
    objective = make_objective(name, schedule, learn_sigma=True)
    largest = {}
    for channels, clip in ((1, None), (3, None), (4, None), (3, False), (4, True)):
        model = random_model(in_channels=channels, learn_sigma=objective.learn_sigma)
        with torch.no_grad():  # predictions large enough to need it
            model.final_layer.linear.weight.mul_(4)
        generator = torch.Generator().manual_seed(0)
        images = sample(
            model, objective, torch.tensor([1, 2]), steps=5, scheduler=scheduler, generator=generator,
            clip=clip,
        )  # fmt: skip
        largest[channels, clip] = float(images.abs().max())
    for case in ((1, None), (3, None), (4, True)):
        assert largest[case] <= 1 + 1e-5, case
    for case in ((4, None), (3, False)):
        assert largest[case] > 1.5, case


def test_clipping_changes_no_image_within_range() -> None:
    objective = make_objective("flow")
    model, start = GaussianModel(objective, std=0.0), torch.randn(2, 4, 4, 4)
    model.mean = model.mean.clamp(-0.9, 0.9)
    plain, clipped = (
        sample(model, objective, torch.tensor([0, 1]), steps=5, guidance=1, start=start, clip=clip)
        for clip in (False, True)
    )
    assert_close("sample", clipped, plain, 1e-5)


@pytest.mark.parametrize("name", ["eps", "v", "flow"])
def test_schedulers_that_do_not_fit(name: str) -> None:
    objective = make_objective(name)
    model = GaussianModel(objective)
    wrong = {"eps": "euler", "v": "euler", "flow": "ddim"}[name]
    for scheduler in (wrong, "heun", "", 3):
        message = f"scheduler is {scheduler!r}; {name} takes {SCHEDULERS[name][0]}, "
        with pytest.raises(ValueError, match=message):
            sample(model, objective, torch.tensor([0]), steps=4, scheduler=scheduler)


def test_unconditional_samples() -> None:
    model = SwitchDiT(4, 2, 3, 24, 1, 3, num_classes=0).eval()
    out = sample(model, make_objective("eps", learn_sigma=True), None, count=3, steps=2)
    assert out.shape == (3, 3, 4, 4)
    assert math.isfinite(out.sum())
