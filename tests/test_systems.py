"""Systems of the family as models: options, configuration, training by name."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import assert_close, random_model, top_k_of
from switch_dit import SwitchDiT, sample
from switch_dit.data import load_data
from switch_dit.objectives import create_objective
from switch_dit.sampling import Guidance, _Predictor
from switch_dit.settings import TrainConfig
from switch_dit.systems import SYSTEMS, options_of, parsed_options
from switch_dit.trainer import Trainer
from torch import Tensor

from switch_moe import DiffMoE


@pytest.mark.parametrize("routing", SYSTEMS)
def test_a_model_of_each_system(routing: str, tmp_path: Path) -> None:
    """It is saved and loaded, one timestep stands for many, and every parameter learns."""
    model = random_model(routing=routing, num_experts=4, top_k=top_k_of(routing)).eval()
    x, y = torch.randn(3, 3, 8, 8), torch.tensor([0, 4, 5])
    model.save_pretrained(tmp_path)
    again = SwitchDiT.from_pretrained(tmp_path).eval()
    assert again.settings == model.settings
    with torch.no_grad():
        out = model(x, torch.full((3,), 7), y)
        assert torch.equal(again(x, torch.full((3,), 7), y), out)
        assert_close("one timestep", model(x, torch.tensor([7]), y), out, 1e-5)
    model.train()
    torch.manual_seed(0)
    out, balance = model(x.repeat(4, 1, 1, 1), torch.arange(12) * 80, y.repeat(4), with_prior=True)
    (out.square().sum() + balance).backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


@pytest.mark.parametrize("routing", SYSTEMS)
def test_recomputed_activations_change_nothing(routing: str) -> None:
    grads = []
    for recompute in (False, True):
        model = random_model(routing=routing, num_experts=4, top_k=top_k_of(routing), class_dropout_prob=0.0)
        if recompute:
            model.enable_gradient_checkpointing()
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3])
        torch.manual_seed(2)
        out, balance = model(x, torch.tensor([1, 300, 600, 900]), y, with_prior=True)
        (out.square().sum() + balance).backward()
        state = [b.clone() for b in model.state_dict().values()]
        grads.append([*(p.grad for p in model.parameters() if p.grad is not None), *state])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("routing", SYSTEMS)
def test_a_run_of_each_system_goes_down(routing: str, tmp_path: Path) -> None:
    """A few steps on digits, whose loss falls, and samples of the result."""
    config = TrainConfig(
        routing=routing, num_experts=4, top_k=top_k_of(routing), batch_size=32, steps=12, lr=2e-3, warmup=2,
        output=tmp_path, device="cpu", precision="float32",
    )  # fmt: skip
    config.validate()
    trainer = Trainer(config, load_data("digits"))
    losses = [float(trainer.step(n, *batch)["mse"]) for n, batch in enumerate(islice(trainer.batches(0), 12))]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    images = sample(
        trainer.ema, create_objective("eps", learn_sigma=True), torch.tensor([1, 2]), count=2, steps=2,
        guidance=1.5, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert images.isfinite().all()


def test_options() -> None:
    assert options_of("dit_moe", {"load_balance": 1})["load_balance"] == 1.0
    assert options_of("switch", None) == {"load_balance": 0.0, "z_loss": 0.0}
    assert parsed_options("ec_dit", ("capacity=1.5", "bias=False", "router_input=stream")) == {
        "capacity": 1.5, "bias": False, "router_input": "stream",
    }  # fmt: skip
    for routing, texts, message in (
        ("switch", ("capacity=1",), "mixture holds 'capacity'; the options of 'switch' are load_balance, "),
        ("dtr", ("capacity=1",), "mixture holds 'capacity'; the options of 'dtr' are none"),
        ("ec_dit", ("capacity",), "mixture holds 'capacity'; it must be NAME=VALUE"),
        ("ec_dit", ("capacity=many",), "mixture holds 'capacity=many'; its value must be of type float"),
        ("ec_dit", ("bias=1",), "mixture holds 'bias=1'; its value must be of type bool"),
        ("dit_moe", ("depth=1",), "mixture holds 'depth'; the options of 'dit_moe' are shared_ratio, "),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            parsed_options(routing, texts)
    with pytest.raises(ValueError, match="mixture's load_balance is nan; it must be a finite number"):
        options_of("dit_moe", {"load_balance": float("nan")})
    for every in (0, 7):
        with pytest.raises(ValueError, match=f"every is {every}; it must be at "):
            random_model(routing="ec_dit", num_experts=4, top_k=2, mixture={"every": every})
    with pytest.raises(TypeError, match=r"mixture's every is 2\.5; it must be of type int"):
        options_of("ec_dit", {"every": 2.5})


def test_routing_names_are_those_of_the_models() -> None:
    from typing import get_args, get_type_hints

    from switch_dit.model import ROUTINGS

    assert set(ROUTINGS) <= set(get_args(get_type_hints(TrainConfig)["routing"]))


def test_losses_of_balance_beside_the_prior() -> None:
    settings = {"num_experts": 4, "top_k": 2, "class_dropout_prob": 0.0}
    plain = random_model(**settings)
    x, t, y = torch.randn(6, 3, 8, 8), torch.arange(6) * 150, torch.arange(6) % 5
    ties = torch.rand(2, len(plain.assignment))
    prior = plain(x, t, y, with_prior=True, ties=ties)[1]
    routing = plain.route(plain.t_embedder(t))
    expected = {"load_balance": 0.0, "z_loss": 0.0}
    for block in routing.blocks():
        chosen = torch.nn.functional.one_hot(block.expert_index.long(), 4).sum(1).float()  # [B, M]
        expected["load_balance"] += 4 * (chosen.mean(0) / 2 * block.probs.mean(0)).sum() / 2
    logits = torch.einsum("bd,lmd->lbm", torch.nn.functional.silu(plain.t_embedder(t)), plain.router.weight)
    expected["z_loss"] = (logits + plain.router.bias[:, None]).logsumexp(-1).square().mean()
    for name, value in expected.items():
        model = random_model(**settings, mixture={name: 0.5})
        found = model(x, t, y, with_prior=True, ties=ties)[1]
        torch.testing.assert_close(found - prior, 0.5 * value)
        found.backward()
        assert model.router.weight.grad.any()


def test_active_parameters() -> None:
    settings = {"input_size": 8, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    dense = SwitchDiT(**settings, routing="none")
    assert dense.active_parameters() == sum(p.numel() for p in dense.parameters())
    moe = SwitchDiT(**settings, routing="dit_moe", num_experts=8, top_k=2)
    expert, shared, router = 3 * 24 * 96, 3 * 24 * 48, 8 * 24
    mlp = 2 * 24 * 96 + 24 + 96
    assert moe.active_parameters() - dense.active_parameters() == 2 * (2 * expert + shared + router - mlp)
    switch = SwitchDiT(**settings, num_experts=3, top_k=2)
    linear = 24 * 24 + 24
    assert switch.active_parameters() == sum(p.numel() for p in switch.parameters()) - 2 * linear


def test_every_option_is_described() -> None:
    text = (Path(__file__).parent.parent / "models" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| .*? \| (`.*?) \|$", text, re.MULTILINE))
    shared = ("load_balance", "z_loss", "every")
    for routing, system in SYSTEMS.items():
        for name, default in system.options.items():
            written = f"`{name}={str(default).lower()}`"
            beside = name in shared or (name in rows[routing] and written in text)
            assert written in rows[routing] or beside, f"{routing}: {written}"


def test_a_run_whose_experts_choose_among_several_images(tmp_path: Path) -> None:
    """It is described, trained, and drawn from in any number, whatever the pool."""
    settings = {"num_experts": 4, "batch_size": 12, "steps": 1, "output": tmp_path, "device": "cpu"}
    data, flops = load_data("digits"), []
    for mixture in ((), ("pool=3",)):
        config = TrainConfig(routing="ec_dit", mixture=mixture, precision="float32", **settings)
        config.validate()
        trainer = Trainer(config, data)
        flops.append(trainer.flops_per_image())
    assert flops[1] == pytest.approx(flops[0], rel=0.1)
    trainer.step(0, *next(trainer.batches()))
    objective = create_objective("eps", learn_sigma=True)
    for guidance in (1.0, 1.5):
        drawn = sample(trainer.ema, objective, torch.tensor([1]), steps=2, guidance=guidance)
        assert drawn.isfinite().all()


def test_an_image_alone_is_not_drawn_beside_empty_ones() -> None:
    """A CPU evaluates groups of a fixed size; experts that choose among a batch see copies of its images."""
    torch.manual_seed(0)
    model = random_model(routing="diffmoe", num_experts=4, top_k=2, num_classes=5).eval()
    x, t, y = torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.tensor([2])
    seen: list[Tensor] = []
    for layer in model.modules():
        if isinstance(layer, DiffMoE):  # its experts take half of the tokens of an empty image
            hook = layer.predictor.register_forward_hook(lambda *found: seen.append(found[-1].sigmoid()))
            with torch.no_grad():
                model(torch.zeros_like(x), t, torch.tensor([0]))
            layer.predictor.threshold.copy_(seen.pop().flatten(0, 1).median(0).values)
            hook.remove()
    with torch.no_grad():
        predictor = _Predictor(model, t, Guidance(1.0))
        assert predictor.group > 1
        assert_close("alone", predictor(x, 0, y), model(x, t, y), 1e-5)
