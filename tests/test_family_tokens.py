"""Parity with numbers of DiT-MoE, EC-DIT and DiffMoE, see golden/README.md."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import State, assert_golden, case
from switch_dit import SwitchDiT, from_official, to_official
from switch_dit.objectives import FlowObjective
from switch_dit.official import FLOWS, mixture_from_official, mixture_to_official
from switch_dit.systems import Mixture
from torch import Tensor, nn

from switch_moe import DiffMoE, TokenMoE

OUTPUTS, GRADIENTS = 1e-6, 5e-6  # 2.1e-7 to 3.6e-7 and 8.8e-7 for float64


def under(prefix: str, tensors: State) -> State:
    return {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}


def layer(system: str, part: str) -> tuple[TokenMoE, State, dict[str, Any]]:
    """A layer alone, its numbers and its metadata."""
    tensors, state, metadata = case(system, f"{part}.state_dict.")
    about, tensors = metadata[part], under(f"{part}.", tensors)
    own, options, sizes = mixture_from_official(system, dict(state))
    assert sizes == {"num_experts": about["num_experts"], "inner_size": about["expert_hidden_size"]}
    assert round(options["shared_ratio"] * about["hidden_size"]) == about["shared_hidden_size"]
    settings = {
        "expert_hidden_size": sizes["inner_size"], "shared_hidden_size": about["shared_hidden_size"],
        "activation": options["activation"], "bias": options["bias"],
    }  # fmt: skip
    size = about["hidden_size"], about["num_experts"]
    if system == "dit_moe":
        moe = TokenMoE(*size, about["top_k"], **settings)
    elif system == "ec_dit":
        moe = TokenMoE(*size, capacity=float(about["capacity"]), **settings)
    else:
        assert options["decay"] == about["threshold_decay"]
        moe = DiffMoE(*size, capacity=float(about["capacity"]), decay=options["decay"], **settings)
    moe.load_state_dict(own)
    assert_same(mixture_to_official(system, moe, own), state)
    return moe, tensors, about


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_layer_gradients(system: str, moe: TokenMoE, x: Tensor, tensors: State, prefix: str) -> None:
    own = {name: torch.zeros_like(value) for name, value in moe.state_dict().items()}
    own |= {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}
    found = {**mixture_to_official(system, moe, own), "x": x.grad}
    expected = under(prefix, tensors)
    assert expected.keys() >= ({"x"} if "aux" in prefix else found.keys() - {"expert_threshold", "ema_decay"})
    for name, value in expected.items():
        assert_golden(prefix + name, found[name], value, GRADIENTS)


def dense(index: Tensor, gate: Tensor, size: int) -> Tensor:
    """Gates at their places, the same for any order of the choices: [.., k] to [.., size]."""
    return gate.new_zeros(*gate.shape[:-1], size).scatter(-1, index.long(), gate)


def test_the_layer_of_dit_moe() -> None:
    moe, tensors, about = layer("dit_moe", "layer")
    alpha, x = about["aux_loss_alpha"], tensors["x"].requires_grad_()
    gate, _ = moe.route(x)
    assert_golden("probs", gate.probs, tensors["probs"], OUTPUTS)
    assert torch.equal(gate.chosen.sort(-1).values.long(), tensors["topk_index"].sort(-1).values)
    expected = dense(tensors["topk_index"], tensors["topk_gate"], moe.num_experts)
    assert_golden("gates", dense(gate.chosen, gate.gate, moe.num_experts), expected, OUTPUTS)
    out, losses = moe(x, with_losses=True)
    assert_golden("out", out, tensors["out_train"], OUTPUTS)
    assert_golden("out in evaluation", moe.eval()(x), tensors["out_eval"], OUTPUTS)
    aux = alpha * losses["load_balance"]
    assert_golden("aux", aux, tensors["aux_loss"].squeeze(), OUTPUTS)
    aux.backward(retain_graph=True)
    assert_layer_gradients("dit_moe", moe, x, tensors, "grad_aux.")
    (out * tensors["grad_out"]).sum().backward()
    assert_layer_gradients("dit_moe", moe, x, tensors, "grad.")


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_balance_of_dit_moe_is_scaled_with_the_loss_or_not(scale: float) -> None:
    """Its code adds the balance's gradient with factor one, whatever scales the loss: ``inject``."""
    moe, tensors, about = layer("dit_moe", "layer")
    of_aux, whole = (tensors[f"{kind}.gate.weight"] for kind in ("grad_aux", "grad"))
    weight = about["aux_loss_alpha"]
    for alpha, inject, factor in (
        (weight, True, 1.0), (weight, False, scale), (0.0, True, 0.0), (0.0, False, 0.0)
    ):  # fmt: skip
        moe.zero_grad()
        mixture = Mixture(moe, {"load_balance": alpha}, inject=inject)
        x = tensors["x"]
        out, loss = mixture(x, x, x, x)
        assert bool(loss) == (alpha > 0 and not inject)
        (scale * ((out * tensors["grad_out"]).sum() + loss)).backward()
        found = moe.router.weight.grad - scale * (whole - of_aux)
        assert_golden("balance", scale * whole + found, scale * whole + factor * of_aux, GRADIENTS)
        if scale == 1:
            assert (found - factor * of_aux).norm() < 0.2 * of_aux.norm()  # 1e-5 of the whole, in float32


