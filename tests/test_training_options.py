"""Objectives, samplers, weightings, averages and pictures in whole runs, which go on to the bit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import train_switch_dit
import upcycle
from helpers import top_k_of
from safetensors.torch import load_file
from switch_dit.checkpoint import load_checkpoint, save_checkpoint
from switch_dit.data import load_data
from switch_dit.model import PRESETS, Preset, create_model
from switch_dit.recipes import RECIPES
from switch_dit.settings import TrainConfig, settings_of
from switch_dit.snapshots import load_snapshots
from switch_dit.systems import SYSTEMS
from switch_dit.timesteps import CurriculumState
from switch_dit.trainer import Trainer
from upcycle import UpcycleConfig

SMALL = {"steps": 8, "batch_size": 8, "log_every": 2, "generated": 0, "checkpoint_every": 3}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny/4", Preset(24, 2, 3, 4))


def config(output: Path, **settings) -> TrainConfig:
    return TrainConfig(**{**SMALL, "output": output, "name": "run", **settings})


SLOW = pytest.mark.slow
TEN_SAMPLES = {"generated": 10, "sample_steps": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {"timesteps": "curriculum", "curriculum_clusters": 4, "curriculum_patience": 1},
        pytest.param(
            {"objective": "v", "weighting": "min_snr_5", "generated": 10, "sample_steps": 2}, marks=SLOW
        ),
        pytest.param(
            {"objective": "flow", "timesteps": "logit-normal", "generated": 10, "sample_steps": 2}, marks=SLOW
        ),
        pytest.param(
            {"objective": "flow", "timesteps": "curriculum", "weighting": "uw", "curriculum_patience": 1},
            marks=SLOW,
        ),
        pytest.param({"weighting": "uw", "max_grad_norm": 0.1, "power_averages": (0.05, 0.1)}, marks=SLOW),
        pytest.param({"precision": "float16", "max_grad_norm": 1.0, "accumulate": 2}, marks=SLOW),
        pytest.param(
            {"pictures_every": 4, "evaluate_every": 2, "generated": 10, "sample_steps": 2}, marks=SLOW
        ),
        pytest.param({"checkpoint_activations": True, "lr_decay": "inverse-sqrt"}, marks=SLOW),
        *(
            pytest.param(
                {"routing": routing, "num_experts": 4, "top_k": top_k_of(routing), **TEN_SAMPLES},
                marks=SLOW,
            )
            for routing in SYSTEMS
        ),
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()),
)
def test_a_run_goes_on_to_the_bit(settings: dict, tmp_path: Path) -> None:
    """Stopped by force after a step that no checkpoint holds, a run ends as one that was not stopped."""
    original = Trainer.step

    def stopping(self, number, *batch):
        if number == 5:
            raise KeyboardInterrupt  # the process is gone
        return original(self, number, *batch)

    train_switch_dit.run(config(tmp_path / "calm", **settings))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Trainer, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_switch_dit.run(config(tmp_path / "stopped", **settings))
    train_switch_dit.run(config(tmp_path / "stopped", **settings))
    calm, stopped = (tmp_path / name / "run" for name in ("calm", "stopped"))
    files = [path.relative_to(calm) for path in calm.rglob("*.safetensors") if "step-3" not in str(path)]
    assert len(files) >= 4
    for file in files:
        one, other = load_file(calm / file), load_file(stopped / file)
        for name, value in one.items():
            assert torch.equal(other[name], value), f"{file}: {name}"
    lines = [[json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
             for run in (calm, stopped)]  # fmt: skip
    measured = [run / "evaluations.jsonl" for run in (calm, stopped)]
    assert all(file.exists() == ("evaluate_every" in settings) for file in measured)
    if "evaluate_every" in settings:
        rows = [json.loads(line) for line in measured[0].read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4, 6, 8]
        assert measured[0].read_bytes() == measured[1].read_bytes()
        summary = json.loads((calm / "summary.json").read_text())
        assert all(summary[key] == value for key, value in rows[-1].items() if key != "step")
        assert "Samples during training" in (calm / "report.html").read_text()
    for one, other in zip(*lines, strict=True):
        assert {**one, "images_per_second": 0} == {**other, "images_per_second": 0}
    assert load_checkpoint(calm / "weights")[1].name == settings.get("objective", "eps")


@pytest.mark.parametrize("recomputed", [False, True])
def test_activations_are_kept_or_computed_again(recomputed: bool, tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, checkpoint_activations=recomputed), load_data("digits"))
    calls = []
    for number, block in enumerate(trainer.model.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    trainer.step(0, next(iter(trainer.batches()))[0])
    assert calls == [0, 1, *([1, 0] if recomputed else [])]


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another(tmp_path: Path) -> None:
    """An upcycled model continues where the dense one ended: the first loss is the same to the bit."""
    train_switch_dit.run(config(tmp_path, name="dense", routing="none"))
    dense = tmp_path / "dense" / "weights"
    upcycle.run(UpcycleConfig(tmp_path / "dense", tmp_path / "mixture"))
    first = {}
    for name, folder, routing in (
        ("dense", dense, "none"),
        ("switch", tmp_path / "mixture/weights", "switch"),
    ):
        trainer = Trainer(config(tmp_path, start_from=folder, routing=routing), load_data("digits"))
        state = load_file(folder / "ema.safetensors")
        assert all(torch.equal(trainer.ema.state_dict()[key], value) for key, value in state.items())
        first[name] = trainer.step(0, next(iter(trainer.batches()))[0])["mse"]
    assert torch.equal(first["dense"], first["switch"])
    for settings, message in (
        ({"routing": "dtr"}, "its routing is 'none' and that of this run 'dtr', by the setting routing"),
        ({"routing": "none", "model": "S/4"}, "its hidden_size is 24 .* by the setting model"),
        ({"routing": "none", "objective": "v"}, "by the setting learn_sigma"),
        ({"routing": "none", "schedule": "cosine"}, "its schedule is 'linear' and that of this run 'cosine'"),
        ({"routing": "none", "conditional": False, "guidance": 1.0}, "its num_classes is 10"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(config(tmp_path, start_from=dense, **settings), load_data("digits"))
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        Trainer(config(tmp_path, start_from=tmp_path), load_data("digits"))


@pytest.mark.slow
def test_a_run_takes_over_what_its_start_needs_and_goes_on_without_it(tmp_path: Path) -> None:
    """Weights of SiT's time and of another MLP ratio; their folder may go once there is a checkpoint."""
    process = {"name": "flow", "num_timesteps": 1000}
    settings = {"mlp_ratio": 2.0, "time_scale": -1e-3, "time_offset": 1.0, "learn_sigma": False}
    model = create_model("tiny/4", input_size=8, in_channels=1, num_classes=10, **settings)
    start = tmp_path / "start"
    save_checkpoint(start, model, model, {"model": model.settings, "objective": process})
    options = {"objective": "flow", "start_from": f"{start}/", "generated": 10, "sample_steps": 2}
    train_switch_dit.run(config(tmp_path, steps=4, **options))
    start.rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        train_switch_dit.run(config(tmp_path, steps=4, **{**options, "name": "other"}))
    train_switch_dit.run(config(tmp_path, steps=4, **options))
    found, _ = load_checkpoint(tmp_path / "run" / "weights")
    assert settings.items() <= found.settings.items()
    other = create_model(
        "tiny/4", input_size=8, in_channels=1, num_classes=10, num_timesteps=500, learn_sigma=False
    )
    save_checkpoint(
        start, other, other, {"model": other.settings, "objective": process | {"num_timesteps": 500}}
    )
    with pytest.raises(ValueError, match="its num_timesteps is 500 and that of this run 1000, as every run"):
        Trainer(config(tmp_path, start_from=start, objective="flow"), load_data("digits"))


