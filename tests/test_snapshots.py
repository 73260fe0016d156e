"""Snapshots of averages on disk, and the script that makes weights of any width from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import average_weights
import pytest
import sample_switch_dit
import torch
from average_weights import AverageConfig
from helpers import assert_close, random_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from sample_switch_dit import SampleConfig
from switch_dit import SwitchDiT, sample, snapshots
from switch_dit.averages import PowerAverage, Snapshot, power_weight
from switch_dit.averages import gamma_of as gamma
from switch_dit.checkpoint import load_checkpoint, save_checkpoint
from switch_dit.snapshots import load_snapshots, save_snapshot
from torch import Tensor

STEPS, EVERY, TRACKED = 200, 10, (0.05, 0.10)
WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.tensor(-1.5)}
ROOT = Path(__file__).parent.parent


def small_model() -> SwitchDiT:
    return random_model(hidden_size=12, depth=1, in_channels=4, learn_sigma=False)


def moved(model: SwitchDiT, generator: torch.Generator) -> None:
    """A training step, as far as averages can tell."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator) + 1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    """The folder of a run of 200 steps with snapshots every 10, and its weights after each step."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    model, generator = small_model(), torch.Generator().manual_seed(0)
    named = dict(model.named_parameters())
    tracked = [PowerAverage(named, width) for width in TRACKED]
    history = []
    for step in range(STEPS):
        moved(model, generator)
        history.append({name: p.detach().clone() for name, p in named.items()})
        for average in tracked:
            average.update(named, step)
            if (step + 1) % EVERY == 0:
                save_snapshot(folder / "averages", average.snapshot(step + 1))
    settings = {"model": model.settings, "objective": {"name": "flow"}}
    save_checkpoint(folder / "weights", model, model, settings)
    return folder, history


def flat(model: SwitchDiT) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def brute_force(history: list[dict[str, Tensor]], sigma_rel: float, model: SwitchDiT) -> Tensor:
    """The average of that width over the weights of every step, in float64."""
    total: dict[str, Tensor] = {}
    for step, weights in enumerate(history):
        share = power_weight(step, gamma(sigma_rel))
        for name, value in weights.items():
            old = total.get(name, torch.zeros_like(value, dtype=torch.float64))
            total[name] = (1 - share) * old + share * value.double()
    return torch.cat([total[name].flatten() for name, p in model.named_parameters() if p.requires_grad])


@pytest.mark.parametrize("sigma_rel", TRACKED)
@pytest.mark.parametrize("steps", [None, 100])
def test_a_tracked_width_comes_back(trained, sigma_rel: float, steps: int | None) -> None:
    folder, history = trained
    written = average_weights.run(AverageConfig(folder, sigma_rel, steps))
    assert written.name == f"weights-sigma{sigma_rel:.3f}" + ("" if steps is None else "-step100")
    model, _ = load_checkpoint(written)
    assert_close("weights", flat(model), brute_force(history[: steps or STEPS], sigma_rel, model), 1e-5)


@pytest.mark.parametrize("sigma_rel", [0.07, 0.15])
def test_another_width_comes_near(trained, sigma_rel: float) -> None:
    """To the average over all steps, and ten times as near as the tracked ones are."""
    folder, history = trained
    model, objective = load_checkpoint(average_weights.run(AverageConfig(folder, sigma_rel)))
    expected = brute_force(history, sigma_rel, model)
    tracked = [brute_force(history, width, model) for width in TRACKED]
    error = float((flat(model) - expected).norm())
    assert error < 0.1 * min(float((each - expected).norm()) for each in tracked)
    assert objective.name == "flow"


def test_what_is_no_average_stays(trained) -> None:
    """Constants are the model's to the bit, and the folder holds what sampling needs and no more."""
    folder, _ = trained
    written = average_weights.run(AverageConfig(folder, 0.08))
    assert {path.name for path in written.iterdir()} == {"config.json", "ema.safetensors"}
    state, before = load_file(written / "ema.safetensors"), load_file(folder / "weights" / "ema.safetensors")
    assert torch.equal(state["pos_embed"], before["pos_embed"])
    assert all(value.dtype == torch.float32 for value in state.values())
    assert (written / "config.json").read_text() == (folder / "weights" / "config.json").read_text()


