"""MoDE, EvoMoE's gate and Nucleus-Image's layer: parity with their codes, as models, and sampling."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoELayer
from helpers import assert_golden, case, random_model, top_k_of
from switch_dit import SwitchDiT, sample
from switch_dit import merged as merged_model
from switch_dit.data import load_data
from switch_dit.graphs import GraphedStep
from switch_dit.layers import Mlp
from switch_dit.merged import MergedSwitchDiT
from switch_dit.mode import ClampedRMSNorm, ModeBlock
from switch_dit.objectives import create_objective
from switch_dit.official_layers import layer_from_official, layer_state, layer_to_official
from switch_dit.settings import TrainConfig
from switch_dit.trainer import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from switch_moe import DenseToSparseMoE, FallingCapacityMoE, NoiseMoE
from switch_moe.dense_to_sparse import Temperature

State = dict[str, Tensor]


def part(tensors: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def assert_gradients(system: str, module: nn.Module, official: State, tolerance: float = 1e-5) -> None:
    """Every gradient of a module against those of the official names, where a missing one is zero."""
    zeros = {name: torch.zeros_like(value) for name, value in layer_to_official(system, module).items()}
    expected = layer_state(system, zeros | {name: official[name] for name in zeros if name in official})
    for name, parameter in module.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_golden(name, found, expected[name], tolerance)


class TestMode:
    @pytest.fixture
    def golden(self) -> tuple[State, dict[str, Any]]:
        tensors, _, metadata = case("mode")
        return tensors, metadata

    @pytest.fixture
    def block(self, golden) -> ModeBlock:
        tensors, metadata = golden
        sizes = metadata["block"]
        settings = {"top_k": sizes["top_k"], "causal": sizes["causal"]}
        block = layer_from_official("mode", part(tensors, "block.state_dict."), **settings)
        block.weights = {"load_balance": 1.0}
        assert block.attn.num_heads == sizes["num_heads"]
        assert block.moe.weight_out.shape[1] == sizes["expert_hidden_size"]
        assert block.moe.router.first.out_features == sizes["router_hidden_size"]
        return block

    @pytest.mark.parametrize("way", ["argmax", "multinomial"])
    def test_a_block_and_all_its_gradients(self, golden, block: ModeBlock, way: str) -> None:
        tensors, _ = golden
        run = part(tensors, f"block.{way}.")
        x, cond = (tensors[f"block.{name}"].requires_grad_() for name in ("x", "cond"))
        block.moe.sample = False
        h = block.normed(x, cond[:, 0])
        drawn = run["index"] if way == "multinomial" else None
        mixed, losses = block.moe(h, cond[:, 0], expert_index=drawn, with_losses=True)
        assert_golden("out", h + mixed, run["out"], 1e-6)
        assert_golden("balance", losses["load_balance"], run["load_balance"][0], 1e-6)
        (h + mixed).mul(tensors["block.grad_out"]).sum().backward(retain_graph=True)
        gradients = part(run, "grad.")
        assert_golden("x", x.grad, gradients["x"], 1e-5)
        assert_golden("cond", cond.grad, gradients["cond"], 1e-5)
        assert_gradients("mode", block, gradients)
        cond.grad = None
        block.zero_grad()
        losses["load_balance"].backward()
        of_balance = part(run, "grad_load_balance.")
        assert_golden("cond of balance", cond.grad, of_balance["cond"], 1e-5)
        assert_gradients("mode", block, of_balance)

    def test_what_the_router_says(self, golden, block: ModeBlock) -> None:
        tensors, _ = golden
        run, cond = part(tensors, "block.argmax."), tensors["block.cond"][:, 0]
        probs, logits = block.moe.router(cond)
        assert_golden("probs", probs, run["probs"][:, 0], 1e-6)
        assert_golden("logits", logits, run["router_logits"][:, 0], 1e-6)
        found = block.moe.likeliest(probs)
        chosen = found.expert_index.long().sort(-1).values
        assert torch.equal(chosen, run["index"][:, 0].sort(-1).values)
        dense = torch.zeros_like(probs).scatter(-1, found.expert_index.long(), found.expert_gate)
        assert_golden("gates", dense, run["gate_dense"][:, 0], 1e-6)
        losses = block.moe.losses(found, logits)
        assert_golden("z", losses["z"], run["z_loss"][0], 1e-6)

    def test_evaluation_and_the_experts_of_one_noise_level_as_one(self, golden, block: ModeBlock) -> None:
        tensors, _ = golden
        x, cond, fused = tensors["block.x"], tensors["block.cond"][:, 0], part(tensors, "block.fused.")
        block.eval()
        out, _ = block(x, cond, cond)
        assert_golden("eval", out, tensors["block.eval.out"], 1e-6)
        of_one = fused["cond"][0]
        routing = block.moe.route(of_one)
        [merged], (_, index, gate) = block.moe.merge_each(routing), routing[:3]
        assert index[0].sort().values.tolist() == fused["index"].sort().values.tolist()
        assert_golden("gate", gate[0].sort().values, fused["gate"].sort().values, 1e-6)
        for name, out in (
            ("merged", block(x, of_one, merged)),
            ("one row", block(x, of_one, of_one)[0]),
            ("many rows", block(x, of_one, of_one.expand(len(x), -1))[0]),
        ):
            assert_golden(name, out, fused["out"], 1e-6)
            assert_golden(name, out, fused["out_routed"], 1e-6)

    def test_the_whole_original_model(self, golden) -> None:
        """Actions, a state and a goal with the noise level as a first token, causal."""
        tensors, metadata = golden
        sizes, g = metadata["model"], part(tensors, "model.")
        state, gradients = part(g, "state_dict."), part(g, "grad.")
        of_blocks = [part(state, f"blocks.{i}.") for i in range(sizes["n_layers"])]
        blocks = [
            layer_from_official("mode", of_block, top_k=sizes["top_k"], sample=False)
            for of_block in of_blocks
        ]
        rest = {name: v.requires_grad_() for name, v in state.items() if not name.startswith("blocks.")}
        last = ClampedRMSNorm(sizes["embed_dim"])
        last.weight = nn.Parameter(rest["ln.g"])

        def model(goals: Tensor) -> tuple[Tensor, Tensor]:
            e = F.linear(g["sigma"].log()[:, None] / 4, rest["sigma_emb.weight"], rest["sigma_emb.bias"])
            e = F.linear(e, rest["sigma_linear.weight"])
            positions, given = rest["pos_emb"], 1 + sizes["goal_seq_len"] + sizes["obs_seq_len"]
            goal = F.linear(goals, rest["goal_emb.weight"]) + positions[:, :1]
            seen = F.linear(g["state_images"], rest["tok_emb.weight"]) + positions[:, 1:2]
            actions = F.linear(g["actions"], rest["action_emb.weight"]) + positions[:, 1:]
            h = torch.cat([e[:, None], goal, seen, actions], dim=1)
            balance = torch.zeros(())
            for block in blocks:
                block.weights = {"load_balance": 1 / len(blocks)}
                h, loss = block(h, e, e)
                balance = balance + loss
            return F.linear(last(h)[:, given:], rest["out.weight"], rest["out.bias"]), balance

        out, balance = model(g["goals"])
        assert_golden("out", out, g["out"], 1e-6)
        assert_golden("balance", balance, g["load_balance"][0], 1e-6)
        (out.mul(g["grad_out"]).sum() + sizes["load_balance_weight"] * balance).backward()
        for i, block in enumerate(blocks):
            assert_gradients("mode", block, part(gradients, f"blocks.{i}."))
        for name, value in rest.items():
            value = last.weight if name == "ln.g" else value
            found = torch.zeros_like(value) if value.grad is None else value.grad
            assert_golden(name, found, gradients[name], 1e-5)
        with torch.no_grad():
            for block in blocks:
                block.eval()
            assert_golden("eval", model(g["goals"])[0], g["eval.out"], 1e-6)
            without = model(torch.zeros_like(g["goals"]))[0]
            assert_golden("unconditional", without, g["eval.out_unconditional"], 1e-6)


class TestEvoMoE:
    @pytest.mark.parametrize(
        "run",
        [
            "dense",
            "soft0",
            "soft1",
            "soft_gumbel_gates",
            "hard",
            "hard_gumbel_gates",
            "eval",
            "eval_capacity",
        ],
    )
    def test_every_run_and_all_its_gradients(self, run: str) -> None:
        tensors, state, metadata = case("evomoe")
        sizes, expected = metadata["layer"], part(tensors, f"{run}.")
        settings = sizes["runs"][run]
        layer = layer_from_official(
            "evomoe", state, decay="constant", highest=settings.get("tau", 0.0), threshold=sizes["threshold"],
            gumbel_gates=settings.get("gumbel_gates", False), eval_fraction=settings.get("fraction", 0.0),
        )  # fmt: skip
        layer.train(settings["train"])
        layer.soft = settings.get("soft", True)
        x = tensors["x"].requires_grad_()
        noise = tensors["noise"].view(*x.shape[:2], -1)
        logits, _ = layer.router(x)
        assert_golden("logits", logits.flatten(0, 1), tensors["logits"], 1e-6)
        gate = layer.gate(logits, noise)
        assert_golden("gates", gate.probs.flatten(0, 1), expected["gates"], 1e-6)
        if settings["train"]:
            chosen = (gate.chosen >= 0).sum(-1).float().mean()
            assert abs(chosen.item() - settings["mean_experts_per_token"]) < 1e-6
        out, losses = layer(x, noise=noise, with_losses=True)
        assert_golden("out", out, expected["out"], 1e-6)
        assert_golden("balance", losses["load_balance"], expected["aux_loss"][0], 1e-6)
        loss = (out * tensors["grad_out"]).sum() + sizes["aux_weight"] * losses["load_balance"]
        loss.backward()
        gradients = part(expected, "grad.")
        assert_golden("x", x.grad, gradients["x"], 1e-5)
        assert_gradients("evomoe", layer, gradients)

    @pytest.mark.parametrize("name", ["exp", "linear", "default_switch"])
    def test_the_schedule(self, name: str) -> None:
        tensors, _, metadata = case("evomoe")
        s = metadata["schedules"][name]
        decay = {"Exp": "exponential", "Linear": "linear"}[s["kind"]]
        layer = DenseToSparseMoE(
            8, 2, decay=decay, highest=s["max"], lowest=s["min"], decay_steps=s["factor"], switch=s["switch"]
        )
        found = []
        for number in range(s["steps"]):
            layer.at_step(number, s["steps"])
            found.append((layer.temperature, layer.soft))
        temperature, soft = (torch.tensor(values, dtype=torch.float64) for values in zip(*found, strict=True))
        assert_golden("temperature", temperature, tensors[f"schedule.{name}.temperature"], 1e-12)
        assert torch.equal(soft.bool(), tensors[f"schedule.{name}.soft"])

    def test_a_constant_temperature_and_halves_of_the_run(self) -> None:
        half = Temperature("constant", 1.5)
        assert [half.at(n, 10) for n in (0, 1, 9)] == [1.5] * 3
        assert [half.is_soft(n, 10) for n in (0, 4, 5, 9)] == [True, True, False, False]
        assert not Temperature(switch=-1).is_soft(1, 10)
        falling = Temperature("linear", 2.0, 1.0)
        assert [falling.at(n, 8) for n in (0, 1, 2, 4, 7)] == [2.0, 1.75, 1.5, 1.0, 1.0]

    def test_the_captured_temperature_is_the_newest(self) -> None:
        """A CUDA graph keeps what it reads at the same place, so the temperature is written there."""
        layer = DenseToSparseMoE(8, 4, lowest=0.5, highest=2.0)
        assert not layer.at_step(0, 10)
        divisor = layer._divisor
        assert [layer.at_step(number, 10) for number in range(1, 7)] == [False] * 4 + [True, False]
        assert layer._divisor is divisor
        assert divisor == layer.temperature == 0.5


def random_nucleus(sigmoid: bool, tokens: int = 9) -> tuple[NucleusMoELayer, tuple[Tensor, ...]]:
    torch.manual_seed(3)
    layer = NucleusMoELayer(
        hidden_size=16, moe_intermediate_dim=24, num_experts=4, capacity_factor=1.7, use_sigmoid=sigmoid,
        route_scale=2.5, use_grouped_mm=False,
    )  # fmt: skip
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    shapes = ((3, tokens, 16), (3, tokens, 16), (3, 16))
    return layer, tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


class TestNucleus:
    @pytest.mark.parametrize("score", ["softmax", "sigmoid"])
    @pytest.mark.parametrize("tokens", [1, 9, 16])
    def test_outputs_and_gradients_are_those_of_diffusers(self, score: str, tokens: int) -> None:
        original, inputs = random_nucleus(score == "sigmoid", tokens)
        layer = layer_from_official("nucleus", original.state_dict(), capacity=1.7, score=score)
        copies = tuple(x.detach().clone().requires_grad_() for x in inputs)
        expected = original(*inputs)
        out = layer(copies[0], router_input=copies[1], time_embedding=copies[2])
        assert_golden("out", out, expected, 1e-6)
        cotangent = torch.randn_like(expected)
        expected.backward(cotangent)
        out.backward(cotangent)
        for name, found, wanted in zip(("x", "seen", "time"), copies, inputs, strict=True):
            assert_golden(name, found.grad, wanted.grad, 1e-5)
        assert_gradients("nucleus", layer, {name: p.grad for name, p in original.named_parameters()})

    def test_the_capacity_is_rounded_as_theirs(self) -> None:
        layer = FallingCapacityMoE(8, 49, capacity=49.0)
        assert [layer.tokens_per_expert(n) for n in (1, 7, 196)] == [1, 7, 196]
        layer = FallingCapacityMoE(8, 8, capacity=0.5)
        assert [layer.tokens_per_expert(n) for n in (1, 16, 17)] == [1, 1, 2]

    def test_the_capacity_falls_in_stages(self) -> None:
        layer = FallingCapacityMoE(8, 8, capacity=2.0, capacity_start=8.0, stages=4)
        assert layer.capacity == 2.0, "that of a trained layer"
        changed = [layer.at_step(number, 10) for number in range(10)]
        assert changed == [True, False, False, True, False, True, False, False, True, False]
        assert layer.capacity == 2.0
        layer.at_step(0, 10)
        assert layer.capacity == 8.0
        constant = FallingCapacityMoE(8, 8, stages=1)
        assert not constant.at_step(0, 0)


def official_states() -> dict[str, State]:
    tensors, of_evomoe, _ = case("evomoe")
    tensors, _, _ = case("mode")
    of_mode = part(tensors, "block.state_dict.")
    return {"mode": of_mode, "evomoe": of_evomoe, "nucleus": random_nucleus(False)[0].state_dict()}


@pytest.mark.parametrize("system", ["mode", "evomoe", "nucleus"])
def test_official_weights_go_there_and_back(system: str) -> None:
    state = official_states()[system]
    back = layer_to_official(
        system, layer_from_official(system, {f"module.{k}": v for k, v in state.items()})
    )
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    double = layer_from_official(system, {name: value.double() for name, value in state.items()})
    assert all(parameter.dtype == torch.float64 for parameter in double.parameters())


WRONG: list[tuple[str, Callable[[State], Any], str]] = [
    ("mode", lambda s: s.pop("ln_1.g"), r"lacks 'ln_1\.g'; it is not a layer of 'mode'"),
    ("mode", lambda s: s.pop("experts.expert_2.mlp.2.weight"), r"lacks 'experts\.expert_2\.mlp\.2\.weight'"),
    ("mode", lambda s: s.update({"ln_3.g": torch.ones(2)}), r"unknown 'ln_3\.g'"),
    ("mode", lambda s: s.update({"experts.expert_1.mlp.2.weight": torch.ones(2, 2)}), "of several shapes"),
    (
        "mode",
        lambda s: s.update({"attn.c_proj.weight": torch.ones(2, 2)}),
        r"attn\.proj\.weight of shape \(2",
    ),
    ("evomoe", dict.clear, r"lacks 'gate\.wg\.weight' and 4 more"),
    ("nucleus", lambda s: s.update({"experts.bias": torch.ones(2)}), r"unknown 'experts\.bias'"),
]


@pytest.mark.parametrize(("system", "change", "message"), WRONG)
def test_official_weights_that_do_not_fit_are_named(system: str, change: Any, message: str) -> None:
    state = dict(official_states()[system])
    change(state)
    with pytest.raises(ValueError, match=message):
        layer_from_official(system, state)


def mode_model(**settings: Any) -> SwitchDiT:
    """Routers that choose other experts at other timesteps."""
    model = random_model(routing="mode", num_experts=4, top_k=2, **settings)
    for block in model.blocks:
        nn.init.normal_(block.moe.router.second.weight, std=3.0)
    return model


class TestSampling:
    def samples(self, model: SwitchDiT) -> Tensor:
        return sample(
            model, create_objective("eps", learn_sigma=True), torch.tensor([1, 2, 3]), count=3, steps=4,
            guidance=1.5, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    def test_modes_steps_are_of_one_mlp(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = mode_model().eval()
        with torch.no_grad():
            routing = model.route(model.t_embedder(torch.arange(1000)))
        assert len({tuple(chosen.tolist()) for chosen in routing.expert_index[0].sort(-1).values}) > 1
        with monkeypatch.context() as patched:
            patched.setattr(merged_model, "AHEAD_OF_TIME", ())  # the model as it is
            expected = self.samples(model)
        monkeypatch.setattr(NoiseMoE, "forward", lambda *_, **__: pytest.fail("routed"))
        before = self.samples(model)
        assert_golden("samples", before, expected, 1e-5)

    def test_a_new_sampler_has_the_new_weights(self) -> None:
        model = mode_model().eval()
        before = self.samples(model)
        with torch.no_grad():
            for block in model.blocks:
                block.moe.weight_out.neg_()
        after = self.samples(model)
        assert not torch.allclose(before, after, rtol=0.01)
        same = mode_model().eval()
        same.load_state_dict(model.state_dict())
        assert torch.equal(self.samples(same), after)

    def test_memory_is_counted_as_it_is_used(self) -> None:
        merged = MergedSwitchDiT(mode_model().eval(), torch.arange(3), memory=10**9)
        merged(torch.randn(2, 3, 8, 8), 0, torch.tensor([0, 1]))
        used = sum(experts.nbytes for of_step in merged._kept.values() for (experts,) in of_step)
        assert 10**9 - merged.left == used

    def test_a_model_of_tokens_does_not_export(self) -> None:
        with pytest.raises(ValueError, match="'nucleus', whose experts differ from token to token"):
            random_model(routing="nucleus", num_experts=4).export_merged(3)


def trainer(folder: Path, routing: str, mixture: tuple[str, ...] = (), **settings: Any) -> Trainer:
    config = TrainConfig(
        routing=routing, num_experts=4, top_k=top_k_of(routing), mixture=mixture, batch_size=8, device="cpu",
        precision="float32", output=folder, **{"steps": 8, "warmup": 0, **settings},
    )  # fmt: skip
    config.validate()
    return Trainer(config, load_data("digits"))


def run(of: Trainer, steps: int) -> list[float]:
    return [float(of.step(n, *batch)["loss"]) for n, batch in enumerate(islice(of.batches(0), steps))]


@pytest.mark.parametrize("routing", ["mode", "evomoe"])
def test_the_experts_of_a_run_are_drawn_by_step_and_sample(routing: str, tmp_path: Path) -> None:
    """As all random numbers of a run: repeated, recomputed and in parts they are the same."""
    first = run(trainer(tmp_path, routing), 2)
    torch.rand(5)
    assert run(trainer(tmp_path, routing), 2) == first
    assert run(trainer(tmp_path, routing, checkpoint_activations=True), 2) == first
    in_parts = run(trainer(tmp_path, routing, ("load_balance=0",), accumulate=2), 2)
    whole = run(trainer(tmp_path, routing, ("load_balance=0",)), 2)
    assert in_parts == pytest.approx(whole, rel=1e-5)
    model = trainer(tmp_path, routing).model.train()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"expert_noise has shape \(2, 6, 3, 4\); it must be \[2, 6, 4, 4\]"):
        model(x, t, y, expert_noise=torch.zeros(2, 6, 3, 4))
    with pytest.raises(ValueError, match="expert_noise is given; the model draws no experts"):
        model.eval()(x, t, y, expert_noise=torch.zeros(2, 6, 4, 4))


def test_stages_of_a_run(tmp_path: Path) -> None:
    """Capacities fall, the gate becomes hard, and a step that was captured is forgotten at each change."""
    nucleus = trainer(
        tmp_path, "nucleus", ("capacity=4", "capacity_end=1", "stages=2", "dense_first=2"), steps=4
    )
    forgotten: list[int] = []
    graphed = GraphedStep(nucleus._advance)
    nucleus.advance = graphed
    graphed.forget = lambda: forgotten.append(1)  # type: ignore[method-assign]
    GraphedStep.__call__, original = (lambda self, *given: self.advance(*given)), GraphedStep.__call__
    try:
        mixtures = [m for m in nucleus.model.modules() if isinstance(m, FallingCapacityMoE)]
        assert len(mixtures) == 4
        capacities, of_average = (
            [],
            next(m for m in nucleus.ema.modules() if isinstance(m, FallingCapacityMoE)),
        )
        for number, batch in enumerate(islice(nucleus.batches(0), 4)):
            nucleus.step(number, *batch)
            capacities.append((mixtures[0].capacity, of_average.capacity, len(forgotten)))
    finally:
        GraphedStep.__call__ = original
    assert capacities == [(4.0, 4.0, 1), (4.0, 4.0, 1), (1.0, 1.0, 2), (1.0, 1.0, 2)]
    evomoe = trainer(tmp_path, "evomoe", ("switch=2",))
    run(evomoe, 3)
    assert not any(m.soft for m in evomoe.model.modules() if isinstance(m, DenseToSparseMoE))


def test_graphs_are_forgotten() -> None:
    step = GraphedStep(lambda chosen, match: {})
    step.graphs[True], step.steps = (None, {}), 5  # type: ignore[assignment]
    step.forget()
    assert (step.graphs, step.steps) == ({}, 0)


def test_options_of_the_three() -> None:
    small = {"hidden_size": 24, "num_heads": 3, "input_size": 8, "depth": 2}
    with pytest.raises(ValueError, match="dense_first 1 and dense_last 1; they must leave at least one of 2"):
        SwitchDiT(**small, routing="nucleus", mixture={"dense_first": 1, "dense_last": 1})
    model = SwitchDiT(
        **small, routing="nucleus", num_experts=4, mixture={"dense_first": 1, "score": "sigmoid"}
    )
    assert [isinstance(block.mlp, Mlp) for block in model.blocks] == [True, False]
    assert model.blocks[1].mlp.router_input == "normed"
    with pytest.raises(ValueError, match="decay is 'exp'"):
        SwitchDiT(**small, routing="evomoe", top_k=1, mixture={"decay": "exp"})
    model = SwitchDiT(**small, routing="mode", num_experts=4, mixture={"causal": True, "load_balance": 0.5})
    assert model.blocks[0].attn.causal
    e, x = torch.randn(3, 24), torch.randn(3, 5, 24)
    expected = [block.moe.eval()(x, e, with_losses=True)[1]["load_balance"] for block in model.blocks]
    found = [block(x, e, e)[1] for block in model.eval().blocks]
    assert found[0] > 0
    out, balance = model(torch.randn(3, 4, 8, 8), torch.arange(3), torch.arange(3), with_prior=True)
    e = model.t_embedder(torch.arange(3))
    expected = [
        block.moe(torch.zeros(3, 1, 24), e, with_losses=True)[1]["load_balance"] for block in model.blocks
    ]
    torch.testing.assert_close(balance, 0.5 * torch.stack(expected).mean())
    assert model.t_embedder.mlp[0].weight.grad is None
    assert out.shape == (3, 8, 8, 8)
