"""MM-DiT with experts: parity with diffusers and with golden numbers, the prior, checkpointing, training."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from helpers import assert_golden, golden
from switch_dit import MultiViewJointBlock, SwitchDiT, SwitchJointBlock, SwitchSD3
from switch_dit.objectives import FlowObjective
from torch import Tensor

State = dict[str, Tensor]
SETTINGS = set(inspect.signature(SD3Transformer2DModel).parameters)
SMALL = {
    "sample_size": 8, "patch_size": 2, "in_channels": 3, "out_channels": 5, "num_layers": 3,
    "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12,
    "caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 8,
}  # fmt: skip


def part(tensors: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def golden_sd3() -> tuple[SD3Transformer2DModel, tuple[Tensor, ...], State, dict[str, Any]]:
    """The transformer with the golden weights, its inputs, all tensors and the sizes."""
    tensors, metadata = golden("sd3")
    transformer = SD3Transformer2DModel(**{name: metadata[name] for name in SETTINGS & set(metadata)})
    transformer.load_state_dict(part(tensors, "state_dict."))
    inputs = ("x", "encoder_hidden_states", "pooled_projections", "timestep")
    return transformer, tuple(tensors[name] for name in inputs), tensors, metadata


def small(seed: int = 0, batch: int = 3, **settings: Any) -> tuple[SD3Transformer2DModel, State]:
    """A small transformer with random weights and inputs for it."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(**SMALL | settings)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer, {
        "hidden_states": torch.randn(batch, 3, 6, 8),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "pooled_projections": torch.randn(batch, 10),
        "timestep": torch.rand(batch) * 1000,
    }


def trained(transformer: SD3Transformer2DModel, **settings: Any) -> SwitchSD3:
    """With experts that do something, and routers that choose others at other timesteps."""
    model = SwitchSD3(transformer, **settings)
    for parameter in model.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(model.router.weight)
    return model


def test_sd3_and_its_blocks() -> None:
    transformer, inputs, tensors, metadata = golden_sd3()
    model = SwitchSD3(transformer, metadata["num_experts"], metadata["top_k"])
    seen: list[tuple] = []
    for block in transformer.transformer_blocks:
        block.register_forward_hook(lambda _, *inputs_outputs: seen.append(inputs_outputs))
    with torch.no_grad():
        out = model(*inputs, return_dict=False)[0]
        assert torch.equal(out, transformer(*inputs).sample)
    assert_golden("out", out, tensors["out"], 1e-6)
    for number, (given, (context, hidden)) in enumerate(seen[: metadata["num_layers"]]):
        names = ("hidden_states_in", "encoder_hidden_states_in", "temb")
        found = dict(zip(names, given[:3], strict=True)) | {"hidden_states_out": hidden}
        found |= {} if context is None else {"encoder_hidden_states_out": context}
        expected = part(tensors, f"block{number}.")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_golden(f"block{number}.{name}", found[name], value, 1e-6)


def test_sd3_with_experts() -> None:
    transformer, inputs, tensors, metadata = golden_sd3()
    model = SwitchSD3(transformer, metadata["num_experts"], metadata["top_k"])
    expected, own = part(tensors, "switch."), dict(model.named_parameters())
    assert_golden("time embedding", model.time_embedding(inputs[-1]), expected["time_embedding"], 1e-5)
    with torch.no_grad():
        for number, layer in enumerate(model.experts):
            layer.weight.copy_(expected[f"weight.{number}"])
            layer.bias.copy_(expected[f"bias.{number}"])
            model.router.weight[number] = expected[f"gate_weight.{number}"]
            model.router.bias[number] = expected[f"gate_bias.{number}"]
    out = model(*inputs).sample
    assert_golden("out", out, expected["out"], 1e-6)
    (out * expected["grad_out"]).sum().backward()
    for number in range(metadata["num_layers"]):
        for name, grad in {
            "weight": own[f"experts.{number}.weight"].grad, "bias": own[f"experts.{number}.bias"].grad,
            "gate_weight": model.router.weight.grad[number], "gate_bias": model.router.bias.grad[number],
        }.items():  # fmt: skip
            assert_golden(f"{name}.{number}", grad, expected[f"grad.{name}.{number}"], 1e-5)


