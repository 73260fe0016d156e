"""Timestep samplers as functions of uniform numbers, and parity with golden/speed and golden/curriculum."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from helpers import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from switch_dit import GaussianDiffusion
from switch_dit.objectives import create_objective
from switch_dit.timesteps import Curriculum, CurriculumState, LogitNormal, Sampler, SpeeD, create_sampler

SCHEDULES = ("linear", "cosine")
EDGES = st.one_of(st.floats(0, 1, exclude_max=True, width=32), st.sampled_from([0.0, 1 - 2**-24, 2**-149]))


def grid(n: int) -> torch.Tensor:
    """Numbers that stand for the uniform distribution on [0, 1)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("n", [1, 21, 1000, 997])
def test_uniform(n: int) -> None:
    draw = Sampler(n).draw(grid(7 * n))
    assert draw.weight is None
    assert draw.t.dtype == torch.int64
    assert (draw.t.bincount(minlength=n) == 7).all()  # as torch.randint
    assert torch.equal(Sampler(n, continuous=True).draw(grid(50)).t, grid(50).float())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-1.0, 2.0)])
def test_logit_normal(mean: float, std: float) -> None:
    t = LogitNormal(1000, mean=mean, std=std).draw(grid(20_000)).t.double()
    logit = torch.log(t / (1 - t))
    assert float(logit.mean()) == pytest.approx(mean, abs=1e-3)
    assert float(logit.std()) == pytest.approx(std, rel=1e-3)
    integers = LogitNormal(1000, False, mean, std).draw(grid(20_000)).t
    assert ((integers - (1000 * t).floor()).abs() <= 1).all()


