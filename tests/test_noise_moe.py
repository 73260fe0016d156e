"""NoiseMoE against a loop over tokens in float64, its draws, and its experts as one MLP."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from helpers import assert_close, assert_error_rule
from torch import Tensor
from torch.nn import functional as F

from switch_moe import NoiseMoE, TokenMoE
from switch_moe.gumbel import gumbel_like, gumbel_of


def layer(size: int = 6, experts: int = 5, k: int = 2, **settings) -> NoiseMoE:
    torch.manual_seed(1)
    moe = NoiseMoE(size, experts, k, **{"expert_hidden_size": 7, "router_hidden_size": 9, **settings})
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return moe


def inputs(batch: int = 3, tokens: int = 5, size: int = 6, time: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(batch, tokens, size, generator=g), torch.randn(batch, time, generator=g)


def slow(moe: NoiseMoE, x: Tensor, e: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output and losses, token by token, by ``drawn`` experts ``[B, T, k]`` or by the likeliest."""
    first, second = moe.router.first, moe.router.second
    rows, balance_gate, balance_count, z = [], 0, 0, 0
    for b, (tokens, time) in enumerate(zip(x, e, strict=True)):
        logits = second.weight @ F.gelu(first.weight @ time + first.bias) + second.bias
        logits = logits - logits.max()
        probs = logits.softmax(0).clamp(min=1e-9)
        for t, token in enumerate(tokens):
            chosen = probs.topk(moe.top_k).indices if drawn is None else drawn[b, t].long()
            total, out = probs[chosen].sum(), 0
            for i in chosen:
                hidden = token @ moe.weight_in[i] + moe.bias_in[i]
                a, gated = hidden.chunk(2)
                out = out + probs[i] / total * ((F.silu(a) * gated) @ moe.weight_out[i])
            rows.append(out)
            mask = F.one_hot(chosen, moe.num_experts).sum(0)
            balance_gate, balance_count = balance_gate + mask * probs / total, balance_count + mask
        z = z + (logits.exp().sum() + 1e-6).log() ** 2 / len(x)
    out = torch.stack(rows).view(x.shape)
    balance = moe.num_experts * (balance_gate * balance_count).sum() / len(rows) ** 2
    return out, balance, z


@pytest.mark.parametrize("way", ["likeliest", "drawn", "everything to one"])
@pytest.mark.parametrize(("experts", "k"), [(5, 2), (1, 1), (3, 3), (4, 1)])
def test_values_and_every_gradient_are_those_of_a_loop(way: str, experts: int, k: int) -> None:
    moe, (x, e) = layer(6, experts, k), inputs()
    drawn = None
    if way == "drawn":
        drawn = torch.rand(3, 5, experts).argsort(-1)[..., :k]
    if way == "everything to one":
        with torch.no_grad():
            moe.router.second.bias[-1] += 40  # nobody chooses some of the others
    moe.sample = False
    exact = layer(6, experts, k, sample=False).double()
    exact.load_state_dict(moe.state_dict())
    found = []
    for module, run in ((moe, "auto"), (exact, "loop")):
        dtype = module.weight_in.dtype
        own = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, e)]
        if run == "loop":
            out, balance, z = slow(module, *own, drawn)
        else:
            out, losses = module(*own, expert_index=drawn, with_losses=True)
            balance, z = losses["load_balance"], losses["z"]
        g = torch.Generator().manual_seed(4)
        total = (out * torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype)).sum()
        (total + balance + 10 * z).backward()
        parameters = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
        found.append([out, balance, z, *(tensor.grad for tensor in own), *parameters])
    names = ("out", "balance", "z", "x", "time", *(name for name, _ in moe.named_parameters()))
    for name, actual, expected in zip(names, *found, strict=True):
        if expected.norm() < 1e-7:  # gates of a fixed sum, and of logits 40 apart
            assert actual.norm() < 1e-6, name
        else:
            assert_close(name, actual, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree(dtype: torch.dtype) -> None:
    x, e = inputs(4, 7)
    results = {}
    for backend, of in (("auto", dtype), ("reference", dtype), ("exact", torch.float64)):
        moe = layer(backend="reference" if backend == "exact" else backend).to(dtype).to(of).eval()
        results[backend] = moe(x.to(dtype).to(of), e.to(of))
    assert_error_rule("out", results["auto"], results["exact"], results["reference"], dtype)


def test_one_noise_level_is_one_mlp_and_keeps_the_gradients() -> None:
    x, e = inputs()
    grads = []
    for rows in (1, 3):
        moe = layer(sample=False)
        out = moe(x, e[:1].expand(rows, -1))
        out.square().sum().backward()
        grads.append([out, *(p.grad for p in moe.parameters())])
    for one, many in zip(*grads, strict=True):
        assert_close("gradient", one, many, 1e-5)
    moe.eval()
    merged = moe.merge_each(moe.route(e))
    assert len(merged) == 3
    assert merged[0].weight.shape == (6, 2 * 2 * 7)
    for b, experts in enumerate(merged):
        assert_close("merged", experts(x[b : b + 1]), moe(x, e)[b : b + 1], 1e-5)
    before = merged[0](x)
    with torch.no_grad():
        moe.weight_in.mul_(2)
    assert torch.equal(merged[0](x), before), "copies, which training does not change"


def test_draws_are_those_of_multinomial() -> None:
    moe, (_, e) = layer(k=3), inputs(40, 1)
    probs = moe.router(e)[0].detach()
    torch.manual_seed(5)
    index = moe.draw(probs, gumbel_like(probs[:, None])).expert_index[:, 0]
    torch.manual_seed(5)
    assert torch.equal(index.long(), torch.multinomial(probs, 3))


def test_frequencies_of_draws_without_replacement() -> None:
    moe, tokens = layer(experts=3), 20000
    probs = torch.tensor([[0.6, 0.3, 0.1]])
    noise = gumbel_of(torch.rand(1, tokens, 3, generator=torch.Generator().manual_seed(0)))
    index = moe.draw(probs, noise).expert_index[0]
    p = probs[0]
    for i, j in itertools.permutations(range(3), 2):
        expected = p[i] * p[j] / (1 - p[i])
        share = ((index[:, 0] == i) & (index[:, 1] == j)).float().mean()
        assert abs(share - expected) < 4 * (expected / tokens).sqrt()


def test_only_training_draws() -> None:
    moe, (x, e) = layer(), inputs()
    assert moe.draws
    noise = gumbel_like(torch.empty(3, 5, 5))
    assert torch.equal(moe(x, e, noise=noise), moe(x, e, noise=noise))
    index = moe.draw(moe.router(e)[0], noise).expert_index
    assert (index != index[:, :1]).any(), "tokens of a sample differ"
    assert torch.equal(moe(x, e, noise=noise), moe(x, e, expert_index=index))
    one_level = moe(x, e[:1], noise=noise)  # each token draws for itself all the same
    assert_close("one level", one_level, moe(x, e[:1].expand(3, -1), noise=noise), 1e-6)
    for other in (layer().eval(), layer(sample=False)):
        assert not other.draws
        torch.manual_seed(0)
        first = other(x, e)
        assert torch.equal(other(x, e), first)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (1, 0), (1, 1), (2, 3)])