def multi_view_block() -> tuple[MultiViewJointBlock, list[Tensor], State, dict[str, Any]]:
    tensors, metadata = golden("splatflow_block")
    names = ("dim", "num_attention_heads", "attention_head_dim", "num_views", "context_pre_only")
    block = MultiViewJointBlock(**{name: metadata[name] for name in names})
    block.load_state_dict(part(tensors, "state_dict."))
    inputs = [tensors[name].requires_grad_() for name in ("hidden_states", "encoder_hidden_states", "temb")]
    return block, inputs, tensors, metadata


def total(context: Tensor, out: Tensor, tensors: State) -> Tensor:
    return (out * tensors["grad_out"]).sum() + (context * tensors["grad_context_out"]).sum()


def test_a_block_of_several_views() -> None:
    block, inputs, tensors, _ = multi_view_block()
    context, out = block(*inputs)
    assert_golden("out", out, tensors["out"], 1e-6)
    assert_golden("context_out", context, tensors["context_out"], 1e-6)
    total(context, out, tensors).backward()
    found = {name: parameter.grad for name, parameter in block.named_parameters()}
    names = ("hidden_states", "encoder_hidden_states", "temb")
    found |= {name: tensor.grad for name, tensor in zip(names, inputs, strict=True)}
    expected = part(tensors, "grad.")
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert_golden(name, found[name], grad, 1e-5)


def test_a_block_of_several_views_with_experts() -> None:
    block, inputs, tensors, metadata = multi_view_block()
    model = SwitchJointBlock(block, metadata["dim"], metadata["num_experts"], metadata["top_k"])
    expected = part(tensors, "switch.")
    embedding = expected["time_embedding"].requires_grad_()
    with torch.no_grad():
        fresh, alone = model(*inputs, time_embedding=embedding), block(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(fresh, alone, strict=True))
    own = {
        "weight": model.moe.weight, "bias": model.moe.bias, "gate_weight": model.moe.router.weight,
        "gate_bias": model.moe.router.bias,
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(expected[name].view_as(parameter))
    context, out = model(*inputs, time_embedding=embedding)
    assert_golden("out", out, expected["out"], 1e-6)
    assert_golden("context_out", context, expected["context_out"], 1e-6)
    total(context, out, tensors).backward()
    found = {name: parameter.grad for name, parameter in own.items()}
    found |= {"hidden_states": inputs[0].grad, "time_embedding": embedding.grad}
    gradients = part(expected, "grad.")
    assert found.keys() == gradients.keys()
    for name, grad in gradients.items():
        assert_golden(name, found[name].view_as(grad), grad, 1e-5)
    routing = model.moe.route(embedding)
    again = model(*inputs, routing=routing)
    assert all(torch.equal(a, b) for a, b in zip(again, (context, out), strict=True))


def test_views_of_other_samples_are_not_seen() -> None:
    torch.manual_seed(0)
    block = MultiViewJointBlock(16, 2, 8, num_views=2, qk_norm="rms_norm")
    inputs = torch.randn(6, 4, 16), torch.randn(6, 3, 16), torch.randn(6, 16)
    changed = [tensor.clone() for tensor in inputs]
    for tensor in changed[:2]:
        tensor[2] += 1
    before, after = block(*inputs), block(*changed)
    for a, b in zip(before, after, strict=True):
        assert [torch.equal(a[row], b[row]) for row in range(6)] == [True, True, False, False, True, True]
    with pytest.raises(ValueError, match="has 3 rows; their number must be a multiple of num_views, 2"):
        block(*(tensor[:3] for tensor in inputs))
    with pytest.raises(ValueError, match="num_views is 0"):
        MultiViewJointBlock(16, 2, 8, num_views=0)


CONFIGS: list[dict[str, Any]] = [
    {}, {"qk_norm": "rms_norm"}, {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}, {"num_layers": 1},
    {"patch_size": 1},
]  # fmt: skip


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_zero_experts_change_no_bit(settings: dict[str, Any]) -> None:
    transformer, inputs = small(**settings)
    model = SwitchSD3(transformer, 4, 2)
    calls: list[dict[str, Any]] = [{}, {"skip_layers": [1]}]
    if len(transformer.transformer_blocks) > 1:
        tokens = 48 // transformer.config.patch_size**2
        calls.append({"block_controlnet_hidden_states": [torch.randn(3, tokens, 16) for _ in range(2)]})
    for extra in calls:
        expected = transformer(**inputs, **extra)
        assert torch.equal(model(**inputs, **extra).sample, expected.sample)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(**inputs).sample, transformer(**inputs).sample)
    half = SwitchSD3(transformer.bfloat16())
    assert half.experts[0].weight.dtype == half.dtype == torch.bfloat16
    inputs |= {name: value.bfloat16() for name, value in inputs.items() if name != "timestep"}
    assert torch.equal(half(**inputs).sample, transformer(**inputs).sample)


