"""What is told of a routing: the numbers, the pictures and the files of models/inspect_routing.py."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers import random_model
from switch_dit.inspection import Inspection, Segment, inspect_model
from torch import Tensor

from switch_moe import DiffusionPrior


def inspection(probs: list, k: int, prior: Tensor | None = None, continuous: bool = False) -> Inspection:
    """Of routers' probabilities [L, N, M]; the prior wants the chosen experts unless it is given."""
    table = torch.tensor(probs, dtype=torch.float64)
    chosen = torch.zeros_like(table, dtype=torch.bool).scatter(2, table.topk(k).indices, True)
    prior = chosen.transpose(0, 1).flatten(1) if prior is None else prior
    return Inspection(table, chosen, prior, continuous)


# Block 0 changes its second expert after timestep 1; block 1 always has the same two.
HAND_MADE = [
    [[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.2, 0.3], [0.5, 0.1, 0.4]],
    [[0.2, 0.2, 0.6]] * 2 + [[0.1, 0.3, 0.6]] * 2,
]


def test_hand_made_gates() -> None:
    """topk may take either of two that tie: so block 1 has none that tie for the second place."""
    probs = [HAND_MADE[0], [[0.1, 0.3, 0.6]] * 4]
    found = inspection(probs, 2)
    assert (found.blocks, found.timesteps, found.experts, found.top_k) == (2, 4, 3, 2)
    assert found.gates[0].tolist() == [[0.5, 0.3, 0], [0.5, 0.3, 0], [0.5, 0, 0.3], [0.5, 0, 0.4]]
    assert found.usage.tolist() == [[1, 0.5, 0.5], [0, 1, 1]]
    assert found.shared.tolist() == [[True, False, False], [False, True, True]]
    assert found.unused.tolist() == [[False] * 3, [True, False, False]]
    assert found.segments() == [[Segment(0, 1, (0, 1)), Segment(2, 3, (0, 2))], [Segment(0, 3, (1, 2))]]
    near, far = [1, 1, 0.75, 0.75], [0.75, 0.75, 1, 1]  # 3 of 4 experts in common
    assert found.affinity.tolist() == [near, near, far, far]
    assert found.least_affinity == 0.5
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    assert found.entropy[0, :3].tolist() == pytest.approx([entropy] * 3, rel=1e-14)
    gates = -sum(p * math.log(p) for p in (5 / 9, 4 / 9))
    assert found.gate_entropy[0, 3].item() == pytest.approx(gates, rel=1e-14)
    assert found.agreement == 1
    assert found.summary()["segments"] == 3


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (4, 1), (4, 3), (4, 4)])
def test_even_and_one_hot_gates(experts: int, k: int) -> None:
    even = inspection([[[1 / experts] * experts] * 5] * 3, k)
    assert even.entropy.tolist() == pytest.approx(np.full((3, 5), math.log(experts)), abs=1e-15)
    assert even.gate_entropy.tolist() == pytest.approx(np.full((3, 5), math.log(k)), abs=1e-15)
    assert even.distance.mean().item() == pytest.approx(even.even_distance, abs=1e-15)
    certain = inspection([[[1.0] + [0.0] * (experts - 1)] * 5] * 3, k)
    assert not certain.entropy.any()
    assert not certain.gate_entropy.any()
    assert certain.affinity.tolist() == np.ones((5, 5)).tolist()
    assert certain.least_affinity == {(1, 1): 1, (4, 1): 0, (4, 3): 2 / 3, (4, 4): 1}[experts, k]
    if k == 1:  # what the prior wants exactly; its epsilon of 1e-6 costs nothing where both are alike
        assert certain.distance.tolist() == pytest.approx([0] * 5, abs=1e-15)