@pytest.mark.parametrize("train", [True, False])
def test_few_rows(batch: int, tokens: int, train: bool) -> None:
    moe, (x, e) = layer().train(train), inputs(batch, tokens)
    out, losses = moe(x.requires_grad_(), e, with_losses=True)
    assert out.shape == x.shape
    (out.sum() + sum(losses.values())).backward()
    if batch:
        assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())


def test_any_strides_and_autocast() -> None:
    moe, (x, e) = layer().eval(), inputs()
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close("strides", moe(turned, e.t().contiguous().t()), moe(x, e), 1e-6)
    probs = moe.router(e)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moe.router(e)[0], probs)
        out, losses = moe(x, e, with_losses=True)
    assert out.dtype == torch.bfloat16
    assert losses["load_balance"].dtype == losses["z"].dtype == torch.float32
    half = layer().bfloat16().eval()
    assert half.router(e.bfloat16())[0].dtype == torch.float32


def test_a_fresh_layer() -> None:
    moe = NoiseMoE(16, 4)
    assert isinstance(moe, TokenMoE)
    probs = moe.router(torch.randn(3, 16))[0]
    assert (probs - 0.25).abs().max() < 0.1
    assert (moe.router.first.out_features, moe.weight_in.shape) == (32, (4, 16, 128))
    assert moe.bias_out is None
    assert "sample=True" in repr(moe)


def test_bad_input() -> None:
    moe, (x, e) = layer(), inputs()
    index = torch.zeros(3, 5, 2, dtype=torch.int64)
    for arguments, message in (
        ((x[0], e), "x has shape (5, 6); it must be [B, T, 6]"),
        ((x, e[:2]), "time_embedding has shape (2, 6); it must be [3, 6]"),
        ((x, e[:, :5]), "time_embedding has shape (3, 5); it must be [3, 6]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            moe(*arguments)
    for given, error, message in (
        ({"noise": torch.zeros(3, 5, 4)}, ValueError, "noise has shape (3, 5, 4); it must be [3, 5, 5]"),
        ({"expert_index": index[..., :1]}, ValueError, "expert_index has shape (3, 5, 1)"),
        ({"expert_index": index.float()}, TypeError, "expert_index is torch.float32"),
        ({"expert_index": index + 5}, ValueError, "expert_index holds 5 to 5; it must stay in [0, 5)"),
        ({"noise": [1]}, TypeError, "noise is"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            moe(x, e, **given)
    for settings, error, message in (
        ({"top_k": 6, "num_experts": 5}, ValueError, "top_k is 6"),
        ({"sample": 1}, TypeError, "sample is 1"),
        ({"time_size": 0}, ValueError, "time_size is 0"),
        ({"router_hidden_size": 0}, ValueError, "router_hidden_size is 0"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            NoiseMoE(8, **settings)
    with pytest.raises(ValueError, match=r"routing\.expert_index has shape"):
        moe.merge_each(moe.choose(moe.router(e)[0], index))
