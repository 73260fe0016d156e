"""Parity with numbers of the related systems, see golden/README.md, and upcycling of their dense models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import upcycle as upcycle_script
from diffusers import DiTTransformer2DModel
from helpers import State, assert_golden, case
from safetensors.torch import save_file
from sample_switch_dit import SampleConfig, load_pipeline
from switch_dit import SwitchDiT, from_official, upcycle
from switch_dit.checkpoint import load_checkpoint, load_settings
from switch_dit.objectives import FlowObjective
from torch import Tensor
from upcycle import UpcycleConfig


def heads(metadata: dict[str, Any]) -> dict[str, int]:
    found = {"num_heads": metadata.get("num_heads", metadata.get("num_attention_heads"))}
    return found | ({"input_size": metadata["sample_size"]} if "sample_size" in metadata else {})


def upcycled(system: str, state: State, settings: dict[str, Any]) -> SwitchDiT:
    return upcycle(from_official(system, state, **settings), num_experts=4, top_k=3)


MAKERS: list[Callable[..., SwitchDiT]] = [
    lambda system, state, settings: from_official(system, state, **settings),
    upcycled,
]


@pytest.fixture(params=MAKERS, ids=["dense", "upcycled"])
def make(request: pytest.FixtureRequest) -> Callable[..., SwitchDiT]:
    return request.param


def assert_gradients(model: SwitchDiT, tensors: State, x: Tensor, sign: dict[str, float]) -> None:
    own = dict(model.named_parameters())
    checked = 0
    for name, expected in tensors.items():
        if name.startswith("grad.") and name != "grad.x":
            key = name.removeprefix("grad.")
            assert_golden(name, own[key].grad * sign.get(key, 1.0), expected, 1e-5)
            checked += 1
    assert checked >= 12
    assert_golden("grad.x", x.grad, tensors["grad.x"], 1e-5)


def test_dit(make) -> None:
    tensors, state, metadata = case("dit")
    model = make("dit", state, heads(metadata))
    assert (model.num_classes, model.learn_sigma) == (metadata["num_classes"], metadata["learn_sigma"])
    x = tensors["x"].requires_grad_()
    out = model(x, tensors["t"], tensors["y"])
    assert_golden("out", out, tensors["out"], 1e-6)
    (out * tensors["grad_out"]).sum().backward()
    assert_gradients(model, tensors, x, {})
    with torch.no_grad():
        out = model(tensors["cfg.x"], tensors["cfg.t"], tensors["cfg.y"])
        here, there = out[:, :3].chunk(2)  # the original guides 3 channels
        guided = there + metadata["cfg_scale"] * (here - there)
        assert_golden(
            "cfg", torch.cat([torch.cat([guided, guided]), out[:, 3:]], 1), tensors["cfg.out"], 1e-6
        )


def test_sit(make) -> None:
    """Time is turned round, so the velocity is too: SiT's goes from noise to data."""
    tensors, state, metadata = case("sit")
    model = make("sit", state, heads(metadata))
    flow = FlowObjective(model.num_timesteps)
    assert not model.learn_sigma
    x = tensors["x"].requires_grad_()
    out = model(x, flow.model_time(1 - tensors["t"]), tensors["y"])
    assert_golden("out", -out, tensors["out"], 1e-6)
    (out * -tensors["grad_out"]).sum().backward()
    assert_gradients(model, tensors, x, {})
    path = {key.removeprefix("transport.Linear."): v for key, v in tensors.items()}
    t, x_start = 1 - path["t"], tensors["x"].detach()
    assert_golden("x_t", flow.q_sample(x_start, t, path["noise"]), path["x_t"], 1e-6)
    with torch.no_grad():
        out = model(path["x_t"], flow.model_time(t), tensors["y"])
    losses = flow.losses(out, x_start, path["x_t"], t, path["noise"])
    assert_golden("loss", losses["mse"], path["loss"], 1e-5)