def test_gradients_of_dit_moe_in_evaluation_are_those_of_training() -> None:
    """Its code computes the routed experts without gradients there."""
    moe, tensors, _ = layer("dit_moe", "layer")
    x = tensors["x"].requires_grad_()
    (moe.eval()(x) * tensors["grad_out"]).sum().backward()
    assert_golden("x", x.grad, tensors["grad.x"] - tensors["grad_aux.x"], GRADIENTS)


@pytest.mark.parametrize("part", ["gelu", "swiglu"])
def test_layers_of_ec_dit(part: str) -> None:
    moe, tensors, about = layer("ec_dit", part)
    x = tensors["x"].requires_grad_()
    assert moe.tokens_per_expert(x.shape[1]) == about["tokens_per_expert"]
    gate, _ = moe.route(x)
    assert_golden("affinity", gate.probs, tensors["affinity"], OUTPUTS)
    assert torch.equal(gate.chosen.long(), tensors["index"].sort(-1).values)
    found = dense(gate.chosen, gate.gate, x.shape[1])
    assert_golden("gates", found, dense(tensors["index"], tensors["gate"], x.shape[1]), OUTPUTS)
    assert torch.equal((found > 0).sum(1), tensors["experts_per_token"])
    out = moe(x)
    assert_golden("out", out, tensors["out"], OUTPUTS)
    assert not out[(tensors["experts_per_token"] == 0) & (about["shared_hidden_size"] == 0)].any()
    (out * tensors["grad_out"]).sum().backward()
    assert_layer_gradients("ec_dit", moe, x, tensors, "grad.")


def test_tokens_per_expert_are_rounded_as_ec_dit_does() -> None:
    for tokens in (16, 64, 100, 256, 1024):
        for experts in (3, 7, 8, 16):
            for capacity in (1.0, 1.25, 1.7, 2.0):
                count = TokenMoE(4, experts, capacity=capacity).tokens_per_expert(tokens)
                assert count == int((tokens / experts) * capacity)
    # Where that is none, an expert would never learn: it takes one.
    assert TokenMoE(4, 8, capacity=1.0).tokens_per_expert(4) == 1