def test_gradients_of_the_transformer_are_the_same_with_zero_experts() -> None:
    transformer, inputs = small()
    model = SwitchSD3(transformer)
    cotangent = torch.randn(3, 5, 6, 8)
    grads = []
    for one in (transformer, model):
        transformer.zero_grad()
        (one(**inputs).sample * cotangent).sum().backward()
        grads.append([parameter.grad.clone() for parameter in transformer.parameters()])
    names = [name for name, _ in transformer.named_parameters()]
    for name, expected, found in zip(names, *grads, strict=True):
        if "add_q_proj" not in name:  # those of a last block are zero: nothing reads its text
            assert_golden(name, found, expected, 1e-5)
    assert all(layer.weight.grad.any() for layer in model.experts), "the experts learn"


def test_gradient_checkpointing_and_one_timestep_for_all() -> None:
    transformer, inputs = small()
    model = trained(transformer, top_k=1)
    results = []
    for enable in (False, True):
        if enable:
            transformer.enable_gradient_checkpointing()
        model.zero_grad()
        out, loss = model(**inputs, with_prior=True, ties=torch.arange(18.0).view(2, 9))
        (out.square().sum() + loss).backward()
        results.append([out, loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    inputs["timestep"] = torch.full((3,), 321.5)
    one = model(**inputs | {"timestep": torch.tensor([321.5])}).sample
    assert_golden("one timestep", one, model(**inputs).sample, 1e-5)


def test_the_prior_loss_is_that_of_switch_dit() -> None:
    """A SwitchDiT with the same embedder and router, whose timestep 1000 is that before it, has the same."""
    transformer, inputs = small(batch=4)
    model = trained(transformer)
    other = SwitchDiT(8, 2, 3, 16, 3, 2, num_classes=0)
    other.router.load_state_dict(model.router.state_dict())
    for name, number in (("linear_1", 0), ("linear_2", 2)):
        source = getattr(transformer.time_text_embed.timestep_embedder, name)
        other.t_embedder.mlp[number].load_state_dict(source.state_dict())
    ties = torch.rand(2, 9)
    for t in (torch.tensor([0.0, 3.7, 998.2, 999.9]), torch.tensor([0, 3, 998, 999])):
        out, loss = model(**inputs | {"timestep": t}, with_prior=True, ties=ties)
        expected = other.diffusion_prior_loss(other.route(other.t_embedder(t)), t, True, ties)
        assert_golden("prior loss", loss, expected, 1e-5)
        assert torch.equal(model.assignment, other.assignment)
        assert torch.equal(out, model(**inputs | {"timestep": t}).sample)
    last = [model(**inputs | {"timestep": t}, with_prior=True, match=False)[1].item()
            for t in (torch.full((4,), 1000.0), torch.full((4,), 999.999))]  # fmt: skip
    assert last[0] == pytest.approx(last[1], rel=1e-3)


def test_state_dict_and_files_of_diffusers(tmp_path) -> None:
    transformer, inputs = small()
    model = trained(transformer)
    expected = model(**inputs).sample
    state = model.state_dict()
    names = {f"transformer.{name}" for name in transformer.state_dict()}
    experts = {f"experts.{i}.{name}" for i in range(3) for name in ("weight", "bias")}
    assert set(state) == names | experts | {"router.weight", "router.bias"}
    with torch.device("meta"):
        empty = SwitchSD3(SD3Transformer2DModel(**SMALL))
    empty.load_state_dict(copy.deepcopy(state), assign=True)
    assert torch.equal(empty(**inputs).sample, expected)
    assert torch.equal(empty.prior.table, model.prior.table)
    assert empty(**inputs, with_prior=True, match=False)[1].isfinite()
    transformer.save_pretrained(tmp_path)
    again = SwitchSD3(SD3Transformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False))
    again.experts.load_state_dict(model.experts.state_dict())
    again.router.load_state_dict(model.router.state_dict())
    assert torch.equal(again(**inputs).sample, expected)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"timestep": None}, TypeError, "timestep is None"),
    ({"pooled_projections": torch.randn(3, 9)}, ValueError, r"pooled_projections .* must be \[3, 10\]"),
    ({"encoder_hidden_states": torch.randn(2, 5, 12)}, ValueError, r"must be \[3, S, 12\]"),
    ({"hidden_states": torch.randn(3, 4, 8, 8)}, ValueError, r"must be \[B, 3, H, W\]"),
    ({"timestep": torch.rand(2)}, ValueError, r"timestep has shape \(2,\); it must be \[3\]"),
    ({"timestep": torch.full((3,), 1001.0)}, ValueError, "timestep holds 1001.0"),
    ({"timestep": torch.ones(3, dtype=torch.bool)}, TypeError, "timestep is torch.bool"),
    ({"joint_attention_kwargs": {"scale": 0.5}}, ValueError, "joint_attention_kwargs has 'scale'"),
    ({"with_prior": 1}, TypeError, "with_prior is 1"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[wrong[2] for wrong in WRONG])
