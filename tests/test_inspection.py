"""What is told of a routing: the numbers, the pictures and the files of models/inspect_routing.py."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import inspect_routing
import numpy as np
import pytest
import torch
from helpers import random_model
from inspect_routing import InspectConfig
from PIL import Image
from switch_dit import model as model_module
from switch_dit import routing_plots
from switch_dit.checkpoint import save_checkpoint
from switch_dit.inspection import Inspection, Segment, inspect_model
from switch_dit.report import ROUTING, write_report
from switch_dit.routing_plots import PICTURES
from switch_dit.settings import TrainConfig
from torch import Tensor
from train_switch_dit import run as run_training

from switch_moe import DiffusionPrior

ROOT = Path(__file__).parents[1]
FILES = {*(f"{name}.png" for name in PICTURES), "routing.json"}


def inspection(probs: list, k: int, prior: Tensor | None = None, continuous: bool = False) -> Inspection:
    """The Inspection of probabilities [L, N, M]; by default the prior wants the experts that are chosen."""
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
    said = found.summary()
    assert [said[key] for key in ("shared_experts", "unused_experts", "segments")] == [3, 1, 3]
    assert (said["largest_entropy"], said["largest_gate_entropy"]) == (math.log(3), math.log(2))
    assert (said["entropy"], said["gate_entropy"]) == (found.entropy.mean(), found.gate_entropy.mean())
    assert (said["affinity_of_ends"], said["prior_affinity_of_ends"]) == (0.75, 0.75)
    assert said["prior_distance"] == found.distance.mean()


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
    model = random_model(**{"num_timesteps": 300, **settings})
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


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures in the place of their files, by the name of the file."""
    kept: dict[str, Any] = {}
    monkeypatch.setattr(
        routing_plots, "save_figure", lambda figure, path, dpi: kept.update({Path(path).stem: figure})
    )
    return kept


def drawn(figures: dict[str, Any], found: Inspection, folder: Path) -> dict[str, list[Any]]:
    """The axes of each picture, those of colour bars last."""
    routing_plots.write_routing(folder, found)
    assert figures.keys() == PICTURES.keys()
    return {name: figure.axes for name, figure in figures.items()}


def pixels(axis: Any) -> np.ndarray:
    (image,) = axis.images
    return np.asarray(image.get_array())


