"""warm_up: a model that follows launches no kernel that has not been launched before."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from switch_dit import SwitchDiT
from torch import Tensor, nn

from switch_moe import (
    DenseToSparseMoE,
    DiffMoE,
    FallingCapacityMoE,
    NoiseMoE,
    Router,
    SwitchMoE,
    TokenMoE,
    warm_up,
)

pytest.importorskip("triton")
for stem in ("diffusion_prior", "dispatch", "expert_linear", "merge_experts", "routed_mlp", "timestep_gate"):
    importlib.import_module(f"switch_moe.kernels.{stem}")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[tuple]:
    """What tells the binaries of all launches apart: kernel, types of tensors, constants."""
    found: set[tuple] = set()
    launch = importlib.import_module("switch_moe.kernels._launch").launch

    def note(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        types = tuple(str(a.dtype) if isinstance(a, Tensor) else "number" for a in arguments)
        found.add((kernel.fn.__name__, types, tuple(sorted(constants.items()))))
        launch(kernel, programs, *arguments, **constants)

    for name, module in list(sys.modules.items()):
        if name.startswith("switch_moe.kernels.") and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", note)
    return found


def make_model(hidden_size: int = 32) -> SwitchDiT:
    return SwitchDiT(
        8, 4, 1, hidden_size, 2, 2, num_classes=3, num_experts=3, num_timesteps=10, backend="triton"
    )


def step(model: SwitchDiT, batch: int) -> None:
    """A training step with the prior, and a sampling step of one timestep."""
    x, t, y = torch.randn(batch, 1, 8, 8), torch.zeros(batch, dtype=torch.int64), torch.zeros(batch).long()
    model.diffusion_prior_loss = lambda routing, t, match, ties: model.prior.loss(
        routing.probs.transpose(0, 1).flatten(1), t, model.assignment
    )  # without the matching, which has no Triton kernel
    out, prior_loss = model.forward_with_prior(x, t, y)
    (out.sum() + prior_loss).backward()
    with torch.no_grad():
        model(x, t[:1], y)


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_new_is_launched_after_it(autocast: bool, launched: set) -> None:
    model = make_model()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        warm_up(model, [(5, 4)])
        warmed = launched.copy()
        launched.clear()
        step(model, 5)
    assert len(launched) >= 8
    assert {name for name, _, _ in launched - warmed} == set()


@pytest.mark.parametrize("choice", [{"top_k": 2, "shared_hidden_size": 4}, {"capacity": 1.5, "time_size": 3}])
def test_nothing_new_is_launched_by_a_token_layer(choice: dict, launched: set) -> None:
    layer = TokenMoE(8, 3, expert_hidden_size=4, bias=True, backend="triton", **choice)
    warm_up(layer, [(2, 4)])
    warmed = launched.copy()
    launched.clear()
    x = torch.randn(2, 4, 8, requires_grad=True)
    layer(x, time_embedding=torch.randn(2, 3) if "time_size" in choice else None).sum().backward()
    assert {"_hidden_kernel", "_combine_kernel", "_weight_grad_kernel"} <= {name for name, _, _ in launched}
    assert launched <= warmed


def test_another_kind_of_step_is_noticed(launched: set) -> None:
    """The test above can fail."""
    model = make_model()
    warm_up(model, [(5, 4)], backward=False)
    warmed = launched.copy()
    step(model, 5)
    assert {"_grad_x_kernel", "_sum_kernel"} <= {name for name, _, _ in launched - warmed}


@pytest.mark.parametrize("expert", ["linear", "mlp", "swiglu"])
def test_it_leaves_no_trace(expert: str) -> None:
    layer = nn.Sequential(SwitchMoE(16, expert=expert), SwitchMoE(16, expert=expert), Router(2, 16))
    before, state = {n: p.clone() for n, p in layer.named_parameters()}, torch.get_rng_state()
    warm_up(layer, [(3, 5), [1, 2]], dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("settings", [{}, {"capacity": 2.0, "pool": 0}, {"time_size": 6}], ids=str)
def test_token_layers(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are alike run once, others for themselves, and nothing stays."""
    layers = [TokenMoE(8, 3, **settings), TokenMoE(8, 3, **settings), TokenMoE(8, 3, score="sigmoid")]
    model = nn.Sequential(*layers)
    calls = []
    forward = TokenMoE.forward
    monkeypatch.setattr(
        TokenMoE, "forward", lambda self, *a, **k: calls.append(self) or forward(self, *a, **k)
    )
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    warm_up(model, [(2, 5), (1, 3)])
    assert calls == [layers[0]] * 2 + [layers[2]] * 2
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [DiffMoE, NoiseMoE, DenseToSparseMoE, FallingCapacityMoE])
def test_layers_that_learn_or_draw(kind: type[TokenMoE], training: bool) -> None:
    """Thresholds and random numbers stay, too."""
    layer = kind(8, 3).train(training)
    before, state = {n: p.clone() for n, p in layer.state_dict().items()}, torch.get_rng_state()
    warm_up(layer, [(2, 5), (1, 3)])
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (((3, 5), [(3, 5)]), TypeError, "module is a tuple; it must be a torch.nn.Module"),
        ((nn.Linear(1, 1), [(3,)]), ValueError, r"shapes holds \(3,\); each must be \(B, T\)"),
        ((nn.Linear(1, 1), [(0, 5)]), ValueError, "B is 0; it must be at least 1"),
        ((nn.Linear(1, 1), [(3, 2.5)]), TypeError, "T is 2.5"),
    ],
)
def test_bad_input(arguments: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        warm_up(*arguments)
    with pytest.raises(TypeError, match=r"dtype is torch\.int32; it must be torch\.float32"):
        warm_up(nn.Linear(1, 1), [], dtype=torch.int32)
