"""DiffMoE: against a loop over experts, how its thresholds learn, compiled, in half types, its errors."""

from __future__ import annotations

import copy
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import assert_close, random_model
from switch_dit.data import load_data
from switch_dit.settings import TrainConfig
from switch_dit.trainer import Trainer
from test_no_host_wait import HostWaits
from torch import Tensor
from torch.nn import functional as F

from switch_moe import CapacityPredictor, DiffMoE


def layer(seed: int = 0, **settings) -> DiffMoE:
    torch.manual_seed(seed)
    moe = DiffMoE(**{"hidden_size": 12, "num_experts": 5, "expert_hidden_size": 16, **settings})
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def mixed(moe: DiffMoE, x: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Output, capacity loss and the weakest sigmoid of each expert's largest, for so many tokens each."""
    tokens, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
    if moe.shared_in is not None:
        hidden = F.gelu(tokens @ moe.shared_in + moe.shared_bias_in, approximate="tanh")
        out = out + hidden @ moe.shared_out + moe.shared_bias_out
    probs = torch.softmax(tokens @ moe.router.weight.t(), -1)
    logits = moe.predictor.last(F.silu(moe.predictor.first(tokens.detach())))
    selected = torch.zeros_like(logits)
    weakest = torch.zeros(len(counts), dtype=x.dtype)
    for e, count in enumerate(counts):
        best = probs[:, e].topk(count).indices
        selected[best, e] = 1
        hidden = F.gelu(tokens[best] @ moe.weight_in[e] + moe.bias_in[e], approximate="tanh")
        mlp = hidden @ moe.weight_out[e] + moe.bias_out[e]
        out = out.index_add(0, best, probs[best, e, None] * mlp)
        weakest[e] = logits[:, e].sigmoid().sort(descending=True).values[count - 1] if count else 0
    loss = -(selected * logits.sigmoid().log() + (1 - selected) * (-logits).sigmoid().log()).mean()
    return out.view_as(x), loss, weakest


@pytest.mark.parametrize("settings", [{}, {"capacity": 1.7, "shared_hidden_size": 7, "decay": 0.8}])
def test_training_is_a_loop_over_experts(settings: dict) -> None:
    moe = layer(**settings).double()
    x = torch.randn(3, 7, 12, dtype=torch.float64, requires_grad=True)
    count = int(21 / 5 * settings.get("capacity", 1.0))
    results = []
    out, losses = moe(x, with_losses=True)
    expected, loss, weakest = mixed(moe, x, 5 * [count])
    torch.testing.assert_close(moe.predictor.threshold, (1 - settings.get("decay", 0.95)) * weakest)
    for one, of_capacity in ((out, losses["capacity"]), (expected, loss)):
        parameters = dict(moe.named_parameters())
        total = (one * torch.linspace(-1, 1, one.numel()).view_as(one)).sum() + of_capacity
        results.append([one, of_capacity, *torch.autograd.grad(total, [x, *parameters.values()])])
    for name, found, wanted in zip(("out", "loss", "x", *parameters), *results, strict=True):
        assert_close(name, found, wanted, 1e-12)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 2.0])
def test_the_predictor_says_how_many_tokens_an_expert_takes(threshold: float) -> None:
    """With thresholds of zero, as before any training, all; above one, none."""
    moe = layer().double().eval()
    moe.predictor.threshold.fill_(threshold)
    moe.predictor.threshold[1] = 0.5
    x = torch.randn(3, 7, 12, dtype=torch.float64, requires_grad=True)
    counts = moe.predictor.tokens_per_expert(moe.predictor(x).flatten(0, 1)).tolist()
    others = {0.0: 21, 2.0: 0}.get(threshold)
    assert others is None or all(count == others for e, count in enumerate(counts) if e != 1)
    out, losses = moe(x, with_losses=True)
    expected, loss, _ = mixed(moe, x, counts)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(losses["capacity"], loss)
    for found, wanted in zip(*(torch.autograd.grad(o.sum(), x)[0] for o in (out, expected)), strict=True):
        torch.testing.assert_close(found, wanted)
    assert float(moe.predictor.threshold[1]) == 0.5, "it learns in training only"


def test_thresholds_learn_once() -> None:
    moe, x = layer(), torch.randn(2, 9, 12)
    out, _, observed = moe(x, with_losses=True, observe=True)
    assert not moe.predictor.threshold.any()
    moe.predictor.learn(observed)
    once = moe.predictor.threshold.clone()
    assert once.all()
    again = layer()
    assert torch.equal(again(x), out)
    assert torch.equal(again.predictor.threshold, once)
    moe.predictor.learn(torch.ones(5, device="meta"))  # of a forward that only counts operations
    assert torch.equal(moe.predictor.threshold, once)
    moe.reset_parameters()
    assert not moe.predictor.threshold.any()


def settings(folder: Path, **given) -> TrainConfig:
    config = TrainConfig(
        routing="diffmoe", num_experts=4, batch_size=16, steps=2, output=folder, device="cpu",
        precision="float32", **given,
    )  # fmt: skip
    config.validate()
    return config


