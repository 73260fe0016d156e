"""The model with merged experts, as sampling evaluates it, equals the routed one."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, random_model
from switch_dit import merged as merged_model
from switch_dit.merged import MergedSwitchDiT

from switch_moe import SwitchMoE

ROUTINGS = ("switch", "dtr", "none", "mode")


@pytest.fixture(params=ROUTINGS)
def model(request):
    return random_model(routing=request.param).eval()


def inputs(model, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    shape = (count, model.in_channels, model.input_size, model.input_size)
    return torch.randn(shape), torch.arange(count) % (model.num_classes + 1)


@pytest.mark.parametrize("times", [torch.tensor([999, 500, 3, 0]), torch.tensor([999.5, 410.25, 0.0])])
@pytest.mark.parametrize("memory", [0, 10**9])
def test_each_step_is_the_routed_model(model, times: torch.Tensor, memory: int) -> None:
    x, y = inputs(model)
    merged = MergedSwitchDiT(model, times, memory)
    with torch.no_grad():
        for _ in range(2):  # merged, and kept
            for step, t in enumerate(times):
                assert_close("step", merged(x, step, y), model(x, t[None], y), 1e-5)
                assert_close("of a tensor", merged(x, torch.tensor([step]), y), model(x, t[None], y), 1e-5)


def test_memory_is_bounded() -> None:
    model = random_model()
    x, y = inputs(model)
    one = len(model.blocks) * (model.blocks[0].moe.weight[0].nbytes + model.blocks[0].moe.bias[0].nbytes)
    merged = MergedSwitchDiT(model, torch.arange(10), memory=3 * one + 1)
    for step in range(10):
        merged(x, step, y)
    assert sorted(merged._kept) == [0, 1, 2]
    assert merged.left == 1


def test_steps_are_merged_together_as_far_as_memory_allows(monkeypatch) -> None:
    """A small model merges many steps in one call; of a large one, as here of 3, few at a time."""
    model = random_model()
    x, y = inputs(model)
    one = len(model.blocks) * (model.blocks[0].moe.weight[0].nbytes + model.blocks[0].moe.bias[0].nbytes)
    rows = []
    original = SwitchMoE.merge_each

    def counting(self, routing):
        rows.append(len(routing.expert_index))
        return original(self, routing)

    monkeypatch.setattr(SwitchMoE, "merge_each", counting)
    for ahead, memory, expected in (
        (3 * one, 10**9, [3, 3, 3, 1]),
        (one - 1, 10**9, [1] * 10),  # larger than what is merged ahead, and kept
        (10**9, 10**9, [10]),
        (10**9, 4 * one, [4, 1, 1, 1, 1, 1, 1]),
    ):
        monkeypatch.setattr(merged_model, "AHEAD", ahead)
        rows.clear()
        merged = MergedSwitchDiT(model, torch.arange(10), memory)
        for step in range(10):
            merged(x, step, y)
        assert rows[:: len(model.blocks)] == expected
        before = len(rows)
        merged(x, 0, y)
        assert len(rows) == before


def test_nothing_of_the_router_runs_in_the_loop(model, monkeypatch) -> None:
    if model.routing == "none":
        return  # a model without experts is evaluated as it is
    x, y = inputs(model)
    merged = MergedSwitchDiT(model, torch.arange(4))
    routers = (module for name, module in model.named_modules() if name.split(".")[-1] == "router")
    for module in (model.t_embedder, *routers):
        monkeypatch.setattr(module, "forward", lambda *_: pytest.fail("called"))
    merged(x, 2, y)


def test_a_step_waits_for_no_device(model) -> None:
    """Tensors without values, as those of a graph under capture: whoever asks for a value fails."""
    meta = random_model(routing=model.routing).eval().to("meta")
    x, y = (tensor.to("meta") for tensor in inputs(model))
    merged = MergedSwitchDiT(meta, torch.arange(4))
    out = merged(x, torch.tensor([2], device="meta"), y)
    assert out.shape == (3, model.out_channels, model.input_size, model.input_size)


@pytest.mark.parametrize("timestep", [0, 999, 250.5])
def test_one_step_exports_without_operators_of_ours(model, timestep: float) -> None:
    x, y = inputs(model)
    step = model.export_merged(timestep)
    with torch.no_grad():
        expected = model(x, torch.tensor([timestep]), y)
        assert_close("dense", step(x, y), expected, 1e-5)
        program = torch.export.export(step, (x, y))
        assert_close("exported", program.module()(x, y), expected, 1e-5)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets
    assert not [target for target in targets if "switch_moe" in target]
    if model.routing == "switch":
        weight = step.state_dict()["model.blocks.1.moe.linear.weight"]
        assert weight.shape == model.blocks[1].moe.weight.shape[1:]
    assert step.model.pos_embed is model.pos_embed


def test_bad_arguments() -> None:
    model = random_model()
    with pytest.raises(TypeError, match="model is a Linear; it must be a SwitchDiT"):
        MergedSwitchDiT(torch.nn.Linear(2, 2), torch.arange(3))
    with pytest.raises(ValueError, match="times holds"):
        MergedSwitchDiT(model, torch.tensor([0, 1000]))
    with pytest.raises(ValueError, match=r"times has shape \(1, 3\)"):
        MergedSwitchDiT(model, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="memory is -1"):
        MergedSwitchDiT(model, torch.arange(3), memory=-1)
    for timestep in (-1, 1000, "3", True, float("nan")):
        with pytest.raises(ValueError, match="timestep is"):
            model.export_merged(timestep)