def test_samples_of_an_average(
    trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that the script prints draws from the average, not from the weights."""
    folder, _ = trained
    written = average_weights.run(AverageConfig(folder, 0.07))
    assert f"--run {folder} --weights-folder {written.name}" in capsys.readouterr().out
    drawn = {}
    monkeypatch.setattr(
        sample_switch_dit,
        "plot_samples",
        lambda path, images, labels, columns, title: drawn.update({title: images}),
    )
    settings = {"labels": (1,), "count": 2, "steps": 2}
    for name in (written.name, "weights"):
        sample_switch_dit.run(SampleConfig(folder, weights_folder=name, **settings))
    average, last = drawn.values()
    assert not torch.equal(average, last)
    model, objective = load_checkpoint(written)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    expected = sample(model, objective, torch.tensor([1, 1]), steps=2, generator=generators)
    assert torch.equal(average, expected)
    assert list(drawn) == [
        f"small{where}: FlowMatchEulerDiscrete, 2 steps, guidance 1.5" for where in (f"/{written.name}", "")
    ]
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
        sample_switch_dit.run(SampleConfig(folder, weights_folder=written.name, weights="model", **settings))


def test_a_round_trip(tmp_path: Path) -> None:
    made = [Snapshot(steps, width, WEIGHTS) for steps in (9, 10, 100) for width in (0.05, 0.1, 0.0501)]
    for each in reversed(made):
        save_snapshot(str(tmp_path / "new" / "averages"), each)
    names = {path.name for path in (tmp_path / "new" / "averages").iterdir()}
    assert len(names) == 9
    assert {"sigma0.050-step9.safetensors", "sigma0.0501-step9.safetensors"} < names
    found = load_snapshots(tmp_path / "new" / "averages")
    order = [(9, 0.05), (9, 0.0501), (9, 0.1), (10, 0.05)]
    assert [(each.steps, each.sigma_rel) for each in found[:4]] == order
    for each in found:
        assert each.parameters.keys() == WEIGHTS.keys()
        assert all(torch.equal(each.parameters[name], value) for name, value in WEIGHTS.items())
        with pytest.raises(KeyError):
            each.parameters["d"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_in_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    double = {name: value.double() / 3 for name, value in WEIGHTS.items()}
    save_snapshot(tmp_path, Snapshot(9, 0.05, double), dtype)
    (found,) = load_snapshots(tmp_path)
    assert all(torch.equal(found.parameters[name], value.to(dtype)) for name, value in double.items())
    save_snapshot(tmp_path, Snapshot(9, 0.05, double))
    (found,) = load_snapshots(tmp_path)
    assert all(torch.equal(found.parameters[name], value) for name, value in double.items())


def test_tensors_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read when a folder is opened, and one tensor of every snapshot before the next."""
    for steps in (5, 10):
        save_snapshot(tmp_path, Snapshot(steps, 0.05, WEIGHTS))
    read = []

    class Watched:
        def __init__(self, path: Path, framework: str) -> None:
            self.path, self.file = path, safe_open(path, framework)

        def get_tensor(self, name: str) -> Tensor:
            read.append((name, self.path.name))
            return self.file.get_tensor(name)

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    monkeypatch.setattr(snapshots, "safe_open", Watched)
    found = load_snapshots(tmp_path)
    assert read == []
    PowerAverage.reconstruct(found, 0.05)
    assert {path for _, path in read} == {"sigma0.050-step5.safetensors", "sigma0.050-step10.safetensors"}
    order = list(dict.fromkeys(name for name, _ in read))
    assert [name for name, _ in read] == sorted((name for name, _ in read), key=order.index)


@pytest.mark.parametrize("error", [SafetensorError("No space left"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    save_snapshot(tmp_path, Snapshot(9, 0.05, WEIGHTS))

    def fail(tensors, path, metadata) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(snapshots, "save_file", fail)
    expected = OSError if isinstance(error, SafetensorError) else KeyboardInterrupt
    with pytest.raises(expected):
        save_snapshot(tmp_path, Snapshot(9, 0.05, {"a": torch.zeros(2, 3), "b.c": torch.zeros(())}))
    assert [path.name for path in tmp_path.iterdir()] == ["sigma0.050-step9.safetensors"]
    (found,) = load_snapshots(tmp_path)
    assert torch.equal(found.parameters["a"], WEIGHTS["a"])


def test_the_draft_of_a_killed_process_is_no_snapshot(tmp_path: Path) -> None:
    save_snapshot(tmp_path, Snapshot(9, 0.05, WEIGHTS))
    (tmp_path / "sigma0.050-step18.safetensors.incomplete").write_bytes(b"half")
    assert [each.steps for each in load_snapshots(tmp_path)] == [9]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def with_metadata(path: Path, **metadata: str) -> None:
    save_file(WEIGHTS, path, metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"step9.safetensors is broken or no snapshot \(SafetensorError"),
        (lambda path: path.write_bytes(b""), "step9.safetensors is broken or no snapshot"),
        (with_metadata, "step9.safetensors is no snapshot: its metadata lacks steps or sigma_rel"),
        (lambda path: with_metadata(path, steps="9", sigma_rel="wide"), "its metadata lacks steps or sigma"),
        (lambda path: with_metadata(path, steps="9", sigma_rel="nan"), "holds the width nan after 9 steps"),
        (
            lambda path: with_metadata(path, steps="8", sigma_rel="0.05"),
            "step9.safetensors holds the width 0.05 after 8 steps; its name must be sigma0.050-step8.safe",
        ),
        (lambda path: path.rename(path.with_name("a.safetensors")), "a.safetensors holds the width 0.05"),
        (lambda path: (path.parent / "notes.txt").write_text("x"), "notes.txt is broken or no snapshot"),
        (lambda path: (path.parent / "folder").mkdir(), "folder is broken or no snapshot"),
        (
            lambda path: save_snapshot(path.parent, Snapshot(18, 0.05, {**WEIGHTS, "a": torch.zeros(3, 3)})),
            "step9.safetensors is of another model than .*step18.safetensors: a differs",
        ),
        (
            lambda path: save_snapshot(path.parent, Snapshot(18, 0.05, {"a": WEIGHTS["a"]})),
            "step9.safetensors is of another model than .*step18.safetensors: b.c differs",
        ),
    ],
)  # fmt: skip
def test_files_that_are_no_snapshots(tmp_path: Path, damage, message: str) -> None:
    damage(save_snapshot(tmp_path, Snapshot(9, 0.05, WEIGHTS)))
    with pytest.raises(ValueError, match=message):
        load_snapshots(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.tensor(torch.nan), "b.c is not finite"), (torch.tensor(1), "b.c is torch.int64")],
)
def test_tensors_that_are_no_weights(tmp_path: Path, value: Tensor, message: str) -> None:
    path = save_snapshot(tmp_path, Snapshot(9, 0.05, {**WEIGHTS, "b.c": value}))
    (found,) = load_snapshots(tmp_path)
    with pytest.raises(ValueError, match=rf"{path.name} is broken: {message}"):
        PowerAverage.reconstruct([found], 0.05)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="snapshot is a dict; it must be a Snapshot"):
        save_snapshot(tmp_path, WEIGHTS)
    with pytest.raises(TypeError, match=r"dtype is torch.int64; it must be a floating type or None"):
        save_snapshot(tmp_path, Snapshot(9, 0.05, WEIGHTS), torch.int64)
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"holds no snapshots; .* --power-averages 0.05 0.10"):
            load_snapshots(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_rel": 0.3}, "sigma_rel is 0.3; it must be between"),
        ({"sigma_rel": 0.07, "steps": 0}, "steps is 0; it must be at least 1"),
        ({"sigma_rel": 0.07, "steps": 201}, "steps is 201; it must be at most 200, the time of the latest"),
    ],
)
def test_averages_that_cannot_be_had(trained, settings: dict[str, float], message: str) -> None:
    folder, _ = trained
    with pytest.raises(ValueError, match=message):
        average_weights.run(AverageConfig(folder, **settings))
    assert not list(folder.glob("weights-sigma0.3*")) + list(folder.glob("weights-*-step20*"))