def test_a_training_step_moves_thresholds_once_whether_activations_are_kept_or_not(tmp_path: Path) -> None:
    """Once for each part of an accumulated batch; the moving average has them too."""
    found = {}
    for name, given, times in (
        ("kept", {}, 1), ("again", {"checkpoint_activations": True}, 1), ("parts", {"accumulate": 2}, 2),
    ):  # fmt: skip
        trainer = Trainer(settings(tmp_path, **given), load_data("digits"))
        calls = []
        predictors = [m for m in trainer.model.modules() if isinstance(m, CapacityPredictor)]
        for predictor in predictors:
            learn = predictor.learn
            predictor.learn = lambda value, learn=learn, calls=calls: (calls.append(value), learn(value))
        trainer.step(0, *next(islice(trainer.batches(0), 1)))
        assert len(calls) == times * len(predictors) > 0
        found[name] = torch.stack([predictor.threshold for predictor in predictors])
        copies = torch.stack([m.threshold for m in trainer.ema.modules() if isinstance(m, CapacityPredictor)])
        assert torch.equal(found[name], copies)
        assert found[name].all()
    assert torch.equal(found["kept"], found["again"])
    assert not torch.equal(found["kept"], found["parts"])


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_backends_and_compiled_programs_agree(training: bool) -> None:
    x, grad = torch.randn(2, 2, 9, 12)

    def results(module, moe: DiffMoE) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out, losses = module(leaf, with_losses=True)
        ((out * grad).sum() + sum(losses.values())).backward()
        grads = [p.grad for p in moe.parameters() if p.grad is not None]
        return [out, leaf.grad, *grads, moe.predictor.threshold]

    moe = layer(shared_hidden_size=6).train(training)
    moe.predictor.threshold.fill_(0.5)
    reference, other = copy.deepcopy(moe), copy.deepcopy(moe)
    reference.backend = "reference"
    expected = results(reference, reference)
    torch.compiler.reset()
    compiled = results(torch.compile(other, fullgraph=True, backend="aot_eager"), other)
    for found in (results(moe, moe), compiled):
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_close(str(number), a, b, 1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_waits_for_a_device(training: bool) -> None:
    moe = layer().to("meta").train(training)
    x = torch.randn(2, 9, 12, device="meta", requires_grad=True)
    with HostWaits("meta") as waits:
        out, losses = moe(x, with_losses=True)
        (out.sum() + losses["capacity"]).backward()
    assert waits.found == []
    assert "binary_cross_entropy_with_logits" in waits.seen


@pytest.mark.parametrize("training", [True, False])
def test_autocast_leaves_router_and_predictor_in_float32(training: bool) -> None:
    moe = layer().train(training)
    moe.predictor.threshold.fill_(0.5)
    other, x = copy.deepcopy(moe), torch.randn(2, 9, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, losses = moe(x, with_losses=True)
    expected, same = other(x, with_losses=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(losses["capacity"], same["capacity"])
    assert torch.equal(moe.predictor.threshold, other.predictor.threshold)
    assert_close("out", out, expected, 0.02)


def test_few_tokens_strides_and_poisoned_memory(poisoned_memory: None) -> None:
    for shape in ((1, 1), (1, 3), (3, 1), (2, 17)):
        moe, x = layer(), torch.randn(*shape[::-1], 12).transpose(0, 1)
        for training in (True, False):
            moe.train(training)
            out = moe(x)
            assert out.isfinite().all()
            assert torch.equal(out, moe(x.contiguous()))
            moe.predictor.threshold.fill_(0.5)
    assert layer().eval()(torch.randn(0, 5, 12)).shape == (0, 5, 12)


def test_a_model_on_its_way(tmp_path: Path) -> None:
    """Thresholds are saved with the weights; without training every expert takes every token."""
    model = random_model(routing="diffmoe", num_experts=4)
    names = [name for name in model.state_dict() if "threshold" in name]
    assert names == ["blocks.1.mlp.moe.predictor.threshold"]
    x, t, y = torch.randn(4, 3, 8, 8), torch.tensor([1, 300, 600, 900]), torch.tensor([0, 1, 2, 3])
    moe = model.blocks[1].mlp.moe
    assert (moe.predictor(torch.randn(9, 24)).sigmoid() > moe.predictor.threshold).all()
    model(x, t, y)
    assert moe.predictor.threshold.all()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.blocks[1].mlp.moe.predictor.threshold, moe.predictor.threshold)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer(capacity=0.0), "capacity is 0.0; it must be a positive finite number"),
        (lambda: layer(decay=1.5), "decay is 1.5; it must be"),
        (lambda: layer(num_experts=0), "num_experts is 0"),
        (lambda: layer()(torch.randn(2, 5, 11)), "x has shape (2, 5, 11)"),
        (lambda: layer()(torch.randn(2, 5, 12), router_input=torch.randn(2, 4, 12)), "router_input has"),
        (lambda: layer()(torch.randn(2, 5, 12), time_embedding=torch.randn(2, 4)), "time_embedding is given"),
        (lambda: layer().eval()(torch.randn(2, 5, 12), time_embedding=torch.randn(2, 4)), "time_embedding"),
        (lambda: layer().predictor.learn(torch.ones(4)), "observed has shape (4,)"),
        (lambda: layer()(torch.randn(2, 5, 12), observe=1), "observe is 1"),
    ],
)  # fmt: skip
def test_bad_input(call, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        call()