def test_the_distance_where_nothing_is_in_common() -> None:
    """It is log 2, up to the 1e-6 within the logarithms of the loss."""
    wrong = torch.tensor([[False, True]] * 3)
    found = inspection([[[1.0, 0.0]] * 3], 1, wrong)
    assert found.distance.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-5)
    assert found.agreement == 0
    assert found.affinity.tolist() == found.prior_affinity.tolist()


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 1}, {"num_experts": 4, "top_k": 4}, {"num_experts": 1, "top_k": 1},
     {"num_timesteps": 1}, {"num_experts": 8, "top_k": 3, "num_timesteps": 50}],
)  # fmt: skip
def test_the_distance_is_the_diffusion_prior_loss(settings: dict) -> None:
    model = random_model(**{"num_timesteps": 200, **settings})
    found = inspect_model(model)
    routing, t = model.route_all_timesteps(), torch.arange(model.num_timesteps)
    prior: DiffusionPrior = model.prior
    slots = torch.arange(prior.table.shape[1])
    assignment = prior.match(routing.selected(), ties=slots.repeat(2, 1))
    probs = routing.probs.transpose(0, 1).flatten(1)
    assert torch.equal(found.prior, prior.table[:, assignment] > 0)
    assert torch.equal(found.chosen.transpose(0, 1).flatten(1), routing.selected() > 0)
    assert torch.equal(found.gates.sum(-1).float(), routing.expert_gate.double().sum(-1).float())
    loss = prior.loss(probs, t, assignment).item()  # in float32
    assert found.distance.mean().item() == pytest.approx(loss, rel=1e-5)
    one = t[-1:]
    assert found.distance[-1].item() == pytest.approx(
        prior.loss(probs[one], one, assignment).item(), rel=1e-5
    )
    expected = []
    for q, u in zip(probs.double().numpy(), found.prior.double().numpy(), strict=True):
        q, u = q / prior.depth, u / (prior.top_k * prior.depth)
        middle = np.log((q + u) / 2 + 1e-6)
        of_q, of_u = (a @ (np.log(a + 1e-6) - middle) for a in (q, u))
        expected.append((of_q + of_u) / 2)
    assert found.distance.numpy() == pytest.approx(np.array(expected), rel=1e-12, abs=1e-15)
    assert torch.equal(found.distance_by_block.sum(0), found.distance)
    assert (found.distance_by_block > -1e-5).all()
    wanted = prior.table.double()
    assert torch.allclose(found.prior_affinity, wanted @ wanted.t() / wanted[0].sum(), rtol=1e-15)


def test_looking_changes_nothing_and_repeats() -> None:
    model = random_model(num_timesteps=40).train()
    state, before = torch.get_rng_state(), {name: p.clone() for name, p in model.state_dict().items()}
    buffers = [buffer.clone() for buffer in model.buffers()]
    texts = {inspect_model(model).to_json() for _ in range(2)}
    assert len(texts) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


def test_json_has_the_numbers() -> None:
    model = random_model(num_timesteps=203, num_experts=4)
    found = inspect_model(model, continuous=True)

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    read = json.loads(found.to_json(), parse_constant=refuse)
    assert [read[key] for key in ("blocks", "timesteps", "experts", "top_k")] == [2, 203, 4, 2]
    assert read["continuous"] is True
    for key, values in (
        ("gates", found.gates), ("entropy", found.entropy), ("gate_entropy", found.gate_entropy),
        ("prior_distance", found.distance),
    ):  # fmt: skip
        assert np.abs(np.array(read[key]) - values.numpy()).max() <= 5.1e-7, key
    some = read["affinity_timesteps"]
    assert (len(some), some[0], some[-1]) == (101, 0, 202)
    for key, values in (("affinity", found.affinity), ("prior_affinity", found.prior_affinity)):
        assert np.abs(np.array(read[key]) - values.numpy()[some][:, some]).max() <= 5.1e-7, key
    assert read["summary"] == {key: round(value, 6) for key, value in found.summary().items()}
    for block, told in enumerate(read["by_block"]):
        assert told["usage"] == pytest.approx(found.usage[block].tolist(), abs=5.1e-7)
        assert told["shared_experts"] == found.shared[block].nonzero().flatten().tolist()
        assert told["unused_experts"] == found.unused[block].nonzero().flatten().tolist()
        for name, values in (("entropy", found.entropy), ("gate_entropy", found.gate_entropy),
                             ("prior_distance", found.distance_by_block)):  # fmt: skip
            assert told[name] == pytest.approx(values[block].mean().item(), abs=5.1e-7)
        chosen = np.zeros((203, 4), bool)  # the segments are all there is to know of the choice
        for segment in told["segments"]:
            chosen[segment["first"] : segment["last"] + 1, segment["experts"]] = True
        assert (chosen == found.chosen[block].numpy()).all()
    assert len(read["by_block"][0]["segments"]) > 1