def test_the_curriculum_follows_the_logged_losses(tmp_path: Path) -> None:
    settings = {"timesteps": "curriculum", "curriculum_clusters": 4, "curriculum_patience": 1, "steps": 12}
    train_switch_dit.run(config(tmp_path, **settings))
    rows = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    state = json.loads((tmp_path / "run" / "checkpoint" / "step-12" / "state.json").read_text())
    trainer = Trainer(config(tmp_path, **settings), load_data("digits"))
    expected = trainer.sampler.replay(row["mse"] for row in rows)
    assert CurriculumState.from_json(state["curriculum"]) == expected
    trainer.curriculum = CurriculumState(2)
    trainer._set_lowest()
    drawn = torch.cat([trainer.draw(number, (1,)).t for number in range(50)])
    assert drawn.min() >= 500
    assert drawn.min() < 600  # below the first stage's


@pytest.mark.slow
def test_snapshots_and_pictures(tmp_path: Path) -> None:
    train_switch_dit.run(config(tmp_path, power_averages=(0.1,), snapshot_every=3, pictures_every=4, steps=9))
    run = tmp_path / "run"
    assert [each.steps for each in load_snapshots(run / "averages")] == [3, 6, 9]
    names = {path.name for path in (run / "pictures").iterdir()}
    assert names == {f"step-{n}-{kind}.png" for n in (4, 8) for kind in ("samples", "routing", "loss")}
    page = (run / "report.html").read_text()
    assert all(f'alt="{kind} at step {step}"' in page for kind in ("samples", "routing") for step in (4, 8))