def test_diffusers_dit(make) -> None:
    tensors, state, metadata = case("diffusers_dit")
    inputs = tensors["x"], tensors["t"], tensors["y"]
    with torch.no_grad():
        assert_golden("out", make("diffusers_dit", state, heads(metadata))(*inputs), tensors["out"], 1e-5)
        as_trained = make("diffusers_dit", state, heads(metadata) | {"frequencies": "dit"})
        assert_golden("of DiT's code", as_trained(*inputs), tensors["out_of_dit_code"], 1e-6)
        _, same, _ = case("diffusers_dit", "dit_state_dict.")
        same["pos_embed"] = tensors["pos_embed"]
        of_dit = make("dit", same, {"num_heads": metadata["num_attention_heads"]})
        assert torch.equal(of_dit(*inputs), as_trained(*inputs))


def test_an_upcycled_model_computes_the_same_to_the_bit_whatever_its_router_says() -> None:
    tensors, state, metadata = case("dit")
    dense = from_official("dit", state, **heads(metadata))
    inputs = tensors["x"], tensors["t"], tensors["y"]
    with torch.no_grad():
        expected = dense(*inputs)
        for experts, k in ((3, 2), (8, 1), (2, 2)):
            model = upcycle(state, "dit", num_experts=experts, top_k=k, **heads(metadata))
            assert (model.routing, model.router.weight.shape[1]) == ("switch", experts)
            assert not any(block.moe.weight.any() or block.moe.bias.any() for block in model.blocks)
            assert torch.equal(model(*inputs), expected)
        model.router.weight.normal_(std=3.0)
        assert torch.equal(model(*inputs), expected)
        half = upcycle(dense.bfloat16())
        assert half.blocks[0].moe.weight.dtype == torch.bfloat16
        assert torch.equal(half(*inputs), dense(*inputs))
    model(*inputs).square().sum().backward()
    assert all(block.moe.weight.grad.any() for block in model.blocks), "the experts learn"


def test_modules_of_diffusers_and_checkpoints_of_training() -> None:
    tensors, state, metadata = case("diffusers_dit")
    names = ("num_attention_heads", "attention_head_dim", "num_layers", "sample_size", "out_channels")
    module = DiTTransformer2DModel(
        **{name: metadata[name] for name in names}, num_embeds_ada_norm=metadata["num_embeds_ada_norm"]
    )
    module.load_state_dict(state)
    with torch.no_grad():
        out = upcycle(module.eval())(tensors["x"], tensors["t"], tensors["y"])
    assert_golden("out", out, tensors["out"], 1e-5)
    tensors, state, metadata = case("dit")
    wrapped = {"ema": {f"module.{name}": value for name, value in state.items()}, "args": None, "opt": {}}
    model = from_official("dit", wrapped, **heads(metadata))
    assert torch.equal(model.pos_embed, state["pos_embed"])


