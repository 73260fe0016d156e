"""DenseToSparseMoE against a loop over tokens in float64, and its stages; settings of FallingCapacityMoE."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from helpers import assert_close
from torch import Tensor
from torch.nn import functional as F

from switch_moe import DenseToSparseMoE, FallingCapacityMoE, set_top_k
from switch_moe.gumbel import gumbel_like, gumbel_of


def layer(size: int = 6, experts: int = 5, **settings) -> DenseToSparseMoE:
    torch.manual_seed(1)
    moe = DenseToSparseMoE(size, experts, **{"expert_hidden_size": 7, "threshold": 0.05, **settings})
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return moe


def inputs(batch: int = 3, tokens: int = 5, size: int = 6, experts: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    uniform = torch.rand(batch, tokens, experts, generator=g)
    return torch.randn(batch, tokens, size, generator=g), gumbel_of(uniform)


def slow(moe: DenseToSparseMoE, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Output and balance, token by token."""
    rows, gates_sum, chosen_sum, taken = [], 0, 0, [0] * moe.num_experts
    flat, noise = x.flatten(0, 1), noise.flatten(0, 1)
    for token, of_token in zip(flat, noise, strict=True):
        logits = moe.router.weight @ token
        gates = logits.softmax(0)
        if not moe.training:
            chosen = F.one_hot(gates.argmax(), moe.num_experts)
            full = gates
        elif moe.temperature <= 0:
            chosen = torch.ones(moe.num_experts)
            full = gates
        else:
            y = ((logits + of_token) / moe.temperature).softmax(0)
            gates = y if moe.gumbel_gates else gates
            chosen = (y > moe.threshold).long() if moe.soft else F.one_hot(y.argmax(), moe.num_experts)
            full = gates * chosen
        out = token * 0
        for i in range(moe.num_experts):
            taken[i] += int(chosen[i])
            limit = math.ceil(moe.eval_fraction * len(flat))
            if chosen[i] and (moe.training or not limit or taken[i] <= limit):
                hidden = F.gelu(token @ moe.weight_in[i] + moe.bias_in[i], approximate="tanh")
                out = out + gates[i] * (hidden @ moe.weight_out[i] + moe.bias_out[i])
        rows.append(out)
        gates_sum, chosen_sum = gates_sum + full, chosen_sum + chosen
    balance = moe.num_experts * (gates_sum * chosen_sum).sum() / len(flat) ** 2
    return torch.stack(rows).view(x.shape), balance * (0 if moe.training and moe.temperature <= 0 else 1)