def test_snapshots_of_another_model(trained, tmp_path: Path) -> None:
    folder, _ = trained
    for name in ("config.json", "ema.safetensors"):
        (tmp_path / "weights").mkdir(exist_ok=True)
        (tmp_path / "weights" / name).write_bytes((folder / "weights" / name).read_bytes())
    other = random_model(hidden_size=24, depth=1, in_channels=4, learn_sigma=False)
    average = PowerAverage(dict(other.named_parameters()))
    save_snapshot(tmp_path / "averages", average.snapshot(9))
    with pytest.raises(ValueError, match=r"the snapshots are of another model than .*weights: \S+ differs"):
        average_weights.run(AverageConfig(tmp_path, 0.05))
    assert json.loads((tmp_path / "weights" / "config.json").read_text())["objective"] == {"name": "flow"}


@pytest.mark.slow
def test_the_command(trained, tmp_path: Path) -> None:
    folder, _ = trained
    script = [sys.executable, str(ROOT / "models" / "average_weights.py"), "--run"]
    made = subprocess.run([*script, folder, "--sigma-rel", "0.06"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert (folder / "weights-sigma0.060" / "ema.safetensors").exists()
    failed = subprocess.run([*script, tmp_path, "--sigma-rel", "0.06"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: {tmp_path}/averages holds no snapshots; a training run leaves")
