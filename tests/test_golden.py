"""Parity with numbers of the official implementation, see golden/README.md."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, golden
from switch_dit import (
    GaussianDiffusion,
    SwitchDiT,
    convert_official_state_dict,
    convert_to_official_state_dict,
    sample,
)
from switch_dit.objectives import create_objective
from switch_dit.tables import dtr_mask

from switch_moe import DiffusionPrior, SwitchMoE

MODELS = ("switch_tiny", "dtr_tiny")
SCHEDULES = ("linear", "cosine")


def load_model(name: str) -> tuple[SwitchDiT, dict[str, torch.Tensor]]:
    tensors, sizes = golden(name)
    sizes["routing"] = {"DMoE": "switch", "DTR": "dtr"}[sizes["routing"]]
    model = SwitchDiT(**sizes)
    official = {
        key.removeprefix("state_dict."): v for key, v in tensors.items() if key.startswith("state_dict.")
    }
    model.load_state_dict(convert_official_state_dict(official))
    return model.eval(), tensors


@pytest.mark.parametrize("index", range(3))
def test_layer(index: int) -> None:
    tensors, sizes = golden(f"layer_{index}")
    layer = SwitchMoE(**sizes)
    layer.load_state_dict(
        {
            "router.weight": tensors["gate_weight"][None],
            "router.bias": tensors["gate_bias"][None],
            "weight": tensors["expert_weight"],
            "bias": tensors["expert_bias"],
        }
    )
    embedding = tensors["full_time_embedding"].requires_grad_()
    x = tensors["x"].requires_grad_()
    with torch.no_grad():
        chosen = layer.route(embedding).expert_index
        selected = torch.zeros_like(tensors["selected_all"]).scatter_(1, chosen.long(), 1.0)
    assert torch.equal(selected, tensors["selected_all"])
    routing = layer.route(embedding[tensors["t"]])
    one_plus = 1 + layer(x, routing=routing)
    assert_close("probs", routing.probs, tensors["probs"], 1e-5)
    assert_close("1 + m(x)", one_plus, tensors["one_plus_mixture"], 1e-5)
    ((one_plus * tensors["grad_out"]).sum() + (routing.probs * tensors["grad_probs"]).sum()).backward()
    for name, parameter in [
        ("x", x),
        ("full_time_embedding", embedding),
        ("gate_weight", layer.router.weight),
        ("gate_bias", layer.router.bias),
        ("expert_weight", layer.weight),
        ("expert_bias", layer.bias),
    ]:
        expected = tensors[f"grad_{name}"]
        assert_close(f"gradient of {name}", parameter.grad.view(expected.shape), expected, 1e-4)


@pytest.mark.parametrize("index", range(3))
def test_prior(index: int) -> None:
    tensors, sizes = golden(f"prior_{index}")
    optimum = sizes.pop("optimal_cost")
    prior = DiffusionPrior(**sizes)
    assert torch.equal(prior.table, tensors["prior"])
    assignment = prior.match(tensors["selected_all"])
    cost = (tensors["selected_all"] - prior.table[:, assignment]).abs().sum()
    assert cost == optimum
    probs = tensors["probs"].requires_grad_()
    loss = prior.loss(probs, tensors["t"], tensors["assignment"])
    assert_close("loss", loss[None], tensors["jsd_given_assignment"], 1e-5)
    loss.backward()
    assert_close("gradient", probs.grad, tensors["grad_probs_given_assignment"], 1e-4)


def test_schedules_and_tables() -> None:
    tensors, _ = golden("schedules")
    for schedule in SCHEDULES:
        diffusion = GaussianDiffusion(schedule)
        assert_close("betas", torch.from_numpy(diffusion.betas), tensors[f"betas.{schedule}"], 1e-12)
        expected = tensors[f"alphas_cumprod.{schedule}"]
        assert_close("alphas_cumprod", torch.from_numpy(diffusion.alphas_cumprod), expected, 1e-12)
    assert torch.equal(dtr_mask(1000, 384).to(torch.uint8), tensors["dtr_mask.hidden384.alpha4.beta0.8"])
    for depth, experts, top_k in [(12, 3, 2), (12, 4, 1), (28, 3, 2)]:
        expected = tensors[f"prior_mask.depth{depth}.experts{experts}.top{top_k}"]
        assert torch.equal(DiffusionPrior(depth, experts, top_k).table.to(torch.uint8), expected)


@pytest.mark.parametrize("name", MODELS)
def test_model_outputs(name: str) -> None:
    model, tensors = load_model(name)
    with torch.no_grad():
        assert_close("eval", model(tensors["x"], tensors["t"], tensors["y"]), tensors["eval_output"], 1e-5)
        guided = model.forward_with_cfg(tensors["x"], tensors["cfg_t"], tensors["cfg_y"], 1.5)
    assert_close("guided", guided, tensors["cfg_output"], 1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weighting", ["constant", "min_snr_5"])
def test_losses_and_gradients(name: str, schedule: str, weighting: str) -> None:
    model, tensors = load_model(name)
    diffusion = GaussianDiffusion(schedule, weighting=weighting)
    x_start, t, noise = tensors["x_start"], tensors["t"], tensors["noise"]
    x_t = diffusion.q_sample(x_start, t, noise)
    assert_close("x_t", x_t, tensors[f"x_t.{schedule}"], 1e-5)
    losses = diffusion.training_losses(model(x_t, t, tensors["y"]), x_start, x_t, t, noise)
    for term in ("mse", "vb"):
        expected = tensors[f"loss_{term}.{schedule}.{weighting}"]
        for sample_index in range(len(t)):  # one by one: the bound at t = 999 hides the others
            assert_close(f"{term}[{sample_index}]", losses[term][sample_index], expected[sample_index], 1e-5)
    if (schedule, weighting) == ("linear", "constant"):
        (losses["mse"] + losses["vb"]).mean().backward()
        expected = {key.removeprefix("grad."): v for key, v in tensors.items() if key.startswith("grad.")}
        expected = convert_official_state_dict(expected)
        parameters = dict(model.named_parameters())
        assert set(expected) == {key for key, p in parameters.items() if p.requires_grad}
        for key, gradient in expected.items():
            assert_close(f"gradient of {key}", parameters[key].grad, gradient, 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_p_mean_variance(name: str) -> None:
    model, tensors = load_model(name)
    respaced, kept = GaussianDiffusion("linear").respaced(10)
    assert torch.equal(kept, tensors["ddim_timestep_map"])
    t = tensors["pmv_t"]
    with torch.no_grad():
        out = respaced.p_mean_variance(model(tensors["x"], kept[t], tensors["y"]), tensors["x"], t)
    for key, value in out.items():
        assert_close(key, value, tensors[f"pmv_{key}"], 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_ddim_sample(name: str) -> None:
    model, tensors = load_model(name)
    z = tensors["ddim_z"]
    labels = tensors["cfg_y"][: len(z)]
    objective = create_objective("eps", learn_sigma=model.learn_sigma)
    out = sample(model, objective, labels, steps=10, scheduler="ddim", guidance=1.5, start=z)
    assert_close("DDIM sample", out, tensors["ddim_sample"], 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_conversion_round_trip(name: str) -> None:
    model, tensors = load_model(name)
    official = {
        key.removeprefix("state_dict."): v for key, v in tensors.items() if key.startswith("state_dict.")
    }
    back = convert_to_official_state_dict(model.state_dict(), model.routing)
    assert set(back) == set(official)
    for key, value in official.items():
        assert torch.equal(back[key], value), key
