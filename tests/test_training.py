"""The main job on a model of a few thousand weights: what it writes, that it repeats, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_switch_dit
from helpers import assert_close, random_model
from PIL import Image
from safetensors.torch import load_file
from sample_switch_dit import SampleConfig
from sample_switch_dit import run as run_sampling
from switch_dit import checkpoint
from switch_dit import model as model_module
from switch_dit.checkpoint import load_checkpoint, save_checkpoint
from switch_dit.data import batches, load_data
from switch_dit.devices import resolve_device, resolve_precision
from switch_dit.metrics import Classifier, evaluate, frechet_distance
from switch_dit.settings import TrainConfig
from switch_dit.trainer import Trainer
from train_switch_dit import run as run_training

from switch_moe.torch_compat import cpu_has

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_module.PRESETS, "tiny/4", model_module.Preset(24, 2, 3, 4))


def config(output: Path, **settings) -> TrainConfig:
    defaults = {
        "model": "tiny/4",
        "steps": 12,
        "batch_size": 16,
        "log_every": 4,
        "generated": 100,
        "sample_steps": 2,
    }
    return TrainConfig(**{**defaults, "output": output, **settings})


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "stats.jsonl").read_text().splitlines()]


def test_a_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run_training(config(tmp_path))
    run = tmp_path / "digits"
    assert {path.name for path in run.iterdir()} == {
        "config.json", "stats.jsonl", "samples.png", "loss.png", "routing.png", "report.html", "checkpoint",
        "weights", "summary.json", "lock", "routing-affinity.png", "routing-distance.png",
        "routing-entropy.png", "routing.json",
    }  # fmt: skip
    rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert all({"loss", "mse", "vb", "prior", "lr", "images_per_second"} <= set(row) for row in rows)
    for row in rows:
        assert row["loss"] == pytest.approx(row["mse"] + row["vb"] + row["prior"], rel=1e-4)
    for picture in ("samples.png", "loss.png", "routing.png"):
        pixels = np.asarray(Image.open(run / picture).convert("L"))
        assert pixels.std() > 5, picture
    assert json.loads((run / "config.json").read_text())["steps"] == 12
    assert 0 <= summary["conditional_accuracy"] <= 1
    assert summary["classifier_accuracy"] > 0.95
    printed = capsys.readouterr().out
    assert str(run) in printed
    for word in ("conditional_accuracy", "frechet_floor", "samples.png", "mse"):
        assert word in printed

    assert set(load_file(run / "weights" / "ema.safetensors")) == set(
        load_file(run / "weights" / "model.safetensors")
    )
    path = run_sampling(SampleConfig(run=run, labels=(3, 5), count=4, steps=2, seed=1))
    again = run_sampling(SampleConfig(run=run, labels=(3, 5), count=4, steps=2, seed=1))
    assert path != again
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(again)))


@pytest.mark.slow
def test_the_same_seed_gives_bitwise_the_same_losses(tmp_path: Path) -> None:
    for _ in range(2):
        run_training(config(tmp_path, generated=0, resume=False))
    run_training(config(tmp_path, generated=0, seed=1, name="other"))
    assert losses(tmp_path / "digits") == losses(tmp_path / "digits-2")
    assert losses(tmp_path / "digits") != losses(tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"routing": "dtr"}, {"routing": "none"}, {"learn_sigma": False},
                                      {"conditional": False, "guidance": 1.0}, {"precision": "bfloat16"},
                                      {"weighting": "min_snr_5", "schedule": "cosine"}])  # fmt: skip
def test_variants(tmp_path: Path, settings: dict) -> None:
    run_training(config(tmp_path, **settings))
    assert all(np.isfinite(losses(tmp_path / "digits")))
    assert (tmp_path / "digits" / "samples.png").exists()
    assert (tmp_path / "digits" / "routing.png").exists() == (settings.get("routing") not in ("dtr", "none"))


def test_it_learns(tmp_path: Path) -> None:
    run_training(config(tmp_path, steps=150, batch_size=64, lr=5e-3, log_every=10, generated=0))
    found = losses(tmp_path / "digits")
    assert found[-1] < 0.5 * found[0]


@pytest.mark.slow
def test_compiled_training_is_the_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_module.PRESETS, "tiny/4", model_module.Preset(24, 1, 3, 4))
    images = load_data("digits")
    terms = []
    for compiled in (False, True):
        trainer = Trainer(config(tmp_path, compile=compiled, label_dropout=0.0, guidance=1.0), images)
        for number in range(2):
            torch.manual_seed(number)
            out = trainer.step(number, torch.arange(16) + number)
        terms.append(torch.stack([out["mse"], out["vb"]]))
    assert_close("losses", terms[1], terms[0], 1e-4)


def test_moving_average_follows_its_recurrence(tmp_path: Path) -> None:
    """The first weights replace the average, then its decay rises to ema_decay."""
    trainer = Trainer(config(tmp_path, ema_decay=0.15), load_data("digits"))
    expected = None
    for number, chosen in zip(range(4), batches(1437, 16, 0), strict=False):
        trainer.step(number, chosen)
        decay = [0, 1 / 10, 0.15, 0.15][number]
        now = [p.detach().double() for p in trainer.model.parameters()]
        expected = now if number == 0 else [decay * e + (1 - decay) * n for e, n in zip(expected, now)]  # noqa: B905
    for name, average, e in zip(
        dict(trainer.ema.named_parameters()), trainer.ema.parameters(), expected, strict=True
    ):
        assert_close(name, average, e, 1e-5)


def test_prior_every_refreshes_the_matching_every_so_many_steps(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, prior_every=3), load_data("digits"))
    calls = []
    match = trainer.model.prior.match
    trainer.model.prior.match = lambda selected, **ties: calls.append(number) or match(selected, **ties)
    for number, chosen in zip(range(7), batches(1437, 16, 0), strict=False):
        assert float(trainer.step(number, chosen)["prior"]) > 0
    assert calls == [0, 3, 6]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graphed_step_is_the_eager_step(tmp_path: Path) -> None:
    rows = {}
    for graphed in (False, True):
        run = config(
            tmp_path, name=f"{graphed}", generated=0, cuda_graph=graphed, prior_every=2, device="cuda"
        )
        run_training(run)
        rows[graphed] = torch.tensor(losses(tmp_path / f"{graphed}"))
    assert_close("losses", rows[True], rows[False], 1e-2 if torch.cuda.is_bf16_supported() else 1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cuda_graph": True}, "cuda_graph is True; it needs a GPU"),
        ({"prior_every": 0}, "prior_every is 0; it must be at least 1"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"lr": -1.0}, "lr is -1.0; it must be a positive finite number"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"batch_size": 5000}, "batch_size is 5000; digits has 1437 training images"),
        ({"top_k": 4}, r"top_k is 4; it must be between 1 and the number of experts, 3"),
        ({"model": "M/2"}, "model is 'M/2'; it must be one of tiny/2"),
        ({"model": "tiny/16"}, "model is 'tiny/16'"),
        ({"weighting": "snr"}, "weighting is 'snr'; it must be constant, p2 or min_snr"),
        ({"data": "cats"}, "data is 'cats'; it must be digits, mnist-5k, .* or the path of an .npz file"),
        ({"data": "images:"}, "data is 'images:'; after the colon comes a folder"),
        ({"workers": -1}, "workers is -1; it must be at least 0"),
        ({"unreadable": "warn"}, "unreadable is 'warn'; it must be"),
        ({"image_size": 16}, "image_size is 16; digits is 8x8 and is not resized"),
        ({"device": "cuda:77"}, "device is 'cuda:77'; torch cannot use it here"),
        ({"label_dropout": 1.0}, r"label_dropout is 1.0; it must be in \[0, 1\)"),
        ({"label_dropout": 0.0}, "label_dropout is 0, so there is no null label"),
        ({"name": "a/b"}, "name is 'a/b'; it must be a folder name"),
        ({"name": "taken", "resume": False}, "name is 'taken'; .*exists, choose another"),
        ({"generated": 1}, "generated is 1; it must be 0, or at least 10"),
        ({"evaluate_every": 5, "generated": 0}, "evaluate_every is 5; it measures samples of classes"),
        ({"seed": 2**40}, "seed is 1099511627776; it must be at most 4294967295"),
        ({"lr": float("inf")}, "lr is inf; it must be a positive finite number"),
        ({"output": Path(__file__)}, "output is .*test_training.py; it must be a folder"),
        (
            {"model": "tiny/8", "data": "OWN"},
            "model is 'tiny/8'; its patch size must divide the images' 4 pixels",
        ),
        ({"sample_steps": 1001}, r"sample_steps is 1001; it must be in \[1, 1000\]"),
    ],
)
def test_wrong_settings_fail_before_anything_is_written(tmp_path: Path, settings: dict, message: str) -> None:
    runs = tmp_path / "runs"
    (runs / "taken").mkdir(parents=True)
    if settings.get("data") == "OWN":
        own = tmp_path / "own.npz"
        np.savez(own, images=np.zeros((40, 4, 4), np.uint8), labels=np.arange(40) % 2)
        settings = {**settings, "data": str(own)}
    with pytest.raises(ValueError, match=message):
        run_training(config(**{"output": runs, **settings}))
    assert [path.name for path in runs.iterdir()] == ["taken"]


def test_a_diverging_loss_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"the loss is not finite at step \d+, images \[.*; a smaller"
    ):
        run_training(config(tmp_path, lr=1e30))
    assert "NaN" not in (tmp_path / "digits" / "stats.jsonl").read_text()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path), load_data("digits"))
    trainer.model.final_layer.linear.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"final_layer.linear.bias is not finite after training"):
        trainer.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no fonts")

    for name in ("plot_samples", "plot_loss", "write_routing"):
        monkeypatch.setattr(train_switch_dit, name, broken)
    summary = run_training(config(tmp_path, generated=100))
    written = json.loads((tmp_path / "digits" / "summary.json").read_text())
    assert written == summary
    assert "conditional_accuracy" in written
    assert capsys.readouterr().err.count("a picture could not be drawn (RuntimeError: no fonts)") == 3


def test_a_thousand_classes_are_a_hundred_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config(tmp_path), load_data("digits"))
    drawn = []
    monkeypatch.setattr(train_switch_dit, "plot_samples", lambda *a, **_: drawn.append(a))
    for classes, count in ((10, 100), (10, 1000), (1000, 10_000), (1000, 50)):
        trainer.images.num_classes = classes
        labels = torch.arange(count) % classes
        images = labels.float()[:, None, None, None].expand(-1, 1, 8, 8)
        train_switch_dit.draw_samples(trainer, tmp_path / "samples.png", images, labels, 9)
        _, shown, names = drawn.pop()[:3]
        assert len(shown) <= 100
        assert names is None or shown[:, 0, 0, 0].tolist() == names


@pytest.mark.slow
def test_commands(tmp_path: Path) -> None:
    environment = os.environ | {"MPLBACKEND": "nonsense"}  # pictures need no backend

    def command(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        full = [sys.executable, str(ROOT / "models" / script), *arguments]
        return subprocess.run(
            full, capture_output=True, text=True, cwd=tmp_path, check=False, env=environment
        )

    shown = command("train_switch_dit.py", "--help")
    assert shown.returncode == 0
    for setting in ("--routing", "--lr", "--compile", "--output"):
        assert setting in shown.stdout
    failed = command("train_switch_dit.py", "--steps", "-3")
    assert failed.returncode == 1
    assert failed.stderr.strip() == "error: steps is -3; it must be at least 1"
    failed = command("sample_switch_dit.py", "--run", "nowhere")
    assert failed.returncode == 1
    assert "nowhere/weights is no checkpoint: config.json is missing" in failed.stderr


class Interrupted(Exception):
    """The process was killed, as far as the files can tell."""


def interrupt_file_system(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Lets ``after`` steps of save_checkpoint on the file system through and stops the next one."""
    left = [after]

    def interruptible(step):
        def take(*args, **keywords):
            if left[0] == 0:
                raise Interrupted
            left[0] -= 1
            return step(*args, **keywords)

        return take

    for place, name in (
        (checkpoint, "save_file"), (shutil, "rmtree"),
        (Path, "mkdir"), (Path, "rename"), (Path, "write_text"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, interruptible(getattr(place, name)))


@pytest.mark.parametrize("interrupted_before", [False, True])
def test_an_interrupted_save_leaves_a_whole_checkpoint(tmp_path: Path, interrupted_before: bool) -> None:
    """Also where an earlier call was killed between its two renames, so that only ``.old`` is there."""
    model = random_model(depth=1)
    settings = {"model": model.settings, "objective": {"schedule": "cosine", "learn_sigma": True}}
    found = []
    for after in range(20):
        place = tmp_path / str(after) / "checkpoint"
        torch.nn.init.zeros_(model.blocks[0].moe.weight)
        save_checkpoint(place, model, model, settings)
        if interrupted_before:
            place.rename(place.with_name("checkpoint.old"))
        torch.nn.init.ones_(model.blocks[0].moe.weight)
        with pytest.MonkeyPatch.context() as monkeypatch:
            interrupt_file_system(monkeypatch, after)
            try:
                save_checkpoint(place, model, model, settings)
                complete = True
            except Interrupted:
                complete = False
        for weights in ("ema", "model"):
            loaded, objective = load_checkpoint(place, weights)
            weight = loaded.blocks[0].moe.weight
            assert torch.equal(weight, weight.flatten()[0].expand_as(weight))
            assert objective.num_timesteps == 1000
            assert not loaded.training
        found.append(weight.flatten()[0].item())
        save_checkpoint(place, model, model, settings)
        assert [path.name for path in place.parent.iterdir()] == ["checkpoint"]
        if complete:
            break
    assert complete
    assert found == sorted(found)  # the old one up to some step, then the new one
    assert found[0] == 0
    assert found[-1] == 1


def test_batches_follow_the_seed() -> None:
    stream = batches(50, 16, seed=3)
    first = [next(stream) for _ in range(7)]
    again = batches(50, 16, seed=3)
    assert all(torch.equal(batch, next(again)) for batch in first)
    assert not torch.equal(first[0], next(batches(50, 16, seed=4)))
    assert len(set(torch.cat(first[:3]).tolist())) == 48  # an epoch takes no image twice


def test_digits_split() -> None:
    images = load_data("digits")
    assert images.train.shape == (1437, 1, 8, 8)
    assert len(images.held_out) == 360
    assert images.train.dtype == torch.uint8
    scaled = images.scale(images.train)
    assert (scaled.min(), scaled.max(), scaled.dtype) == (-1, 1, torch.float32)
    assert images.held_out_labels.bincount().min() >= 34


def test_own_images(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    np.savez(path, images=rng.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8), labels=labels)
    images = load_data(str(path))
    assert images.train.shape == (32, 3, 4, 4)
    run_training(config(tmp_path / "runs", data=str(path), generated=20))
    assert (tmp_path / "runs" / "own" / "samples.png").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((4, 4, 4), np.uint8)}, "has no array labels"),
        ({"images": np.zeros((4, 4, 5), np.uint8), "labels": np.zeros(4, int)}, "must be square uint8"),
        ({"images": np.zeros((4, 4, 4)), "labels": np.zeros(4, int)}, "must be square uint8"),
        ({"images": np.zeros((4, 4, 4), np.uint8), "labels": np.zeros(5, int)}, "must be 4 integers"),
        (
            {"images": np.zeros((6, 4, 4), np.uint8), "labels": np.array([0, 0, 0, 0, 0, 2])},
            "class 1 0 times",
        ),
    ],
)
def test_own_images_errors(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_data(str(tmp_path / "own.npz"))


def test_frechet_distance() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4000, 5))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(20, rel=1e-6)
    assert frechet_distance(a, 3 * a - 2 * a.mean(0)) == pytest.approx(
        4 * np.cov(a, rowvar=False).trace(), rel=1e-6
    )


def test_metrics_tell_good_from_bad() -> None:
    images = load_data("digits")
    held_out = images.scale(images.held_out)
    good = evaluate(images, held_out, images.held_out_labels)
    assert good.conditional_accuracy == good.classifier_accuracy > 0.95
    assert good.frechet_distance == pytest.approx(0, abs=1e-6)
    mislabelled = evaluate(images, held_out, images.held_out_labels.roll(1))
    assert mislabelled.conditional_accuracy < 0.3
    noise = evaluate(images, torch.randn_like(held_out), images.held_out_labels)
    assert noise.frechet_distance > 10 * noise.frechet_floor


def test_classifier_repeats() -> None:
    images = load_data("digits")
    train, held_out = images.scale(images.train), images.scale(images.held_out)
    first, second = (Classifier(train, images.train_labels).features(held_out) for _ in range(2))
    assert np.array_equal(first, second)


def test_precision_and_device() -> None:
    cpu = torch.device("cpu")
    has_amx = cpu_has("amx_tile")
    assert resolve_precision("auto", cpu) == (torch.bfloat16 if has_amx else torch.float32)
    assert resolve_precision("bfloat16", cpu) == torch.bfloat16
    assert resolve_device("cpu") == cpu
