"""The whole steps that are measured compute the same function, and what their rows say is right."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

import pytest
import torch
from helpers import assert_close, random_model
from switch_dit import SwitchDiT, create_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import counts
from benchmarks import test_steps as steps
from benchmarks.case import SWITCH_MOE
from benchmarks.official_structure import OfficialStructure
from benchmarks.test_steps import DENSE, SAMPLE, STRUCTURE, TRAIN, Contender, Prepared, Setting
from benchmarks.timing import time_together


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are so small that threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 1, 8, 8, generator=generator)
    return x, torch.tensor([0, 999, 400, 400, 30]), torch.tensor([0, 1, 2, 3, 0])


@pytest.mark.parametrize(("experts", "top_k"), [(3, 2), (3, 1), (3, 3), (5, 2)])
def test_official_structure_is_the_same_function(experts: int, top_k: int) -> None:
    model = random_model(in_channels=1, depth=3, top_k=top_k, num_experts=experts).eval()
    structure = OfficialStructure.of(model).eval()
    assert model.state_dict().keys() == structure.state_dict().keys()
    assignment = torch.randperm(len(model.assignment), generator=torch.Generator().manual_seed(2))
    found = []
    for one in (model, structure):
        one.assignment.copy_(assignment)
        out, prior = one.forward_with_prior(*inputs(), match=False)
        trained = {name: p for name, p in one.named_parameters() if p.requires_grad}
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        grads = torch.autograd.grad([out, prior], list(trained.values()), [grad, torch.tensor(7.0)])
        found.append({"output": out, "prior": prior} | dict(zip(trained, grads, strict=True)))
    for name, expected in found[0].items():
        assert_close(name, found[1][name], expected, 1e-5)


def test_official_structure_matches_at_the_same_cost() -> None:
    model = random_model(in_channels=1, depth=3)
    structure = OfficialStructure.of(model)
    chosen = model.route_all_timesteps().selected()
    assert 0 < chosen.mean(0).min() < chosen.mean(0).max() < 1, "the case is not trivial"

    def cost(assignment: torch.Tensor) -> float:
        assert sorted(assignment.tolist()) == list(range(chosen.shape[1]))
        return float((chosen - model.prior.table[:, assignment]).abs().sum())

    structure.match(chosen)
    assert cost(structure.assignment) == cost(model.prior.match(chosen))
    structure.forward_with_prior(*inputs())
    assert cost(structure.assignment) == cost(model.prior.match(chosen))


@functools.cache
def prepared(which: str) -> Prepared:
    return Prepared(Setting(which, "tiny/4", "cpu", 4))


@pytest.mark.parametrize("which", [TRAIN, SAMPLE])
def test_who_waits_for_the_host(which: str) -> None:
    step = prepared(which).steps
    assert counts.host_waits(step[SWITCH_MOE]) == 0
    assert counts.host_waits(step[DENSE]) == 0
    assert counts.host_waits(step[STRUCTURE]) > 0


def rows_of(case: Prepared) -> dict[str, dict]:
    timed = time_together({name: [step] for name, step in case.steps.items()}, "cpu", 0.0, least=2)
    return {row["contender"]: row for row in case.rows(timed)}


@pytest.mark.slow
@pytest.mark.parametrize("which", [TRAIN, SAMPLE])
def test_rows(which: str) -> None:
    rows = rows_of(prepared(which))
    assert list(rows) == [SWITCH_MOE, DENSE, STRUCTURE]
    for row in rows.values():
        assert row["failure"] is None
        assert row["error"] <= row["allowed"]
        assert (row["operation"], row["pass"]) == (f"{which}_step", which)
        assert len(row["samples"]) == 2
        assert row["images_per_second"] == pytest.approx(4e6 / (sum(row["samples"]) / 2), rel=1e-3)
        assert row["mfu"] > 0
        assert row["peak_bytes"] > 0
    json.dumps(list(rows.values()), allow_nan=False)
    assert rows[DENSE]["operators"] < rows[SWITCH_MOE]["operators"] < rows[STRUCTURE]["operators"]


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is a little off."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def spoil_output(model: SwitchDiT) -> None:
    with torch.no_grad():
        model.blocks[1].moe.weight[0].mul_(1.01)


def spoil_gradient(model: SwitchDiT) -> None:
    layer = model.blocks[1].moe
    forward = layer.forward
    layer.forward = lambda *args, **options: Scaled.apply(forward(*args, **options))


def spoil_prior(model: SwitchDiT) -> None:
    model.prior.table.copy_(model.prior.table.flip(0))


@pytest.mark.parametrize(
    "spoil",
    [spoil_output, *(pytest.param(one, marks=pytest.mark.slow) for one in (spoil_gradient, spoil_prior))],
)
def test_a_wrong_contender_is_not_timed(spoil) -> None:
    def create(*args, **options) -> SwitchDiT:
        model = steps.with_random_weights(*args, **options)
        spoil(model)
        return model

    right = steps.contenders()[1]
    case = Prepared(Setting(TRAIN, "tiny/4", "cpu", 4), [Contender("wrong", create), right])
    assert set(case.steps) == {DENSE, steps.PRODUCT}
    wrong = rows_of(case)["wrong"]
    assert wrong["failure"].startswith("wrong: ")
    assert "samples" not in wrong


def test_a_contender_that_raises_does_not_end_the_others() -> None:
    def create(*args, **options) -> SwitchDiT:
        raise OSError("no such model")

    case = Prepared(
        Setting(SAMPLE, "tiny/4", "cpu", 2),
        [Contender("broken", create), steps.contenders()[1]],
    )
    assert case.checks["broken"]["failure"] == "OSError: no such model"
    assert case.checks[DENSE]["failure"] is None


@pytest.mark.parametrize("which", [TRAIN, SAMPLE])
def test_flops_of_dit_are_those_that_torch_counts(which: str) -> None:
    setting = Setting(which, "tiny/4", "cpu", 3)
    rows = 3 if which == TRAIN else 6
    model = create_model("tiny/4", routing="none", **setting.settings).eval()
    x, t = torch.randn(rows, 1, 8, 8), torch.zeros(rows, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, t, t)
    passes = 3 if which == TRAIN else 1
    assert steps.useful_flops(setting, "none") == passes * counter.get_total_flops()
    merged = passes * rows * 6 * 2 * 4 * 128**2  # 6 blocks, 4 tokens, D = 128
    assert steps.useful_flops(setting, "switch") - steps.useful_flops(setting, "none") == merged