STAGES = {
    "soft": {}, "soft, gates of y": {"gumbel_gates": True}, "hard": {"soft": False},
    "hard, gates of y": {"soft": False, "gumbel_gates": True}, "dense": {"highest": 0.0},
    "evaluation": {"train": False}, "evaluation, some dropped": {"train": False, "eval_fraction": 0.15},
    "all above": {"threshold": 0.0}, "none above": {"threshold": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_values_and_every_gradient_are_those_of_a_loop(stage: str) -> None:
    settings = {"highest": 1.3, **STAGES[stage]}
    soft, train = settings.pop("soft", True), settings.pop("train", True)
    moe = layer(decay="constant", **settings).train(train)
    moe.soft = soft
    exact = copy.deepcopy(moe).double()
    x, noise = inputs()
    found = []
    for module in (moe, exact):
        dtype = module.weight_in.dtype
        own = x.to(dtype, copy=True).requires_grad_()
        if module is moe:
            out, losses = module(own, noise=noise, with_losses=True)
            balance = losses["load_balance"]
        else:
            out, balance = slow(module, own, noise.double())
        g = torch.Generator().manual_seed(4)
        weight = torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype)
        ((out * weight).sum() + balance).backward()
        parameters = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
        found.append([out, balance, own.grad, *parameters])
    names = ("out", "balance", "x", *(name for name, _ in moe.named_parameters()))
    for name, actual, expected in zip(names, *found, strict=True):
        assert_close(name, actual, expected, 1e-5)


def test_shapes_do_not_depend_on_the_choice() -> None:
    """In the soft stage there is room for all experts, and -1 where one is not chosen."""
    x, noise = inputs()
    for threshold in (0.0, 0.1, 1.0):
        moe = layer(threshold=threshold)
        gate = moe.gate(moe.router(x)[0], noise)
        routes = moe.routes(gate, x)
        assert (routes.row.shape, routes.slot.shape) == ((75,), (15, 5))
        assert routes.offsets[-1] == (gate.chosen >= 0).sum()
    moe.soft = False
    assert moe.gate(moe.router(x)[0], noise).chosen.shape == (3, 5, 1)


def test_an_evaluation_with_more_experts() -> None:
    moe, (x, _) = layer().eval(), inputs()
    set_top_k(moe, 2)
    probs = moe.router(x)[0].softmax(-1)
    gate = moe.gate(moe.router(x)[0])
    assert torch.equal(gate.gate, probs.topk(2).values)
    assert gate.load.sum() == 30
    set_top_k(moe, 5)
    dense = layer(decay="constant", highest=0.0)
    assert_close("all experts", moe(x), dense(x), 1e-6)


def test_noise() -> None:
    drawn = gumbel_like(torch.empty(100_000))
    assert abs(drawn.mean() - 0.5772) < 0.02
    assert abs(drawn.var() - math.pi**2 / 6) < 0.04
    assert drawn.isfinite().all()
    moe, (x, noise) = layer(), inputs()
    assert moe.draws
    torch.manual_seed(0)
    first = moe(x)
    assert not torch.equal(moe(x), first)
    assert torch.equal(moe(x, noise=noise), moe(x, noise=noise))
    moe.eval()
    assert not moe.draws
    assert torch.equal(moe(x, noise=noise), moe(x))
    assert not layer(decay="constant", highest=0.0).draws


@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (1, 0), (1, 1)])
@pytest.mark.parametrize("train", [True, False])
def test_few_rows(batch: int, tokens: int, train: bool) -> None:
    moe = layer(eval_fraction=0.25).train(train)
    out, losses = moe(inputs(batch, tokens)[0], with_losses=True)
    assert out.shape == (batch, tokens, 6)
    (out.sum() + losses["load_balance"]).backward()


def test_any_strides_and_autocast() -> None:
    moe, (x, noise) = layer(), inputs()
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    expected = moe(x, noise=noise)
    assert_close("strides", moe(turned, noise=noise), expected, 1e-6)
    chosen = moe.gate(moe.router(x)[0], noise).chosen
    with torch.autocast("cpu", torch.bfloat16):
        out, losses = moe(x, noise=noise, with_losses=True)
        assert torch.equal(moe.gate(moe.router(x)[0], noise).chosen, chosen)
    assert (out.dtype, losses["load_balance"].dtype) == (torch.bfloat16, torch.float32)
    assert_close("autocast", out, expected, 2e-2)


def test_bad_input() -> None:
    for settings, message in (
        ({"decay": "cosine"}, "decay is 'cosine'; it must be one of constant, exponential, linear"),
        ({"lowest": 3.0}, "lowest is 3.0 and highest 2.0; they must be 0 < lowest <= highest"),
        ({"lowest": 0.0}, "lowest is 0.0 and highest 2.0"),
        ({"switch": -2}, "switch is -2; it must be at least -1"),
        ({"decay_steps": -1}, "decay_steps is -1"),
        ({"threshold": 2.0}, "threshold is 2.0; it must be between 0 and 1"),
        ({"eval_fraction": -0.5}, "eval_fraction is -0.5"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            DenseToSparseMoE(8, **settings)
    moe, (x, noise) = layer(), inputs()
    with pytest.raises(ValueError, match=r"noise has shape \(3, 5, 4\); it must be \[3, 5, 5\]"):
        moe(x, noise=noise[..., :4])
    with pytest.raises(ValueError, match=r"router_input has shape \(3, 4, 6\)"):
        moe(x, router_input=x[:, :4])
    for settings, message in (
        ({"capacity_start": 0.0}, "capacity_start is 0.0; it must be a positive finite number"),
        ({"stages": 0}, "stages is 0; it must be at least 1"),
        ({"capacity": -1.0}, "capacity is -1.0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            FallingCapacityMoE(8, **settings)
