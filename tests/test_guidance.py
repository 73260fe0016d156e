"""Guidance: on an interval, on some channels, by another model; and images that depend on their seed only."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, random_model
from switch_dit import sample
from switch_dit.objectives import create_objective
from switch_dit.sampling import SCHEDULERS, Guidance, group_size
from torch import Tensor

OBJECTIVE = create_objective("eps", learn_sigma=True)
PAIRS = [(name, scheduler) for name, fitting in SCHEDULERS.items() for scheduler in fitting]


def generators(first: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def draw(model, objective=OBJECTIVE, count: int = 4, first: int = 0, **options) -> Tensor:
    labels = torch.arange(first, first + count) % model.num_classes if model.num_classes else None
    options = {"steps": 3, "generator": generators(first, count), **options}
    return sample(model, objective, labels, count=count, **options)


def by_hand(model, steps: int, scale_at, channels: int = 4, guide=None, count: int = 4) -> Tensor:
    """DDIM in float64 tables, one evaluation after the other, by the routed model."""
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=each) for each in generators(0, count)])
    labels = torch.arange(count) % model.num_classes
    null = torch.full_like(labels, model.num_classes)
    respaced, kept = OBJECTIVE.diffusion.respaced(steps)
    for step in reversed(range(steps)):
        t = kept[step : step + 1]
        out = model(x, t, labels)[:, :4]
        other = guide(x, t, labels)[:, :4] if guide else model(x, t, null)[:, :4]
        scale = scale_at(float(t) / 1000)
        guided = other + scale * (out - other)
        eps = torch.cat([guided[:, :channels], out[:, channels:]], dim=1)
        abar = respaced.alphas_cumprod[step]
        before = respaced.alphas_cumprod[step - 1] if step else 1.0
        x_start = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
        x = before**0.5 * x_start + (1 - before) ** 0.5 * eps
    return x


@torch.no_grad()
def test_guidance_is_the_formula_on_its_interval_and_channels() -> None:
    model, guide = (random_model(seed, in_channels=4).eval() for seed in (0, 1))
    cases = [
        (Guidance(2.0), {"scale_at": lambda t: 2.0}),
        (Guidance(1.0), {"scale_at": lambda t: 1.0}),
        (Guidance(3.0, (0.3, 0.8)), {"scale_at": lambda t: 3.0 if 0.3 <= t <= 0.8 else 1.0}),
        (Guidance(2.0, channels=3), {"scale_at": lambda t: 2.0, "channels": 3}),
        (Guidance(2.0, guide=guide), {"scale_at": lambda t: 2.0, "guide": guide}),
    ]
    found = []
    for guidance, options in cases:
        found.append(draw(model, steps=6, guidance=guidance))
        assert_close(str(guidance[:3]), found[-1], by_hand(model, 6, **options), 1e-4)
    for i, images in enumerate(found):
        assert not any(torch.equal(images, other) for other in found[:i])


def test_outside_the_interval_the_model_is_asked_once(monkeypatch) -> None:
    model = random_model(in_channels=4)
    rows, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda x, *a, **k: rows.append(len(x)) or forward(x, *a, **k))
    draw(model, steps=10, guidance=Guidance(2.0, (0.0, 0.5)))
    group = group_size(model)
    assert rows == [group] * 5 + [2 * group] * 5


@pytest.mark.parametrize(("name", "scheduler"), PAIRS)
def test_an_image_depends_on_its_seed_only(name: str, scheduler: str) -> None:
    """Bitwise, whatever the batch size, the number of images and the threads."""
    objective = create_objective(name, learn_sigma=name == "eps")
    model = random_model(input_size=16, learn_sigma=name == "eps")
    assert group_size(model) == 4
    options = {"objective": objective, "scheduler": scheduler}
    whole = draw(model, count=11, **options)
    threads = torch.get_num_threads()
    for batch_size in (1, 3, 4, 250):
        assert torch.equal(draw(model, count=11, batch_size=batch_size, **options), whole)
    assert torch.equal(draw(model, count=6, **options), whole[:6])
    assert torch.equal(draw(model, count=3, first=8, **options), whole[8:])
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(draw(model, count=11, **options), whole)
    finally:
        torch.set_num_threads(threads)
    single = torch.Generator().manual_seed(0)
    parts = [
        draw(model, count=11, batch_size=size, generator=single.manual_seed(0), **options) for size in (2, 11)
    ]
    assert torch.equal(*parts)


def test_a_guide_needs_no_labels() -> None:
    model, guide = (random_model(seed, num_classes=0).eval() for seed in (0, 1))
    plain, guided = (draw(model, guidance=Guidance(2.0, guide=by)) for by in (None, guide))
    assert not torch.equal(plain, guided)
    assert torch.equal(plain, draw(model, guidance=1))


def test_modes_of_both_models_come_back() -> None:
    model, guide = random_model(0).train(), random_model(1).train()
    draw(model, guidance=Guidance(2.0, guide=guide))
    assert model.training
    assert guide.training


@pytest.mark.parametrize(
    ("guidance", "error", "message"),
    [
        (float("nan"), ValueError, "guidance is nan"),
        (Guidance(2, (0.5, 0.1)), ValueError, r"guidance_interval is \(0.5, 0.1\)"),
        (Guidance(2, (-1, 0.1)), ValueError, "guidance_interval is -1; it must be .*between 0"),
        (Guidance(2, 0.5), ValueError, "guidance_interval is 0.5; it must be two numbers"),
        (Guidance(2, channels=0), ValueError, "guidance_channels is 0"),
        (Guidance(2, channels=9), ValueError, "guidance_channels is 9"),
        (Guidance(2, guide="x"), TypeError, "guide is a str; it must be a SwitchDiT"),
        (Guidance(2, guide=random_model(num_classes=7)), ValueError, "guide has num_classes 7; it must be 5"),
    ],
)
def test_guidance_that_does_not_fit(guidance, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        draw(random_model(), guidance=guidance)


def test_generators_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="generator has 3 generators; it must be one, or 4"):
        draw(random_model(), generator=generators(0, 3))
    with pytest.raises(TypeError, match=r"generator is a int; it must be a torch.Generator"):
        draw(random_model(), generator=[1, 2, 3, 4])