OF_DIT = [
    (lambda s: s.pop("blocks.1.mlp.fc2.bias"), r"lacks blocks\.1\.mlp\.fc2\.bias"),
    (lambda s: s.pop("x_embedder.proj.weight"), r"lacks 'x_embedder\.proj\.weight'"),
    (lambda s: s.update({"blocks.0.extra": torch.zeros(1)}), r"unknown blocks\.0\.extra"),
    (lambda s: s.update({"blocks.0.moe.weight": torch.zeros(1)}), "SwitchDiT already"),
    (lambda s: s.update({"routers.0.experts.w": torch.zeros(1)}), "convert_official_state_dict"),
    (lambda s: s.update({"transformer_blocks.0.x": torch.zeros(1)}), "'diffusers_dit'"),
    (lambda s: s.update({"pos_embed": torch.zeros(1, 15, 32)}), "15 tokens; they must form a square"),
    (lambda s: s.update({"final_layer.linear.weight": torch.zeros(9, 32)}), "9 rows; it must have 16"),
    (lambda s: s.update({"blocks.0.mlp.fc1.weight": torch.zeros(9)}), "of 1 dimensions; it must have 2"),
    (lambda s: s.update({"x_embedder.proj.bias": torch.zeros(32).long()}), "must be a floating type"),
    (lambda s: s.update({"x_embedder.proj.bias": torch.full((32,), torch.nan)}), "not finite"),
    (lambda s: s.update({"blocks.1.attn.proj.weight": torch.zeros(32, 8)}), r"is \(32, 8\) and not"),
]  # fmt: skip
OF_DIFFUSERS = [
    (lambda s: s.pop("transformer_blocks.1.attn1.to_k.bias"), r"lacks .transformer_blocks\.1\.attn1"),
    (lambda s: s.pop("proj_out_1.bias"), r"lacks 'proj_out_1\.bias'"),
    (lambda s: s.update({"caption_projection.weight": torch.zeros(1)}), "'caption_projection.weight'"),
    (lambda s: s["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"].add_(1), "differs"),
    (lambda s: s.update({"transformer_blocks.0.attn1.to_q.bias": torch.zeros(3)}), "several shapes"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("system", "change", "message"),
    [*(("dit", *wrong) for wrong in OF_DIT), *(("diffusers_dit", *wrong) for wrong in OF_DIFFUSERS)],
)
def test_weights_that_do_not_fit_are_named(system: str, change, message: str) -> None:
    _, state, metadata = case(system)
    change(state)
    with pytest.raises(ValueError, match=message):
        from_official(system, state, **heads(metadata))


def test_settings_that_do_not_fit() -> None:
    _, state, _ = case("dit")
    with pytest.raises(ValueError, match="num_heads is None; hidden size 32 and 2 blocks are no published"):
        from_official("dit", state)
    with pytest.raises(ValueError, match="input_size is 16; the positions are for 8"):
        from_official("dit", state, num_heads=4, input_size=16)
    with pytest.raises(ValueError, match="system is 'DiT'"):
        from_official("DiT", state, num_heads=4)
    with pytest.raises(ValueError, match="system is not given; it must be 'dit' or 'sit'"):
        upcycle(state, num_heads=4)
    _, of_diffusers, more = case("diffusers_dit")
    with pytest.raises(ValueError, match="input_size is None"):
        from_official("diffusers_dit", of_diffusers, num_heads=more["num_attention_heads"])
    mixture = upcycle(state, "dit", num_heads=4)
    with pytest.raises(ValueError, match="source has routing 'switch'; it must be dense"):
        upcycle(mixture)
    with pytest.raises(ValueError, match="top_k is 4"):
        upcycle(state, "dit", num_heads=4, num_experts=3, top_k=4)
    with pytest.raises(ValueError, match="num_heads is given; a SwitchDiT has its own"):
        upcycle(from_official("dit", state, num_heads=4), num_heads=4)
    with pytest.raises(TypeError, match="source is a list"):
        upcycle([1])


def test_the_program_writes_a_run_that_samples(tmp_path: Path) -> None:
    tensors, state, _ = case("sit")
    save_file(state, tmp_path / "sit.safetensors")
    config = UpcycleConfig(tmp_path / "sit.safetensors", tmp_path / "run", system="sit", num_heads=4)
    weights = upcycle_script.run(config)
    model, objective = load_checkpoint(weights)
    assert (model.routing, objective.name) == ("switch", "flow")
    with torch.no_grad():
        out = model(tensors["x"], objective.model_time(1 - tensors["t"]), tensors["y"])
    assert_golden("out", -out, tensors["out"], 1e-6)
    pipeline = load_pipeline(SampleConfig(run=tmp_path / "run"))
    assert pipeline([0, 5], num_inference_steps=2, output_type="latent").images.shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"output is .*run; it exists"):
        upcycle_script.run(config)


