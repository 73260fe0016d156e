"""SwitchDiT: sizes, the cancelled skip, labels, compilation. Parity is in test_golden.py."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, random_model
from switch_dit import PRESETS, SwitchDiT, create_model

TINY = {"input_size": 8, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.mark.parametrize(
    ("preset", "routing", "parameters"),
    [
        ("S/2", "switch", 38_299_460),
        ("B/2", "switch", 151_801_412),
        ("L/2", "switch", 533_747_816),
        ("XL/2", "switch", 786_799_988),
        ("S/2", "none", 32_963_360),
        ("B/2", "none", 130_512_416),
        ("L/2", "none", 458_102_816),
        ("XL/2", "none", 675_129_632),
        ("XL/2", "dtr", 675_129_632),
    ],
)
def test_parameter_counts(preset: str, routing: str, parameters: int) -> None:
    with torch.device("meta"):
        model = create_model(preset, routing=routing)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not model.pos_embed.requires_grad


def test_presets() -> None:
    assert set(PRESETS) == {
        f"{size}/{patch}" for size in ("tiny", "S", "B", "L", "XL") for patch in (2, 4, 8)
    }
    with pytest.raises(ValueError, match="preset is 'M/2'; it must be one of tiny/2"):
        create_model("M/2")


@pytest.mark.parametrize("routing", ["switch", "dtr"])
def test_the_cancelled_skip(routing: str) -> None:
    """out = block(r) + (x - r), as the papers write it, evaluated without the cancellation."""
    model = random_model(routing=routing).eval().double()
    block, x, c = model.blocks[0], torch.randn(3, 16, 24).double(), torch.randn(3, 24).double()
    t = torch.tensor([0, 500, 999])
    routed = model.route(model.t_embedder.float()(t)).block(0) if routing == "switch" else None
    mask = model.dtr_mask[t].double() if routing == "dtr" else None
    if routing == "switch":
        m = block.moe(x, routing=routed._replace(expert_gate=routed.expert_gate.float()))
        r, skip = x * (1 + m), (1 - (1 + m)) * x
    else:
        r, skip = x * mask[:, None], (1 - mask[:, None]) * x
    one = block.adaLN_modulation(c).chunk(6, dim=1)
    h = r + one[2][:, None] * block.attn(block.norm1(r) * (1 + one[1][:, None]) + one[0][:, None])
    h = h + one[5][:, None] * block.mlp(block.norm2(h) * (1 + one[4][:, None]) + one[3][:, None])
    assert_close("block", block(x, c, *(routed[:3] if mask is None else (mask,))), h + skip, 1e-6)


@pytest.mark.parametrize("routing", ["switch", "dtr", "none"])
@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("num_classes", [0, 5])
def test_shapes(routing: str, learn_sigma: bool, num_classes: int) -> None:
    model = random_model(routing=routing, learn_sigma=learn_sigma, num_classes=num_classes).eval()
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 500, 999])
    y = torch.tensor([0, 4, 4, 2]) if num_classes else None
    out = model(x, t, y)
    assert out.shape == (4, 6 if learn_sigma else 3, 8, 8)
    assert out.std() > 0
    with_prior, prior = model.forward_with_prior(x, t, y)
    assert_close("output", with_prior, out, 1e-6)
    assert (prior > 0) == (routing == "switch")


def test_patches_are_in_their_places() -> None:
    """A token carries the part of the picture where its patch was: a local change stays local."""
    model = random_model(depth=1, routing="none").eval()
    torch.nn.init.zeros_(model.blocks[0].adaLN_modulation[1].weight)
    torch.nn.init.zeros_(
        model.blocks[0].adaLN_modulation[1].bias
    )  # the block is the identity: tokens do not mix
    x = torch.randn(1, 3, 8, 8)
    t, y = torch.tensor([3]), torch.tensor([1])
    changed = x.clone()
    changed[0, :, 2:4, 6:8] += 1
    difference = (model(changed, t, y) - model(x, t, y)).abs().sum((0, 1))
    assert (difference[2:4, 6:8] > 0).all()
    difference[2:4, 6:8] = 0
    assert difference.max() == 0


def test_fresh_model_predicts_zero_noise() -> None:
    model = SwitchDiT(**TINY)
    assert model(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])).count_nonzero() == 0


def test_label_dropout() -> None:
    always, never = random_model(class_dropout_prob=1.0), random_model(class_dropout_prob=0.0)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    a, b = torch.tensor([0, 1]), torch.tensor([2, 3])
    assert torch.equal(always(x, t, a), always(x, t, b))
    assert not torch.equal(always.eval()(x, t, a), always(x, t, b))
    assert torch.equal(never(x, t, a), never(x, t, a))
    assert never.y_embedder.embedding_table.num_embeddings == 5


def test_labels_do_not_route() -> None:
    model = random_model().eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    routings = []
    model.router.register_forward_hook(lambda _, inputs, routing: routings.append(routing.probs))
    first, second = (model(x, t, torch.tensor(y)) for y in ([0, 1], [4, 2]))
    assert not torch.equal(first, second)
    assert torch.equal(*routings)


def test_guidance_of_one_is_none_and_covers_all_channels() -> None:
    model = random_model().eval()
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([3, 700, 3, 700])
    y = torch.tensor([0, 1, 5, 5])
    both = torch.cat([x[:2], x[:2]])
    plain = model(both, t, y)
    assert_close("scale 1", model.forward_with_cfg(x, t, y, 1.0)[:2], plain[:2], 1e-5)
    expected = plain[2:, :3] + 3 * (plain[:2, :3] - plain[2:, :3])
    guided = model.forward_with_cfg(x, t, y, 3.0)
    assert_close("scale 3", guided[:2, :3], expected, 1e-5)
    assert_close("variance", guided[:, 3:], plain[:, 3:], 1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compile_fullgraph(autocast: bool, backend: str) -> None:
    model = random_model(class_dropout_prob=0.0).eval()
    x, t, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 500, 999]), torch.tensor([0, 4, 4, 2])

    def loss(forward) -> torch.Tensor:
        torch.manual_seed(0)  # the matching breaks ties at random
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, prior = forward(x, t, y)
        return out.float().square().mean() + prior

    options = {"fallback_random": True} if backend == "inductor" else None  # ties break as they do eagerly
    compiled = torch.compile(model.forward_with_prior, fullgraph=True, backend=backend, options=options)
    eager_loss = loss(model.forward_with_prior)
    eager = torch.autograd.grad(
        eager_loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    compiled_loss = loss(compiled)
    assert_close("loss", compiled_loss, eager_loss, 1e-2 if autocast else 1e-5)
    found = torch.autograd.grad(
        compiled_loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    for (name, _), a, e in zip(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad], found, eager, strict=True
    ):
        assert (a is None) == (e is None), name
        if a is not None and (e.norm() > 1e-4 or not autocast):
            assert_close(name, a, e, 0.1 if autocast else 1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routing": "moe"}, "routing is 'moe'; it must be one of switch, dtr, none"),
        ({"patch_size": 3}, "patch_size is 3; it must divide input_size, 8"),
        ({"hidden_size": 25}, "hidden_size is 25; it must be a multiple of 4 and of num_heads, 3"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob is 1.5; it must be between 0 and 1"),
        ({"top_k": 9}, "top_k is 9"),
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"num_heads": 0}, "num_heads is 0; it must be at least 1"),
    ],
)
def test_errors(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwitchDiT(**{**TINY, **settings})


def test_missing_labels() -> None:
    with pytest.raises(ValueError, match="y is None; a model with 5 classes takes labels"):
        SwitchDiT(**TINY)(torch.zeros(1, 3, 8, 8), torch.zeros(1))