def test_inputs_that_do_not_fit(change: dict[str, Any], error: type[Exception], message: str) -> None:
    transformer, inputs = small()
    with pytest.raises(error, match=message):
        SwitchSD3(transformer)(**inputs | change)


def test_settings_that_do_not_fit() -> None:
    transformer, _ = small()
    with pytest.raises(TypeError, match="transformer is a Linear; it must be diffusers' SD3"):
        SwitchSD3(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="top_k is 4"):
        SwitchSD3(transformer, 3, 4)
    with pytest.raises(TypeError, match="block is a int"):
        SwitchJointBlock(3, 16)
    block = SwitchJointBlock(transformer.transformer_blocks[0], 16, router=False)
    with pytest.raises(ValueError, match="neither given"):
        block(torch.randn(1, 4, 16), torch.randn(1, 3, 16), torch.randn(1, 16))


def test_it_trains() -> None:
    """Rectified flow on a few latents with texts that say which: the loss falls, and the experts move."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "out_channels": 3, "attention_head_dim": 32, "caption_projection_dim": 64}
    transformer, (_, inputs) = SD3Transformer2DModel(**SMALL | sizes), small(batch=8)
    model, flow = SwitchSD3(transformer), FlowObjective()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    latents, text = inputs.pop("hidden_states"), inputs
    losses, priors = [], []
    for step in range(60):
        random = torch.Generator().manual_seed(step)
        t, noise = torch.rand(8, generator=random), torch.randn(latents.shape, generator=random)
        x_t = flow.q_sample(latents, t, noise)
        text["timestep"] = flow.model_time(t)
        out, prior = model(x_t, **text, with_prior=True, match=step % 10 == 0)
        loss = flow.losses(out, latents, x_t, t, noise)["mse"].mean()
        optimizer.zero_grad()
        (loss + prior).backward()
        optimizer.step()
        losses.append(loss.item())
        priors.append(prior.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert sum(priors[-10:]) < 0.9 * sum(priors[:10])
    assert all(layer.weight.abs().max() > 1e-3 for layer in model.experts)
