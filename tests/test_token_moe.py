"""TokenMoE: against a loop over tokens, its losses of balance, its errors, compiled and in half types."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers import assert_close
from torch import Tensor
from torch.nn import functional as F

from switch_moe import TokenMoE
from switch_moe.balance import add_gradient_of, load_balance_loss, z_loss


def layer(seed: int = 0, **settings) -> TokenMoE:
    torch.manual_seed(seed)
    small = {"hidden_size": 12, "num_experts": 5, "top_k": 2, "expert_hidden_size": 16}
    moe = TokenMoE(**{**small, **settings})
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def expert(moe: TokenMoE, e: int, x: Tensor) -> Tensor:
    """One expert on one token, by torch alone; SwiGLU without biases."""
    a, b = (x @ moe.weight_in[e]).chunk(2, -1)
    return (F.silu(a) * b) @ moe.weight_out[e]


def test_tokens_choose() -> None:
    moe = layer(normalise=True, scale=1.5, shared_hidden_size=8).double()
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    out = moe(x)
    for token, found in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
        a, b = (token @ moe.shared_in).chunk(2, -1)
        expected = (F.silu(a) * b) @ moe.shared_out
        probs = torch.softmax(moe.router.weight @ token, 0)
        best = probs.topk(2)
        for e, gate in zip(best.indices.tolist(), best.values, strict=True):
            expected = expected + 1.5 * gate / best.values.sum() * expert(moe, e, token)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("pool", [1, 2, 0])
def test_experts_choose(pool: int) -> None:
    moe = layer(capacity=1.6, pool=pool, time_size=6).double()
    x, time = torch.randn(4, 5, 12, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    out = moe(x, time_embedding=time)
    probs = torch.softmax(x @ moe.router.weight.t() + (time @ moe.router.time_weight.t())[:, None], -1)
    size = pool or 4
    taken = int(size * 5 / 5 * 1.6)
    assert moe.tokens_per_expert(size * 5) == taken
    expected = torch.zeros_like(x)
    for start in range(0, 4, size):
        tokens, scores = x[start : start + size].flatten(0, 1), probs[start : start + size].flatten(0, 1)
        sums = torch.zeros_like(tokens)
        for e in range(5):
            for t in scores[:, e].topk(taken).indices.tolist():
                sums[t] += scores[t, e] * expert(moe, e, tokens[t])
        expected[start : start + size] = sums.view(size, 5, 12)
    torch.testing.assert_close(out, expected)


def test_the_router_may_see_other_tokens() -> None:
    moe = layer()
    x, seen = torch.randn(2, 6, 12), torch.randn(2, 6, 12)
    routes = moe.routes(moe.route(seen)[0], x)
    assert torch.equal(moe(x, router_input=seen), moe.mix(x, routes))
    assert not torch.equal(moe(x, router_input=seen), moe(x))


def test_losses_of_balance() -> None:
    moe = layer()
    x = torch.randn(2, 6, 12)
    _, losses = moe(x, with_losses=True)
    logits = F.linear(x, moe.router.weight)
    probs = logits.softmax(-1)
    chosen = F.one_hot(probs.topk(2).indices, 5).sum(-2).float()
    expected = 5 * (chosen.mean((0, 1)) / 2 * probs.mean((0, 1))).sum()
    torch.testing.assert_close(losses["load_balance"], expected)
    torch.testing.assert_close(losses["z"], logits.logsumexp(-1).square().mean())
    even = torch.full((4,), 8.0)
    assert float(load_balance_loss(even, even / 4, 8)) == pytest.approx(1.0)
    assert float(z_loss(torch.zeros(3, 4))) == pytest.approx(torch.tensor(4.0).log().item() ** 2)


def test_the_injected_gradient_is_not_scaled() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    out = torch.ones(3, requires_grad=True)
    (1024 * add_gradient_of(weight.square(), out).sum()).backward()
    assert weight.grad == 4.0
    assert torch.equal(out.grad, torch.full((3,), 1024.0))


@pytest.mark.parametrize("settings", [{}, {"capacity": 2.0}, {"shared_hidden_size": 8, "bias": True}])
def test_backends_and_compiled_programs_agree(settings: dict) -> None:
    moe = layer(**settings)
    x = torch.randn(2, 9, 12)
    grad = torch.randn(2, 9, 12)

    def results(module, moe: TokenMoE) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out, losses = module(leaf, with_losses=True)
        ((out * grad).sum() + sum(losses.values())).backward()
        return [out, leaf.grad, *(p.grad for p in moe.parameters())]

    reference = copy.deepcopy(moe)
    reference.backend = "reference"
    expected = results(reference, reference)
    torch.compiler.reset()
    other = copy.deepcopy(moe)
    compiled = results(torch.compile(other, fullgraph=True, backend="aot_eager"), other)
    for found in (results(moe, moe), compiled):
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_close(str(number), a, b, 1e-5)


def test_autocast_leaves_the_router_in_float32() -> None:
    moe = layer()
    x = torch.randn(2, 9, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, gate = moe(x), moe.route(x)[0]
    assert out.dtype == torch.bfloat16
    exact = moe.route(x)[0]
    assert gate.probs.dtype == torch.float32
    assert torch.equal(gate.probs, exact.probs)
    assert_close("out", out, moe(x), 0.02)


def test_no_tokens_and_one() -> None:
    for settings in ({}, {"shared_hidden_size": 8}):
        assert layer(**settings)(torch.randn(0, 5, 12)).shape == (0, 5, 12)
        assert layer(**settings)(torch.randn(1, 1, 12)).shape == (1, 1, 12)
    assert layer(capacity=1.0)(torch.randn(1, 1, 12)).shape == (1, 1, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 6}, "top_k is 6; it must be between 1 and the number of experts, 5"),
        ({"capacity": 0.0}, "capacity is 0.0; it must be a positive finite number"),
        ({"capacity_rounding": "nearest"}, "capacity_rounding is 'nearest'; it must be one of down, up"),
        ({"score": "cosine"}, "score is 'cosine'; it must be one of softmax, sigmoid, identity"),
        ({"activation": "silu"}, "activation is 'silu'"),
        ({"backend": "cudnn"}, "backend is 'cudnn'"),
        ({"shared_hidden_size": -1}, "shared_hidden_size is -1; it must be at least 0"),
        ({"pool": -1}, "pool is -1; it must be at least 0"),
    ],
)
def test_settings_that_do_not_fit(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(**settings)


def test_arguments_that_do_not_fit() -> None:
    x = torch.randn(2, 5, 12)
    with pytest.raises(ValueError, match=re.escape("x has shape (2, 5, 11); it must be [B, T, 12]")):
        layer()(x[..., :11])
    with pytest.raises(ValueError, match=r"router_input has shape \(1, 5, 12\)"):
        layer()(x, router_input=x[:1])
    with pytest.raises(ValueError, match="time_embedding is None; it must be"):
        layer(time_size=4)(x)
    with pytest.raises(ValueError, match="time_embedding is given; it must be None"):
        layer()(x, time_embedding=x[:, 0])
    with pytest.raises(ValueError, match=r"time_embedding has shape \(2, 7\); it must be \[2, 4\]"):
        layer(time_size=4)(x, time_embedding=torch.randn(2, 7))
    with pytest.raises(ValueError, match="pool is 3; it must divide the number of samples, 2"):
        layer(capacity=1.0, pool=3)(x)
    with pytest.raises(ValueError, match="capacity is None"):
        layer().tokens_per_expert(5)


def test_one_expert_that_chooses_its_tokens() -> None:
    """The default of top_k, which experts that choose do not use, must not refuse it."""
    assert TokenMoE(12, 1, capacity=1.0)(torch.randn(2, 5, 12)).shape == (2, 5, 12)