def test_accumulation_is_the_whole_batch(tmp_path: Path) -> None:
    """The gradients of the first step, from Adam's first moment, up to rounding."""
    found = []
    for parts in (1, 4):
        trainer = Trainer(config(tmp_path, accumulate=parts, batch_size=16), load_data("digits"))
        trainer.step(0, torch.arange(16))
        moments = {name: value for name, value in trainer.tensors().items() if "exp_avg." in name}
        found.append(torch.cat([value.flatten() for value in moments.values()]))
    assert found[0].norm() > 0
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


def test_dry_run_says_what_would_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_switch_dit.run(config(tmp_path, dry_run=True))
    said = capsys.readouterr().out
    assert "active" in said
    assert "GFLOP to train on an image" in said
    assert "1437 training images of digits" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    """What is given beside the recipe counts, and its settings fit together."""
    found = train_switch_dit.defaults_for(["--steps", "7", "--recipe", name])
    found.validate()
    settings = settings_of(found)
    for key, value in RECIPES[name].settings.items():
        assert settings[key] == value
    assert train_switch_dit.defaults_for([f"--recipe={name}"]) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp": True}, "fsdp is True; it needs several processes"),
        ({"accumulate": 3}, "batch_size is 8; it must be a multiple of 3"),
        ({"objective": "x"}, "objective is 'x'"),
        ({"objective": "flow", "timesteps": "speed"}, "name is 'speed'; flow has no noise schedule"),
        ({"objective": "flow", "weighting": "p2"}, "weighting is 'p2'; flow takes 'constant'"),
        ({"power_averages": (0.5,)}, "power_averages is 0.5"),
        ({"power_averages": (0.1, 0.1)}, "each width must stand there once"),
        ({"recipe": "none"}, "recipe is 'none'"),
        ({"track": "paper"}, "track is 'paper'"),
    ],
)
def test_what_does_not_fit_is_named(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        train_switch_dit.run(config(tmp_path, **settings))
    assert not (tmp_path / "run").exists()


def test_the_table_of_recipes() -> None:
    """models/README.md has the command of every recipe, and no other."""
    table = (Path(train_switch_dit.__file__).parent / "README.md").read_text()
    commands = re.findall(r"^\| `([^`]*--recipe [^`]*)` \| .* \| (.*) \|$", table, re.MULTILINE)
    assert [re.search(r"--recipe (\S+)", command)[1] for command, _ in commands] == list(RECIPES)
    for (_, result), recipe in zip(commands, RECIPES.values(), strict=True):
        assert result in recipe.result