def test_the_table_tells_what_is_there() -> None:
    text = inspection([HAND_MADE[0], [[0.1, 0.3, 0.6]] * 4], 2).describe()
    lines = [line.split() for line in text.splitlines()]
    assert lines[1][:4] == ["0", "0", "-", "1"]
    assert " ".join(lines[1][6:]) == "0-1: 0 1; 2-3: 0 2"
    assert lines[2][:5] == ["1", "1", "2", "0", "0"]
    assert "Experts chosen at every timestep: 3 of 6; at none: 1." in text
    assert "Timesteps 0 and 3 have 75% of their experts in common." in text
    assert "0-0.25: 0 1; 0.5-0.75: 0 2" in inspection(HAND_MADE[:1], 2, continuous=True).describe()
    many = inspection([[[0.6, 0.4], [0.4, 0.6]] * 4], 1).describe()
    assert "0: 0; 1: 1; 2: 0; 5 more" in many


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probs": torch.ones(2, 4, 3, dtype=torch.float64)}, "probs holds numbers from 1 to 1 and sums"),
        ({"probs": torch.full((2, 4, 3), math.nan, dtype=torch.float64)}, "probs holds numbers from nan"),
        ({"probs": torch.empty(2, 0, 3, dtype=torch.float64)}, r"probs has shape \(2, 0, 3\); L, N and M"),
        ({"probs": torch.ones(4, 3, dtype=torch.float64)}, r"probs has shape \(4, 3\); it must be"),
        ({"probs": torch.ones(2, 4, 3)}, "probs is torch.float32; it must be torch.float64"),
        ({"chosen": torch.zeros(2, 4, 3, dtype=torch.bool)}, "chosen has rows with 0 and rows with 0"),
        ({"chosen": torch.ones(2, 4, 3)}, "chosen is torch.float32; it must be torch.bool"),
        ({"chosen": torch.eye(3).bool()[[0, 0, 0, 0]].expand(2, 4, 3)}, "chosen leaves out an expert"),
        ({"prior": torch.ones(4, 6, dtype=torch.bool)}, r"prior has rows with 6 to 6 .* must have k\*L, 4"),
        ({"prior": torch.ones(4, 5, dtype=torch.bool)}, r"prior has shape \(4, 5\); it must be \[4, 6\]"),
        ({"continuous": 1}, "continuous is 1"),
    ],
)  # fmt: skip
def test_what_is_no_routing_is_refused(change: dict, message: str) -> None:
    good = inspection(HAND_MADE, 2)
    arguments = {"probs": good.probs, "chosen": good.chosen, "prior": good.prior, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        Inspection(**arguments)


def test_models_that_cannot_be_looked_at() -> None:
    for routing in ("dtr", "none"):
        with pytest.raises(ValueError, match=f"model has routing '{routing}' and no routers to look at"):
            inspect_model(random_model(routing=routing))
    with pytest.raises(TypeError, match="model is a Linear; it must be a SwitchDiT"):
        inspect_model(torch.nn.Linear(2, 2))
    model = random_model(num_timesteps=9)
    model.router.bias.data[1, 0] = math.nan
    with pytest.raises(ValueError, match="routers whose probabilities are not finite"):
        inspect_model(model)
