"""The experts of one route as dense layers equal the routed layer."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch import nn

from switch_moe import MergedExperts, Routing, SwitchMoE, native
from switch_moe import merged as merged_experts

EXPERTS = [{"expert": "linear"}, {"expert": "mlp"}, {"expert": "swiglu"}]


def make_layer(**settings) -> SwitchMoE:
    torch.manual_seed(0)
    layer = SwitchMoE(24, **{"num_experts": 4, "top_k": 2, **settings})
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("settings", EXPERTS)
@pytest.mark.parametrize("tokens", [0, 1, 5, 600])
def test_merged_experts_are_the_routed_layer(
    settings: dict, top_k: int, bias: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 tokens of 2 samples take the compiled product of a CPU here, fewer torch's."""
    least = 1024 * 24**2
    for name in ("COMPILED_FROM", "COMPILED_MLP_FROM"):
        monkeypatch.setattr(merged_experts, name, least)
    layer = make_layer(top_k=top_k, bias=bias, **settings)
    routing = layer.route(torch.randn(1, 24))
    x = torch.randn(2, tokens, 24)
    exact = make_layer(top_k=top_k, bias=bias, backend="reference", **settings).double()
    routing64 = Routing(*(part.double() if part.is_floating_point() else part for part in routing[:3]))
    with torch.no_grad():
        merged = layer.merge(routing)
        if native.cpu.reason is None:
            assert merged._compiled(x, least) == (tokens == 600)
        for modulate in (False, True):
            expected = exact(x.double(), routing=routing64, modulate=modulate)
            assert_close("merged", merged(x, modulate), expected, 1e-5)


@pytest.mark.parametrize("settings", EXPERTS)
@pytest.mark.parametrize("least", [0, 2**62])
def test_gradients_pass_through_the_merged_experts(
    settings: dict, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_experts, "COMPILED_MLP_FROM", least)
    found = []
    for merge in (False, True):
        layer = make_layer(**settings)
        torch.manual_seed(1)
        embedding, x = torch.randn(1, 24), torch.randn(3, 5, 24, requires_grad=True)
        routing = layer.route(embedding)
        out = layer.merge(routing)(x, True) if merge else layer(x, routing=routing, modulate=True)
        out.backward(torch.randn(out.shape))
        found.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    for routed, merged in zip(*found, strict=True):
        assert_close("gradient", merged, routed, 1e-5)


@pytest.mark.parametrize("settings", EXPERTS)
def test_half_types_and_autocast(settings: dict) -> None:
    layer = make_layer(**settings)
    routing, x = layer.route(torch.randn(1, 24)), torch.randn(2, 40, 24)
    with torch.no_grad():
        expected = layer(x, routing=routing, modulate=True)
        for dtype in (torch.bfloat16, torch.float16):
            half = make_layer(**settings).to(dtype)
            allowed = 1.5 * (half(x.to(dtype), routing=routing, modulate=True) - expected).norm()
            out = half.merge(routing)(x.to(dtype), modulate=True)
            assert out.dtype == dtype
            assert (out - expected).norm() <= allowed
        with torch.autocast("cpu", torch.bfloat16):
            out = layer.merge(routing)(x, modulate=True)
    assert out.dtype == torch.bfloat16
    assert_close("autocast", out.float(), expected, 1e-2)


@pytest.mark.parametrize("backend", ["reference", "native", "auto"])
def test_every_backend(backend: str) -> None:
    layer = make_layer(backend=backend)
    routing, x = layer.route(torch.randn(1, 24)), torch.randn(3, 700, 24)
    with torch.no_grad():
        assert_close("merged", layer.merge(routing)(x), layer(x, routing=routing), 1e-5)


def test_memory_is_counted() -> None:
    layer = make_layer()
    merged = layer.merge(layer.route(torch.randn(1, 24)))
    assert isinstance(merged, MergedExperts)
    assert merged.nbytes == (24 * 24 + 24) * 4


def test_bad_arguments() -> None:
    layer = make_layer()
    with pytest.raises(ValueError, match=r"routing.expert_index has shape \(2, 2\)"):
        layer.merge(layer.route(torch.randn(2, 24)))
    with pytest.raises(TypeError, match=r"routing is a Tensor; it must be a switch_moe.Routing"):
        layer.merge(torch.zeros(1, 2))
    merged = layer.merge(layer.route(torch.randn(1, 24)))
    with pytest.raises(ValueError, match=r"x has shape \(3, 24\)"):
        merged(torch.randn(3, 24))
    with pytest.raises(TypeError, match="modulate is 1"):
        merged(torch.randn(1, 3, 24), 1)
    for settings in EXPERTS:
        layer = make_layer(**settings)
        routing = layer.route(torch.randn(1, 24))
        with pytest.raises(ValueError, match="the experts"):
            layer.merge(routing._replace(expert_index=torch.tensor([[0, 4]], dtype=torch.int32)))