def test_the_program_takes_a_folder_of_diffusers(tmp_path: Path) -> None:
    tensors, state, metadata = case("diffusers_dit")
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    keys = ("num_attention_heads", "sample_size")
    settings = {key: metadata[key] for key in keys} | {"_class_name": "DiTTransformer2DModel"}
    (folder / "config.json").write_text(json.dumps(settings))
    weights = upcycle_script.run(UpcycleConfig(tmp_path / "pipeline", tmp_path / "run", dense=True))
    model, objective = load_checkpoint(weights)
    assert (model.routing, objective.name, objective.learn_sigma) == ("none", "eps", True)
    with torch.no_grad():
        assert_golden("out", model(tensors["x"], tensors["t"], tensors["y"]), tensors["out"], 1e-5)
    scheduler = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    of_diffusers = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
    scheduler.write_text(json.dumps(of_diffusers))
    weights = upcycle_script.run(UpcycleConfig(tmp_path / "pipeline", tmp_path / "cosine"))
    assert load_settings(weights)["objective"]["schedule"] == "cosine"
    for change, message in (
        ({"prediction_type": "v_prediction"}, "prediction_type 'v_prediction'; only 'epsilon'"),
        ({"num_train_timesteps": 500}, "num_train_timesteps 500; only 1000"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule 'scaled_linear'; only 'linear'"),
        ({"beta_schedule": "linear", "beta_end": 0.012}, "beta_end 0.012; only 0.02"),
    ):
        scheduler.write_text(json.dumps(of_diffusers | change))
        with pytest.raises(ValueError, match=message):
            upcycle_script.run(UpcycleConfig(tmp_path / "pipeline", tmp_path / "other"))
    (folder / "config.json").write_text(json.dumps(settings | {"activation_fn": "geglu"}))
    with pytest.raises(ValueError, match="activation_fn 'geglu'; only 'gelu-approximate'"):
        upcycle_script.run(UpcycleConfig(tmp_path / "pipeline", tmp_path / "other"))
    for content, message in (("[1]", "holds a list; it must hold settings"), ("{", "is broken")):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            upcycle_script.run(UpcycleConfig(tmp_path / "pipeline", tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_of_dits_training_and_a_module_of_its_code(tmp_path: Path) -> None:
    _, state, metadata = case("dit")
    whole = {"model": {}, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-S/2")}
    torch.save(whole, tmp_path / "0400000.pt")
    config = UpcycleConfig(tmp_path / "0400000.pt", tmp_path / "run", system="dit", num_heads=4)
    model, _ = load_checkpoint(upcycle_script.run(config))
    assert torch.equal(model.pos_embed, state["pos_embed"])
    module = torch.nn.Module()
    module.num_heads, module.y_embedder = 4, torch.nn.Module()
    module.y_embedder.dropout_prob = 0.0
    module.state_dict = lambda: state
    assert upcycle(module, "dit").num_classes == metadata["num_classes"] + 1  # no label stands for none
    mixture = UpcycleConfig(tmp_path / "run", tmp_path / "again", dense=True)
    with pytest.raises(ValueError, match="its routing is 'switch' and must be 'none'"):
        upcycle_script.run(mixture)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, state, _ = case("dit")
    save_file(state, tmp_path / "dit.safetensors")
    config = UpcycleConfig(tmp_path / "dit.safetensors", tmp_path / "run", system="dit", num_heads=4)

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(upcycle_script, "save_weights", full)
        with pytest.raises(OSError, match="no space"):
            upcycle_script.run(config)
    upcycle_script.run(config)


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    for name, content in (
        ("broken.pt", b"not weights"), ("broken.safetensors", b"not weights"), ("empty.pt", b""),
        ("text.pth", b"hello world"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="no file of weights, or is cut off"):
            upcycle_script.run(UpcycleConfig(tmp_path / name, tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        upcycle_script.run(UpcycleConfig(tmp_path / "none.pt", tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json"):
        upcycle_script.run(UpcycleConfig(tmp_path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
