"""Objectives: targets, per-sample losses, and what a prediction implies."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from switch_dit import GaussianDiffusion, SwitchDiT
from switch_dit.objectives import OBJECTIVES, DiffusionObjective, FlowObjective, create_objective
from switch_dit.tables import table_row
from switch_dit.timesteps import SpeeD
from torch import Tensor

SCHEDULES = ("linear", "cosine")
KINDS = [("eps", True), ("eps", False), ("v", False), ("flow", False)]


def inputs(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x_start, noise = torch.randn(2, batch, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x_start, noise


def truth(name: str, x_start: Tensor, noise: Tensor, t: Tensor, diffusion: GaussianDiffusion) -> Tensor:
    """The target, from the papers' formulas in float64."""
    x_start, noise = x_start.double(), noise.double()
    if name == "eps":
        return noise
    if name == "flow":
        return noise - x_start
    alpha_bar = torch.from_numpy(diffusion.alphas_cumprod)[t][:, None, None, None]
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_start


@pytest.mark.parametrize(("name", "learn_sigma"), KINDS)
@given(
    times=st.lists(st.sampled_from([0.0, 1e-7, 0.3, 0.9989, 1.0]), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=30, deadline=None)
def test_losses(name: str, learn_sigma: bool, times: list[float], dtype: torch.dtype) -> None:
    """Any number of samples, the ends of time, every type: float32 [B], from the formula in float64."""
    objective = create_objective(name, learn_sigma=learn_sigma)
    t = torch.tensor(times, dtype=torch.float32)
    if not objective.continuous:
        t = (t * 1000).long().clamp(max=999)
    x_start, noise = inputs(len(times), dtype)
    x_t = objective.q_sample(x_start, t, noise)
    out = torch.cat([noise, x_start], dim=1)[:, : 6 if learn_sigma else 3] * 0.5
    losses = objective.losses(out, x_start, x_t, t, noise)
    assert set(losses) == ({"mse", "vb"} if learn_sigma else {"mse"})
    for loss in losses.values():
        assert loss.dtype == torch.float32
        assert loss.shape == (len(times),)
        assert loss.isfinite().all()
    error = out[:, :3].double() - truth(name, x_start, noise, t, GaussianDiffusion())
    assert_close("mse", losses["mse"], error.square().flatten(1).mean(1), 1e-5)
    weight = torch.linspace(0, 2, len(times), dtype=torch.float64)
    weighted = objective.losses(out, x_start, x_t, t, noise, weight)
    assert torch.equal(weighted["mse"], weight.float() * losses["mse"])
    if learn_sigma:
        assert torch.equal(weighted["vb"], losses["vb"])
    assert objective.model_time(t).shape == t.shape


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_true_prediction_gives_back_image_and_noise(name: str, schedule: str, dtype: torch.dtype) -> None:
    objective = create_objective(name, schedule=schedule if name != "flow" else "linear")
    x_start, noise = inputs(4, dtype)
    t = torch.tensor([0.0, 0.25, 0.75, 1.0]) if name == "flow" else torch.tensor([0, 1, 500, 900])
    x_t = objective.q_sample(x_start, t, noise)
    target = truth(name, x_start, noise, t, GaussianDiffusion(schedule)).to(dtype)
    predicted = objective.predict(target, x_t, t)
    assert_close("x_start", predicted.x_start, x_start, 1e-5)
    assert_close("noise", predicted.noise, noise, 1e-5)
    loss = objective.losses(target, x_start, x_t, t, noise)["mse"]
    assert loss.max() < 1e-12


def test_one_error_in_three_forms() -> None:
    """min-SNR weights the same errors alike, whichever of noise and velocity the model predicts."""
    x_start, noise = inputs(3)
    t = torch.tensor([3, 400, 900])
    eps, v = (create_objective(name, weighting="min_snr_5") for name in ("eps", "v"))
    x_t = eps.q_sample(x_start, t, noise)
    out = noise + 0.1 * x_start
    image = eps.predict(out, x_t, t).x_start.double()
    velocity = truth("v", image, out, t, eps.diffusion).float()
    assert_close("noise from velocity", v.predict(velocity, x_t, t).noise, out, 1e-5)
    of_eps = eps.losses(out, x_start, x_t, t, noise)["mse"]
    assert_close("mse", v.losses(velocity, x_start, x_t, t, noise)["mse"], of_eps, 1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients(name: str) -> None:
    """Against autograd's numerical gradient in terms of the formula, weight included."""
    objective = create_objective(name)
    x_start, noise = inputs(2)
    t = torch.tensor([0.2, 0.9]) if objective.continuous else torch.tensor([200, 900])
    x_t = objective.q_sample(x_start, t, noise)
    out = (0.5 * noise).requires_grad_()
    weight = torch.tensor([0.5, 2.0])
    objective.losses(out, x_start, x_t, t, noise, weight)["mse"].sum().backward()
    error = out.detach().double() - truth(name, x_start, noise, t, GaussianDiffusion())
    expected = 2 * weight[:, None, None, None] * error / error[0].numel()
    assert_close("gradient", out.grad, expected, 1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_official_speed_loss(schedule: str) -> None:
    tensors, _ = golden("speed")
    x_start, noise, t, out = (
        tensors[f"{schedule}.loss.{key}"] for key in ("x_start", "noise", "t", "model_output")
    )
    objective = DiffusionObjective(GaussianDiffusion(schedule), "eps", learn_sigma=True)
    weight = SpeeD(objective.diffusion).weight[t]
    x_t = objective.q_sample(x_start, t, noise)
    plain = objective.losses(out, x_start, x_t, t, noise)
    weighted = objective.losses(out, x_start, x_t, t, noise, weight)
    assert_close("vb", plain["vb"], tensors[f"{schedule}.loss.vb"], 1e-5)
    expected = tensors[f"{schedule}.loss.loss"]
    for sample in range(len(t)):  # one by one: large bounds would hide the others
        assert_close(
            f"loss[{sample}]", weighted["mse"][sample] + weighted["vb"][sample], expected[sample], 1e-5
        )


@given(t=st.floats(0, 1, width=32), n=st.sampled_from([1, 21, 1000, 4096, 2**24]))
@settings(max_examples=100, deadline=None)
def test_flow_time_stays_below_n(t: float, n: int) -> None:
    time = FlowObjective(n).model_time(torch.tensor([t, 0.0, 1.0]))
    assert time.dtype == torch.float32
    assert (time >= 0).all()
    assert (time < n).all()
    rows = table_row(time)
    assert rows[1:].tolist() == [0, n - 1]
    assert float(time[0]) == pytest.approx(n * t, rel=1e-6, abs=1e-30)
    wide = FlowObjective(n).model_time(torch.tensor([1 - 1e-16], dtype=torch.float64))
    assert wide < n


def test_flow_rows_are_met_alike() -> None:
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    rows = table_row(FlowObjective(1000).model_time(u))
    assert (rows.bincount(minlength=1000) == 10).all()


@pytest.mark.parametrize("routing", ["switch", "dtr", "none"])
def test_a_model_takes_continuous_time(routing: str) -> None:
    """An integral time in float is the integer; between two the embedding moves and the prior's row stays."""
    torch.manual_seed(0)
    model = SwitchDiT(4, 2, 3, 24, 2, 3, num_classes=0, routing=routing, learn_sigma=False).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    for layer in (model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        torch.nn.init.normal_(layer.weight, std=0.5)
    x, t = torch.randn(3, 3, 4, 4), torch.tensor([0, 17, 999])
    exact, prior = model.forward_with_prior(x, t, match=False)
    same, same_prior = model.forward_with_prior(x, t.float(), match=False)
    assert torch.equal(same, exact)
    assert torch.equal(same_prior, prior)
    _, prior_between = model.forward_with_prior(x, t + 0.5, match=False)
    if routing == "switch":
        probs = model.route(model.t_embedder(t + 0.5)).probs.transpose(0, 1).flatten(1)
        expected = model.prior.loss(probs, t, model.assignment)
        assert_close("prior", prior_between[None], expected[None], 1e-6)
        assert prior_between != prior
    with pytest.raises(ValueError, match=r"t holds 0.0 to 1000.0; it must stay in \[0, 1000\)"):
        model(x, torch.tensor([0.0, 1.0, 1000.0]))
    flow = FlowObjective(model.num_timesteps)
    time = torch.tensor([0.0, 0.5, 1.0])
    out, _ = model.forward_with_prior(flow.q_sample(x, time, x.flip(0)), flow.model_time(time))
    assert flow.losses(out, x, x, time, x.flip(0))["mse"].isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_broken_sample_stays_alone(name: str) -> None:
    objective = create_objective(name)
    x_start, noise = inputs(3)
    t = torch.tensor([0.2, 0.5, 0.9]) if objective.continuous else torch.tensor([200, 500, 900])
    out = noise.clone()
    out[1, 0, 0, 0] = math.nan
    losses = objective.losses(out, x_start, objective.q_sample(x_start, t, noise), t, noise)
    assert losses["mse"].isfinite().tolist() == [True, False, True]


X = torch.zeros(2, 3, 4, 4)
T, TIME = torch.tensor([0, 999]), torch.tensor([0.0, 1.0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: create_objective("x0"), ValueError, "name is 'x0'; it must be one of eps, v, flow"),
        (lambda: create_objective("v", learn_sigma=True), ValueError, "learn_sigma is True; it must"),
        (lambda: create_objective("flow", learn_sigma=True), ValueError, "learn_sigma is True"),
        (lambda: create_objective("flow", weighting="p2"), ValueError, "weighting is 'p2'; flow takes"),
        (lambda: create_objective("flow", schedule="cosine"), ValueError, "schedule is 'cosine'; flow has"),
        (lambda: create_objective("eps", learn_sigma=1), TypeError, "learn_sigma is 1"),
        (lambda: DiffusionObjective("linear"), TypeError, "diffusion is a str; it must be"),
        (lambda: FlowObjective(0), ValueError, "num_timesteps is 0"),
        (lambda: FlowObjective().q_sample(X, T, X), TypeError, "t is torch.int64"),
        (lambda: FlowObjective().q_sample(X, TIME + 0.5, X), ValueError, "t holds 0.5 to 1.5; it must stay"),
        (lambda: FlowObjective().q_sample(X, TIME * math.nan, X), ValueError, "t holds nan"),
        (lambda: FlowObjective().q_sample(X, TIME[:1], X), ValueError, r"t has shape \(1,\)"),
        (lambda: FlowObjective().q_sample(X, TIME, X[:, :1]), ValueError, "noise has shape"),
        (lambda: FlowObjective().model_time(T), TypeError, "t is torch.int64"),
        (lambda: FlowObjective().losses(X.repeat(1, 2, 1, 1), X, X, TIME, X), ValueError, "model_output has"),
        (lambda: create_objective("v").q_sample(X, TIME, X), TypeError, "t is torch.float32"),
        (lambda: create_objective("v").q_sample(X, T + 1, X), ValueError, "t holds 1 to 1000"),
        (
            lambda: create_objective("v").losses(X.repeat(1, 2, 1, 1), X, X, T, X),
            ValueError,
            r"model_output has shape \(2, 6, 4, 4\); it must be \[2, 3, 4, 4\]",
        ),
        (
            lambda: create_objective("eps", learn_sigma=True).losses(X, X, X, T, X),
            ValueError,
            r"model_output has shape \(2, 3, 4, 4\); it must be \[2, 6, 4, 4\]",
        ),
        (lambda: create_objective().losses(X, X, X, T, X, T), TypeError, "weight is torch.int64"),
        (lambda: create_objective().losses(X, X, X, T, X, TIME[:1]), ValueError, "weight has shape"),
        (lambda: create_objective().predict(X.long(), X, T), TypeError, "model_output is torch.int64"),
        (lambda: create_objective().predict(None, X, T), TypeError, "model_output is None"),
    ],
)  # fmt: skip
def test_errors(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