def test_a_pool_of_samples_is_one_long_sample() -> None:
    moe, tensors, _ = layer("ec_dit", "gelu")
    x = torch.cat([tensors["x"], tensors["x"].flip(1)])
    moe.pool = 2
    pooled = moe(x)
    moe.pool = 1
    assert_golden("out", pooled, moe(x.view(len(x) // 2, -1, x.shape[2])).view_as(x), OUTPUTS)


def test_the_layer_of_diffmoe() -> None:
    moe, tensors, about = layer("diffmoe", "layer")
    x, predictor = tensors["x"].requires_grad_(), moe.predictor
    rows = x.shape[0] * x.shape[1]
    gate, _ = moe.route(x)
    assert moe.tokens_per_expert(rows) == about["tokens_per_expert_train"]
    assert_golden("scores", gate.probs.flatten(0, 1), tensors["scores"], OUTPUTS)
    assert torch.equal(gate.chosen[0].long(), tensors["index"].sort(-1).values)
    found = dense(gate.chosen[0], gate.gate[0], rows)
    assert_golden("gates", found, dense(tensors["index"], tensors["gate"], rows), OUTPUTS)
    assert torch.equal((found > 0).t().float().view_as(tensors["train.selected"]), tensors["train.selected"])
    logits = predictor(x)
    assert_golden("capacity", logits, tensors["train.capacity_logits"], OUTPUTS)
    counts = predictor.tokens_per_expert(logits.flatten(0, 1))
    assert torch.equal(counts, tensors["eval.tokens_per_expert"])
    assert_golden("out in evaluation", moe.eval()(x), tensors["eval.out"], OUTPUTS)
    out, losses = moe.train()(x, with_losses=True)
    assert_golden("out", out, tensors["train.out"], OUTPUTS)
    assert_golden("capacity loss", losses["capacity"], tensors["train.capacity_loss"].squeeze(), OUTPUTS)
    assert_golden("thresholds", predictor.threshold, tensors["train.expert_threshold_after"], OUTPUTS)
    ((out * tensors["grad_out"]).sum() + about["capacity_loss_weight"] * losses["capacity"]).backward()
    assert_layer_gradients("diffmoe", moe, x, tensors, "grad.")


def whole(system: str, process: str) -> tuple[SwitchDiT, State, State, dict[str, Any]]:
    """A model, its numbers, its official weights and its metadata."""
    tensors, state, metadata = case(system, "model.state_dict.")
    about = metadata["model"]
    more = {"top_k": about["top_k"]} if system == "dit_moe" else {"capacity": float(about["capacity"])}
    model = from_official(system, state, num_heads=about["num_heads"], process=process, **more)
    settings = model.settings
    for name in (
        "input_size",
        "patch_size",
        "in_channels",
        "hidden_size",
        "depth",
        "num_classes",
        "num_experts",
    ):
        assert settings[name] == about[name], name
    assert settings["mixture"]["every"] == (2 if about.get("interleave") else 1)
    return model, under("model.", tensors), state, about


SYSTEMS = ("dit_moe", "ec_dit", "diffmoe")


@pytest.mark.parametrize("system", SYSTEMS)
def test_models_in_evaluation_and_their_names(system: str) -> None:
    model, tensors, state, about = whole(system, "eps")
    assert model.learn_sigma == about["learn_sigma"]
    inputs = tensors["x"], tensors["t"], tensors["y"]
    with torch.no_grad():
        assert_golden("out", model(*inputs), tensors["out_eval"], OUTPUTS)
        assert_same(to_official(model), state)
        # As a model of rectified flow, whose time goes from data to noise, without channels it does not use.
        turned, *_ = whole(system, "flow")
        sign, objective = FLOWS[system].sign, FlowObjective(turned.num_timesteps)
        if system != "dit_moe":  # whose t here are integers
            time = objective.model_time(tensors["t"] if sign == 1 else 1 - tensors["t"])
            expected = tensors["out_eval"][:, : about["in_channels"]]
            assert_golden("velocity", sign * turned(tensors["x"], time, tensors["y"]), expected, OUTPUTS)
        back = to_official(turned)
        assert back.keys() == state.keys()
        again = from_official(system, back, num_heads=about["num_heads"], **told(turned))
        assert again.settings == turned.settings
        assert_same(again.state_dict(), turned.state_dict())
        fewer = to_official(turned, unused_channels=False)
        assert len(fewer["final_layer.linear.bias"]) * 2 == len(state["final_layer.linear.bias"])
        assert_same(
            from_official(system, fewer, num_heads=about["num_heads"]).state_dict(), again.state_dict()
        )


def told(model: SwitchDiT) -> dict[str, Any]:
    """What the official weights of a model do not tell."""
    if model.routing == "dit_moe":
        return {"top_k": model.settings["top_k"]}
    return {"capacity": model.settings["mixture"]["capacity"]}


def test_guidance_of_dit_moe() -> None:
    model, tensors, _, about = whole("dit_moe", "eps")
    half = tensors["cfg.x"].chunk(2)[0]
    with torch.no_grad():
        out = model(torch.cat([half, half]), tensors["cfg.t"], tensors["cfg.y"])
    here, there = out[:, :3].chunk(2)  # the original guides 3 channels
    guided = there + about["cfg_scale"] * (here - there)
    found = torch.cat([torch.cat([guided, guided]), out[:, 3:]], 1)
    assert_golden("guided", found, tensors["cfg.out"], OUTPUTS)


def recorded(model: SwitchDiT) -> Iterator[dict[str, Any]]:
    """What the routers and the losses of each block are, filled by a forward."""
    for block in model.blocks:
        found: dict[str, Any] = {}
        moe, route = block.mlp.moe, block.mlp.moe.route

        def recording(*arguments: Any, route=route, found=found) -> Any:
            found["gate"], logits = route(*arguments)
            return found["gate"], logits

        moe.route = recording
        block.mlp.register_forward_hook(lambda _m, _i, out, found=found: found.update(loss=out[1]))
        yield found


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("recompute", [False, True])
def test_rectified_flow(system: str, recompute: bool) -> None:
    """Losses, all gradients and thresholds of a training step without label dropout."""
    model, tensors, _, about = whole(system, "flow")
    if recompute:
        model.enable_gradient_checkpointing()
    if system == "dit_moe":
        blocks = list(recorded(model))
    tensors = under("rf.", tensors)
    flow, sign = FlowObjective(model.num_timesteps), FLOWS[system].sign
    t = tensors["t"] if sign == 1 else 1 - tensors["t"]
    x_t = flow.q_sample(tensors["x_start"], t, tensors["noise"])
    drop = torch.zeros(len(t), dtype=torch.bool)
    out, balance = model.train()(x_t, flow.model_time(t), tensors["y"], with_prior=True, drop=drop)
    mse = flow.losses(out, tensors["x_start"], x_t, t, tensors["noise"])["mse"]
    (mse.mean() + balance).backward()
    if "mse" in tensors:
        assert_golden("mse", mse, tensors["mse"], OUTPUTS)
    loss = mse.mean() + (balance if system == "diffmoe" else 0)
    assert_golden("loss", loss, tensors["loss"].squeeze(), OUTPUTS)
    if system == "dit_moe":
        aux = torch.stack([found["loss"] for found in blocks])
        assert_golden("aux", aux, tensors["aux_loss_per_block"], OUTPUTS)
        assert_golden("sum of aux", balance, aux.sum(), OUTPUTS)
        for found, index, gate in zip(blocks, tensors["topk_index"], tensors["topk_gate"], strict=True):
            mine = dense(found["gate"].chosen, found["gate"].gate, about["num_experts"])
            assert_golden("gates", mine, dense(index, gate, about["num_experts"]), OUTPUTS)
    elif system == "diffmoe":
        assert_golden("capacity loss", balance, tensors["capacity_loss"].squeeze(), OUTPUTS)
        after = {name: value for name, value in to_official(model).items() if "threshold" in name}
        assert after.keys() == under("after.", tensors).keys()
        for name, expected in under("after.", tensors).items():
            assert_golden(name, after[name], expected, OUTPUTS)
    else:
        assert not balance
    assert_model_gradients(model, under("grad.", tensors))


def assert_model_gradients(model: SwitchDiT, expected: State) -> None:
    """All gradients by their official names: they are turned as the weights are."""
    gradients = copy.deepcopy(model)
    for parameter, of_model in zip(gradients.parameters(), model.parameters(), strict=True):
        parameter.data = torch.zeros_like(parameter) if of_model.grad is None else of_model.grad
    found = to_official(gradients)
    fixed = {name for name in found if name.split(".")[-1] in ("pos_embed", "ema_decay", "expert_threshold")}
    assert expected.keys() == found.keys() - fixed
    for name, value in expected.items():
        assert_golden(name, found[name], value, GRADIENTS)


def test_sampling_of_dit_moe() -> None:
    model, tensors, _, about = whole("dit_moe", "flow")
    steps, scale, z, y = (
        about["rf_sample_steps"],
        about["cfg_scale"],
        tensors["rf_sample.z"],
        tensors["rf_sample.y"],
    )
    flow, null = FlowObjective(model.num_timesteps), torch.full_like(y, about["null_label"])
    with torch.no_grad():
        for i in range(steps, 0, -1):
            time = flow.model_time(torch.full((len(z),), i / steps))
            velocity = model.forward_with_cfg(torch.cat([z, z]), time.repeat(2), torch.cat([y, null]), scale)[
                : len(z)
            ]
            z = z - velocity / steps
    assert_golden("sample", z, tensors["rf_sample.out"], OUTPUTS)


def test_the_choices_of_dit_moe() -> None:
    model, tensors, _, _ = whole("dit_moe", "eps")
    blocks = list(recorded(model))
    with torch.no_grad():
        model(tensors["x"], tensors["t"], tensors["y"])
    for found, index in zip(blocks, tensors["eval_topk_index"], strict=True):
        assert torch.equal(found["gate"].chosen.long().sort(-1).values, index.sort(-1).values)


def test_the_router_of_ec_dits_paper_sees_the_stream() -> None:
    """What stands before the second norm, after the attention; its code's router sees what experts see."""
    model, tensors, _, _ = whole("ec_dit", "eps")
    block = model.blocks[1]
    seen: dict[str, Tensor] = {}
    block.norm2.register_forward_pre_hook(lambda _m, inputs: seen.update(stream=inputs[0]))
    block.mlp.moe.router.register_forward_pre_hook(lambda _m, inputs: seen.update(router=inputs[0]))
    inputs = tensors["x"], tensors["t"], tensors["y"]
    with torch.no_grad():
        model(*inputs)
        assert not torch.equal(seen["router"], seen["stream"])
        block.mlp.router_input = "stream"
        model(*inputs)
        assert torch.equal(seen["router"], seen["stream"])
    for options in ({"router_input": "stream"}, {"pool": 0}):
        other = SwitchDiT(**{**model.settings, "mixture": model.options | options})
        assert other(*inputs).shape == tensors["out_eval"].shape
        name, value = next(iter(options.items()))
        with pytest.raises(ValueError, match=f"model has {name} {value!r}; ec_dit's code has"):
            to_official(other)


WRONG: list[tuple[str, Any, str]] = [
    ("dit_moe", lambda s: s.pop("blocks.1.moe.gate.weight"), r"lacks 'blocks\.1\.moe\.gate\.weight'"),
    ("dit_moe", lambda s: s.pop("blocks.0.moe.experts.1.up_proj.weight"), "lacks 'blocks.0.moe.experts.1"),
    ("dit_moe", lambda s: s.update({"blocks.1.moe.extra": torch.ones(1)}), r"unknown blocks\.1\.moe\.extra"),
    ("dit_moe", lambda s: s.update({"extra": torch.ones(1)}), "unknown extra"),
    ("dit_moe", lambda s: s.pop("x_embedder.proj.weight"), r"lacks 'x_embedder\.proj\.weight'"),
    ("dit_moe", lambda s: s.update({"blocks.0.moe.experts.1.down_proj.weight": torch.ones(16, 3)}),
     r"blocks\.0\.moe\.experts of several shapes"),
    ("ec_dit", lambda s: s.pop("blocks.1.mlp.experts.2.fc1.bias"), "lacks 'blocks.1.mlp.experts.2"),
    ("ec_dit", lambda s: s.pop("blocks.0.mlp.fc2.bias"), r"lacks blocks\.0\.mlp\.fc2\.bias"),
    ("ec_dit", lambda s: s.update(_moved(s)), r"mixtures in the blocks \[0\]; they must be at equal steps"),
    ("diffmoe", lambda s: s.pop("blocks.1.mlp.ema_decay"), r"lacks 'blocks\.1\.mlp\.ema_decay'"),
    ("diffmoe", lambda s: s.pop("blocks.1.mlp.capacity_predictor.2.bias"), "lacks 'blocks.1.mlp.capacity"),
]  # fmt: skip


def _moved(state: State) -> State:
    """The blocks in the other order."""
    swap = {"0": "1", "1": "0"}
    parts = ((name.split(".", 2), state.pop(name)) for name in list(state) if name.startswith("blocks."))
    return {f"blocks.{swap[number]}.{rest}": value for (_, number, rest), value in parts}


@pytest.mark.parametrize(("system", "change", "message"), WRONG)
def test_weights_that_do_not_fit_are_named(system: str, change, message: str) -> None:
    _, state, metadata = case(system, "model.state_dict.")
    change(state)
    with pytest.raises(ValueError, match=message):
        from_official(system, state, num_heads=metadata["model"]["num_heads"])


def test_what_does_not_fit() -> None:
    model, _, state, about = whole("dit_moe", "flow")
    heads = {"num_heads": about["num_heads"]}
    for system in ("dit", "ec_dit"):
        with pytest.raises(ValueError, match=r"system is .* and state_dict holds 'blocks.0.moe.*'dit_moe'"):
            from_official(system, state, **heads)
    with pytest.raises(ValueError, match=r"capacity is 2\.0; only ec_dit and diffmoe have one"):
        from_official("dit_moe", state, **heads, capacity=2.0)
    with pytest.raises(ValueError, match="process is 'v'; it must be one of flow, eps"):
        from_official("dit_moe", state, **heads, process="v")
    with pytest.raises(ValueError, match="the routing of model is 'switch'"):
        to_official(SwitchDiT(8, hidden_size=8, depth=1, num_heads=1))
    with pytest.raises(TypeError, match="model is a Linear; it must be a SwitchDiT"):
        to_official(nn.Linear(1, 1))
    for options, message in (
        ({"normalise": True}, "model has normalise True; dit_moe's code has False"),
        (
            {"activation": "gelu", "bias": True},
            "model has activation 'gelu'; dit_moe's code has 'swiglu'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            to_official(SwitchDiT(**{**model.settings, "mixture": model.options | options}))
    with pytest.raises(ValueError, match="model embeds timesteps with time"):
        to_official(SwitchDiT(**{**model.settings, "time_offset": 0.5}))