@pytest.mark.parametrize(
    ("settings", "continuous"),
    [
        ({}, False),
        ({"num_experts": 1, "top_k": 1, "num_timesteps": 1, "depth": 1}, False),
        ({"num_experts": 3, "top_k": 3}, True),
        ({"num_experts": 4, "top_k": 1, "depth": 31}, True),
    ],
)
def test_pictures_show_the_numbers_and_name_what_they_show(
    figures: dict[str, Any], settings: dict, continuous: bool, tmp_path: Path
) -> None:
    found = inspect_model(random_model(**{"num_timesteps": 30, **settings}), continuous=continuous)
    axes = drawn(figures, found, tmp_path)
    blocks, steps, experts = found.probs.shape
    use, shares, wanted, wanted_shares, gate_bar = axes["routing"]
    gates = found.gates.transpose(1, 2).flatten(0, 1).float().numpy()
    assert np.array_equal(pixels(use), gates)
    assert np.array_equal(pixels(wanted), found.prior.t().float().numpy())
    for axis, values in ((shares, found.usage.flatten()), (wanted_shares, found.prior.double().mean(0))):
        assert [bar.get_width() for bar in axis.patches] == pytest.approx(100 * values.numpy())
        middles = [bar.get_y() + bar.get_height() / 2 for bar in axis.patches]
        assert middles == pytest.approx(range(blocks * experts))  # the rows of the map
        colours = [bar.get_facecolor() for bar in axis.patches]
        assert len({c for c, share in zip(colours, values, strict=True) if share == 1}) <= 1
        always = {c for c, share in zip(colours, values, strict=True) if share == 1}
        assert not always & {c for c, share in zip(colours, values, strict=True) if share < 1}
        crosses = axis.lines[0].get_ydata()
        assert list(crosses) == (values == 0).nonzero().flatten().tolist()
    assert "gate" in gate_bar.get_ylabel()
    assert shares.get_shared_y_axes().joined(use, shares)
    ours, prior, bar = axes["routing-affinity"]
    assert np.array_equal(pixels(ours), found.affinity.float().numpy())
    assert np.array_equal(pixels(prior), found.prior_affinity.float().numpy())
    assert "share of the experts in use" in bar.get_ylabel()
    assert ours.images[0].get_clim() == prior.images[0].get_clim()
    maps = axes["routing-entropy"][: 2 if found.top_k > 1 else 1]
    rest = axes["routing-entropy"][len(maps) :]
    assert np.array_equal(pixels(maps[0]), found.entropy.float().numpy())
    assert maps[0].images[0].get_clim() == (0, pytest.approx(math.log(experts) or 1))
    assert len(rest) == len(maps)
    if found.top_k > 1:
        assert np.array_equal(pixels(maps[1]), found.gate_entropy.float().numpy())
        assert maps[1].images[0].get_clim() == (0, pytest.approx(math.log(found.top_k)))
    assert all(bar.get_ylabel() == "entropy (nats)" for bar in rest)
    curve, by_block, distance_bar = axes["routing-distance"]
    times = np.arange(steps) / (steps if continuous else 1)
    assert np.array_equal(curve.lines[0].get_data(), [times, found.distance.numpy()])
    assert curve.lines[1].get_ydata()[0] == pytest.approx(found.distance.mean().item(), rel=1e-12)
    assert curve.lines[2].get_ydata()[0] == found.even_distance
    assert curve.get_ylim()[1] >= max(found.distance.max().item(), found.even_distance)
    assert pixels(by_block) == pytest.approx(found.distance_by_block.clamp(min=0).float().numpy())
    assert curve.get_ylabel() == distance_bar.get_ylabel() == "divergence (nats)"
    told = (
        "time (0: clean image, 1: noise)" if continuous else f"timestep (0: clean image, {steps - 1}: noise)"
    )
    for axis in (wanted, ours, prior, maps[-1], by_block):
        assert axis.get_xlabel() == told
    for axis in (use, wanted, *maps, by_block):
        assert axis.get_ylabel() == "block"
        middles, names = axis.get_yticks(), [text.get_text() for text in axis.get_yticklabels()]
        rows = experts if axis in (use, wanted) else 1
        assert len(names) <= 30
        assert [row // rows for row in middles] == list(map(int, names))
        assert all(row % rows == (rows - 1) / 2 for row in middles)
    ends = [0, 1] if continuous else [-0.5, steps - 0.5]
    for axis in (use, wanted, ours, prior, *maps, by_block):
        assert axis.images[0].get_extent()[:2] == ends
    for axis in (use, wanted, *maps, by_block):  # the first row is at the top
        assert axis.images[0].get_extent()[2:] == [len(pixels(axis)) - 0.5, -0.5]
        assert axis.get_ylim()[0] > axis.get_ylim()[1]
    for axis in (ours, prior):
        assert axis.images[0].get_extent()[2:] == ends
        assert axis.images[0].origin == "lower"
    for axis in (use, ours, prior, *maps, curve, by_block):
        assert axis.get_title()


def make_run(folder: Path, **settings: Any) -> Path:
    """What a run leaves, as far as the program reads it."""
    model = random_model(**{"num_timesteps": 30, **settings})
    objective = {"num_timesteps": 30, "learn_sigma": model.learn_sigma}
    if not model.learn_sigma:
        objective["name"] = "flow"
    save_checkpoint(folder / "weights", model, model, {"model": model.settings, "objective": objective})
    (folder / "config.json").write_text("{}")
    return folder


def test_the_program_writes_files_a_table_and_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], figures: dict[str, Any]
) -> None:
    folder = make_run(tmp_path / "run", learn_sigma=False)
    for path in FILES:  # the figures are not written here
        if path.endswith("png"):
            Image.new("RGB", (7, 5), "navy").save(folder / path)
    assert inspect_routing.run(InspectConfig(folder)) == folder
    assert not list(folder.glob("*incomplete"))
    read = json.loads((folder / "routing.json").read_text())
    assert read["continuous"] is True  # a flow
    found = inspect_model(random_model(num_timesteps=30, learn_sigma=False), continuous=True)
    assert (folder / "routing.json").read_text() == found.to_json()
    printed = capsys.readouterr().out
    assert found.describe() in printed
    assert all(f"  {name}\n" in printed for name in FILES)
    assert f"report shows them: {folder / 'report.html'}" in printed
    page = (folder / "report.html").read_text()
    section = page[page.index("<h2>Routing</h2>") :]
    assert section.count("<img") == 4
    assert PICTURES.keys() == ROUTING.keys()
    for title, caption in ROUTING.values():
        assert section.index(caption[:30])
        assert title in section
    assert found.in_words()[1] in section
    for broken in ('{"in_words": 3}', "{}", "[1"):
        (folder / "routing.json").write_text(broken)
        section = write_report(folder).read_text().partition("<h2>Routing</h2>")[2]
        assert section.startswith("<figure>")
    for picture in folder.glob("*.png"):
        picture.unlink()
    (folder / "routing.json").write_text(found.to_json())
    assert "<h2>Routing</h2>" not in write_report(folder).read_text()