@pytest.mark.parametrize("name", ["uniform", "logit-normal", "speed", "curriculum"])
@pytest.mark.parametrize("objective", ["eps", "v", "flow"])
@given(u=st.lists(EDGES, max_size=7), wide=st.booleans())
@settings(max_examples=30, deadline=None)
def test_every_u_gives_a_timestep(name: str, objective: str, u: list[float], wide: bool) -> None:
    """No sample, one sample, the ends of [0, 1), both types: what comes out is what the objective takes."""
    made = create_objective(objective)
    if (name, objective) == ("speed", "flow"):
        with pytest.raises(ValueError, match="name is 'speed'; flow has no noise schedule"):
            create_sampler(name, made)
        return
    sampler = create_sampler(name, made)
    extra = (sampler.lowest_timestep(CurriculumState()),) if name == "curriculum" else ()
    t, weight = sampler.draw(torch.tensor(u, dtype=torch.float64 if wide else torch.float32), *extra)
    assert t.shape == (len(u),)
    assert t.dtype == (torch.float32 if objective == "flow" else torch.int64)
    assert (weight is not None) == (name == "speed")
    x = torch.zeros(len(u), 1, 2, 2)
    made.q_sample(x, t, x)  # raises for t out of range
    assert made.model_time(t).shape == t.shape


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_official_speed(schedule: str) -> None:
    tensors, metadata = golden("speed")
    diffusion = GaussianDiffusion(schedule)
    for name in ("paper", "ffhq", "code_default"):
        values = dict(metadata["settings"][f"{schedule}.{name}"])
        meaningful = values.pop("meaningful_steps")
        sampler = SpeeD(diffusion, **values)
        assert sampler.meaningful == meaningful
        key = f"{schedule}.{name}"
        assert_close("probability", sampler.probability, tensors[f"{key}.probability"].double(), 1e-5)
        assert_close("weight", sampler.weight, tensors[f"{key}.weight"], 1e-5)
        for n in (16, 33):
            official = tensors[f"{key}.sampled_t_{n}"]
            first = official[: n // 2 + 1]
            assert torch.equal(official[n // 2 + 1 :], sampler.dual(first)[: n - len(first)])
            # Numbers in the middle of the drawn timesteps' shares give the official batch, duals included.
            middle = sampler.probability.cumsum(0) - sampler.probability / 2
            u = torch.cat([middle[first], torch.zeros(n - len(first), dtype=torch.float64)])
            t, weight = sampler.draw(u)
            assert torch.equal(t, official)
            assert_close("drawn weight", weight, tensors[f"{key}.weight"][t], 1e-5)
    theory = SpeeD(diffusion, lam=0.8, tau=1000).weight
    assert_close("theory_weight", theory, tensors[f"{schedule}.theory_weight"], 1e-5)


@pytest.mark.parametrize("k", [0.5, 1.0, 5.0])
def test_speed_draws_by_its_probability(k: float) -> None:
    sampler = SpeeD(GaussianDiffusion(), k=k)
    drawn = sampler.draw(torch.cat([grid(100_000), grid(100_000)])).t[:100_000]
    counts = drawn.bincount(minlength=1000).double() / 100_000
    assert (counts - sampler.probability).abs().max() < 2e-5
    assert (sampler.dual(torch.arange(1000)) >= 0).all()
    assert (sampler.dual(torch.arange(1000)) < 1000).all()


@pytest.mark.parametrize("trace", ["paper", "short", "uneven"])
@pytest.mark.parametrize("through_json", [False, True])
def test_official_curriculum(trace: str, through_json: bool) -> None:
    tensors, metadata = golden("curriculum")
    curriculum = Curriculum(**metadata[trace])
    losses = tensors[f"{trace}.loss"].tolist()
    state = CurriculumState()
    rows = []
    for loss in losses:
        used = state
        state = curriculum.after(state, loss)
        if through_json:
            state = CurriculumState.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False)))
        rows.append((used.stage, curriculum.lowest_timestep(used), state.waited, state.best))
    names = ("stage", "lowest_timestep", "waited_after", "best_after")
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        assert list(values) == tensors[f"{trace}.{name}"].tolist(), name
    assert curriculum.replay(losses) == state
    half = curriculum.replay(losses[: len(losses) // 2])
    assert curriculum.replay(losses[len(losses) // 2 :], half) == state


LOSSES = st.lists(st.one_of(st.floats(), st.just(1.0), st.integers(-3, 3)), max_size=40)


@given(losses=LOSSES, clusters=st.integers(1, 6), patience=st.integers(1, 4), cut=st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_curriculum_of_any_losses(losses: list[float], clusters: int, patience: int, cut: int) -> None:
    """NaN, infinities, equal losses: the stage only rises, and a state that was saved goes on the same."""
    curriculum = Curriculum(100, clusters=clusters, patience=patience)
    states = [curriculum.replay(losses[:n]) for n in range(len(losses) + 1)]
    for before, after in itertools.pairwise(states):
        assert 0 <= after.stage - before.stage <= 1
        assert after.stage <= clusters
        assert after.waited < patience or after.stage == clusters
    saved = json.loads(json.dumps(states[min(cut, len(losses))].to_json()))
    assert curriculum.replay(losses[cut:], CurriculumState.from_json(saved)) == states[-1]


def test_equal_losses_end_every_stage() -> None:
    curriculum = Curriculum(clusters=3, patience=4)
    stages = [curriculum.replay([0.5] * n).stage for n in range(14)]
    assert stages == [1] * 5 + [2] * 5 + [3] * 4  # one loss sets the best, four wait


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_curriculum_draws_from_its_stage(continuous: bool, as_tensor: bool) -> None:
    curriculum = Curriculum(1000, continuous, clusters=5)
    for stage in range(1, 6):
        lowest = curriculum.lowest_timestep(CurriculumState(stage))
        assert lowest == 1000 - 200 * stage
        t, weight = curriculum.draw(grid(3 * 200 * stage), torch.tensor(lowest) if as_tensor else lowest)
        assert weight is None
        counts = (t * 1000 if continuous else t).long().bincount(minlength=1000)
        assert (counts[:lowest] == 0).all()
        assert (counts[lowest:] == 3).all()


U = torch.tensor([0.0, 0.5])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Sampler(0), ValueError, "num_timesteps is 0"),
        (lambda: Sampler(10, continuous=1), TypeError, "continuous is 1"),
        (lambda: Sampler().draw(U + 0.5), ValueError, r"u holds 0.5 to 1.0; it must stay in \[0, 1\)"),
        (lambda: Sampler().draw(U * math.nan), ValueError, "u holds nan"),
        (lambda: Sampler().draw(U.half()), TypeError, "u is torch.float16"),
        (lambda: Sampler().draw(U[None]), ValueError, "u has shape"),
        (lambda: Sampler().draw(U, 3), ValueError, "lowest is 3; only the curriculum"),
        (lambda: LogitNormal(std=0), ValueError, "std is 0"),
        (lambda: LogitNormal(mean=math.inf), ValueError, "mean is inf"),
        (lambda: SpeeD(GaussianDiffusion(), k=0), ValueError, "k is 0"),
        (lambda: SpeeD(GaussianDiffusion(), lam=math.nan), ValueError, "lam is nan"),
        (lambda: SpeeD(GaussianDiffusion(), tau=1001), ValueError, "tau is 1001"),
        (lambda: SpeeD("linear"), TypeError, "diffusion is a str"),
        (lambda: SpeeD(GaussianDiffusion(betas=[0.02] * 9), tau=0), ValueError, "diffusion has 9 timesteps"),
        (lambda: SpeeD(GaussianDiffusion(betas=[0.1]), tau=0), ValueError, "diffusion has 1 timesteps"),
        (lambda: Curriculum(10, clusters=11), ValueError, "clusters is 11; it must be at most num_timesteps"),
        (lambda: Curriculum(patience=0), ValueError, "patience is 0"),
        (lambda: Curriculum().draw(U), TypeError, "lowest is None"),
        (lambda: Curriculum().draw(U, 1000), ValueError, "lowest is 1000"),
        (lambda: Curriculum().draw(U, torch.tensor(-1)), ValueError, "lowest holds -1"),
        (lambda: Curriculum().draw(U, U[0]), TypeError, "lowest is torch.float32"),
        (lambda: Curriculum().after(CurriculumState(), None), TypeError, "loss is None"),
        (lambda: Curriculum().after(1, 0.5), TypeError, "state is a int"),
        (lambda: Curriculum(clusters=2).after(CurriculumState(3), 0.5), ValueError, "state has stage 3"),
        (lambda: CurriculumState(0), ValueError, "stage is 0"),
        (lambda: CurriculumState(best=math.nan), ValueError, "best is nan"),
        (lambda: CurriculumState(waited=-1), ValueError, "waited is -1"),
        (lambda: CurriculumState.from_json({"stage": 1}), ValueError, "saved is .* it must hold stage"),
        (lambda: create_sampler("random", create_objective()), ValueError, "name is 'random'"),
        (lambda: create_sampler("uniform", "eps"), TypeError, "objective is a str"),
        (
            lambda: create_sampler("uniform", create_objective(), std=1.0),
            ValueError,
            "std is 1.0; the settings of uniform are: none",
        ),
    ],
)  # fmt: skip
def test_errors(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
