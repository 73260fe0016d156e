"""The layers of the family, and their blocks, as one program, and without a look at a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close, random_model, top_k_of
from torch import nn

from switch_moe import DenseToSparseMoE, FallingCapacityMoE, NoiseMoE

LAYERS = {
    "drawn": (lambda: NoiseMoE(16, 4), ("e", "noise")),
    "by sample": (lambda: NoiseMoE(16, 4).eval(), ("e",)),
    "soft": (lambda: DenseToSparseMoE(16, 4), ("noise",)),
    "evaluated": (lambda: DenseToSparseMoE(16, 4, eval_fraction=0.25).eval(), ()),
    "falling": (lambda: FallingCapacityMoE(16, 4), ("e",)),
}


def arguments(names: tuple[str, ...], device: str = "cpu") -> dict[str, Any]:
    torch.manual_seed(0)
    given = {"x": torch.randn(3, 5, 16), "e": torch.randn(3, 16), "noise": torch.randn(3, 5, 4)}
    keys = {"x": "x", "e": "time_embedding", "noise": "noise"}
    return {keys[name]: given[name].to(device) for name in ("x", *names)}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_compiles_whole(name: str) -> None:
    make, names = LAYERS[name]
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for module in (layer, compiled):
        layer.zero_grad()
        out, losses = module(**arguments(names), with_losses=True)
        (out.square().sum() + sum(losses.values())).backward()
        found.append([out, *losses.values(), *(p.grad.clone() for p in layer.parameters())])
    for eager, whole in zip(*found, strict=True):
        assert_close("compiled", whole, eager, 1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_waits_for_no_device(name: str) -> None:
    """Tensors without values: whoever asks for one fails. Random numbers are drawn here, not given."""
    make, names = LAYERS[name]
    given = arguments(tuple(one for one in names if one != "noise"), "meta")
    out, losses = make().to("meta")(**given, with_losses=True)
    (out.sum() + sum(losses.values())).backward()
    assert out.shape == (3, 5, 16)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["mode", "evomoe", "nucleus"])
def test_blocks_compile(routing: str) -> None:
    settings = {"num_experts": 4, "top_k": top_k_of(routing), "class_dropout_prob": 0.0}
    model, eager = (random_model(routing=routing, **settings) for _ in range(2))
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([3, 400]), torch.tensor([0, 1])
    told = {"expert_noise": torch.randn(model.noise_shape(2))} if model.draws else {}
    found = [one(*inputs, **told, with_prior=True) for one in (model, eager)]
    assert_close("out", found[0][0], found[1][0], 1e-5)
    assert_close("balance", found[0][1], found[1][1], 1e-5)


def test_no_block_keeps_a_random_number() -> None:
    """The state of the layers is their parameters alone."""
    for make, _ in LAYERS.values():
        layer: nn.Module = make()
        assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}