def test_other_weights_and_saved_pipelines_go_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_run(tmp_path / "run")
    (folder / "weights").rename(folder / "others")
    for config in (InspectConfig(folder, weights_folder="others"), InspectConfig()):
        assert inspect_routing.run(config) == Path("routing")
        assert (tmp_path / "routing" / "routing.json").exists()
        (tmp_path / "routing" / "routing.json").unlink()
    assert not (folder / "routing.json").exists()
    given = inspect_routing.run(InspectConfig(output=tmp_path / "a" / "b"))
    assert json.loads((given / "routing.json").read_text())["blocks"] == 6


def test_wrong_settings_are_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, masks = (make_run(tmp_path / routing, routing=routing) for routing in ("none", "dtr"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    cases = [
        (["--run", "nowhere"], "run is nowhere; there is no such folder"),
        (["--run", str(tmp_path / "empty")], "it must be the folder of a run, with weights in it"),
        (
            ["--run", str(dense)],
            f"run is {dense}, whose model has routing 'none' and so no table of timesteps and",
        ),
        (["--run", str(masks)], "whose model has routing 'dtr' and so no table of timesteps"),
        (["--output", str(tmp_path / "file")], "it is a file and no folder"),
        (["--weights", "model"], "a saved pipeline; it has no other weights to choose"),
    ]
    for arguments, message in cases:
        monkeypatch.setattr(sys, "argv", ["inspect_routing.py", *arguments])
        with pytest.raises(SystemExit, match="error: ") as error:
            inspect_routing.main()
        assert message in str(error.value)
    assert not list(tmp_path.glob("**/routing*"))


def test_a_full_disk_leaves_the_numbers_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "routing.json"
    path.write_text("before")

    def full(draft: Path, content: bytes) -> None:
        draft.write_text(content[:10].decode())
        raise OSError("no space left")

    found = inspection(HAND_MADE, 2)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        found.write_json(path)
    assert [file.name for file in tmp_path.iterdir()] == ["routing.json"]
    assert path.read_bytes() == b"before"


@pytest.mark.slow
def test_a_trained_run_has_what_the_program_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_module.PRESETS, "tiny/4", model_module.Preset(24, 2, 3, 4))
    small = {"model": "tiny/4", "steps": 4, "batch_size": 16, "generated": 0, "output": tmp_path}
    for settings in ({}, {"objective": "flow", "learn_sigma": False}):
        run_training(TrainConfig(name=str(len(settings)), **small, **settings))
        folder = tmp_path / str(len(settings))
        before = {name: (folder / name).read_bytes() for name in FILES}
        assert json.loads(before["routing.json"])["continuous"] == bool(settings)
        assert (folder / "report.html").read_text().count("Affinity of timesteps") >= 1
        inspect_routing.run(InspectConfig(folder))
        assert {name: (folder / name).read_bytes() for name in FILES} == before


@pytest.mark.slow
def test_a_large_model(tmp_path: Path) -> None:
    found = inspect_model(random_model(depth=28, num_experts=8, num_timesteps=1000))
    for path in routing_plots.write_routing(tmp_path, found):
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert max(picture.size) < 2200
                assert np.asarray(picture.convert("L")).std() > 20
    assert len(json.loads((tmp_path / "routing.json").read_text())["gates"]) == 28


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    """A new user types the command without settings, in an empty folder."""
    script = str(ROOT / "models" / "inspect_routing.py")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert {path.name for path in (tmp_path / "routing").iterdir()} == FILES
    assert "Each of 6 blocks chooses 2 of its 3 experts" in done.stdout
    assert done.stderr == ""
