"""A run that is interrupted goes on, and ends the same to the bit."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from switch_dit.data import load_data
from switch_dit.loop import Interrupted
from switch_dit.resume import Checkpoints, locked
from switch_dit.settings import TrainConfig, run_folder
from switch_dit.trainer import Trainer
from train_switch_dit import run as run_training

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3.5), "c": torch.tensor([7])}


def config(output: Path, **settings) -> TrainConfig:
    defaults = {"steps": 9, "batch_size": 8, "log_every": 4, "generated": 0, "checkpoint_every": 3}
    return TrainConfig(**{**defaults, "output": output, **settings})


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestCheckpoints:
    def test_what_is_saved_comes_back(self, tmp_path: Path) -> None:
        checkpoints = Checkpoints(tmp_path, keep=2)
        for step in (3, 20, 100):
            checkpoints.save(step, {name: t + step for name, t in TENSORS.items()}, {"more": [step]})
        assert kept(tmp_path) == ["step-100", "step-20"]
        assert checkpoints.latest() == {"step": 100, "more": [100]}
        found = {name: torch.zeros_like(t) for name, t in TENSORS.items()}
        checkpoints.load(100, found)
        for name, tensor in TENSORS.items():
            assert torch.equal(found[name], tensor + 100)
            assert found[name].dtype == tensor.dtype

    def test_no_pickle(self, tmp_path: Path) -> None:
        Checkpoints(tmp_path).save(1, TENSORS, {})
        names = {Path(name).suffix for name in kept(tmp_path / "step-1")}
        assert names == {".safetensors", ".json"}

    @pytest.mark.parametrize("change", ["flip", "cut", "remove", "add", "no sums"])
    def test_a_damaged_one_is_named_and_the_one_before_used(
        self, change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        checkpoints = Checkpoints(tmp_path)
        for step in (1, 2):
            checkpoints.save(step, TENSORS, {})
        for path in sorted((tmp_path / "step-2").iterdir()):
            before = path.read_bytes()
            if change == "flip":
                path.write_bytes(before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
            elif change == "cut":
                path.write_bytes(before[:-5])
            elif change == "add":
                (tmp_path / "step-2" / "more").touch()
            elif change == "remove" or path.name == "checksums.json":
                path.unlink()
            if change != "no sums" or path.name == "checksums.json":
                assert checkpoints.latest() == {"step": 1}, path.name
                assert "step-2 is damaged" in capsys.readouterr().err
            (tmp_path / "step-2" / "more").unlink(missing_ok=True)
            path.write_bytes(before)
            assert checkpoints.latest() == {"step": 2}

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, TENSORS, {})
        real = os.fsync

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(2, TENSORS, {})
        monkeypatch.setattr(os, "fsync", real)
        assert kept(tmp_path) == ["step-1"]
        assert checkpoints.latest() == {"step": 1}

    def test_one_alone_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="keep is 1; it must be at least 2"):
            Checkpoints(tmp_path, keep=1)


def test_any_step_can_be_replayed_alone(tmp_path: Path) -> None:
    """The randomness of a step does not depend on the steps before it."""
    images = load_data("digits")
    one, other = (Trainer(config(tmp_path), images) for _ in range(2))
    chosen = torch.arange(8)
    for number in range(3):
        one.step(number, chosen)
    one.number.fill_(3)
    other.number.fill_(3)
    torch.rand(5)  # no generator takes part
    for a, b in zip(one.draw(one.number, (1, 8, 8)), other.draw(3, (1, 8, 8)), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.slow
def test_signals_save_and_say_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After SIGTERM and after SIGINT, at steps that are no multiple of anything."""
    run_training(config(tmp_path, name="calm"))
    original = Trainer.step

    def stopping(self, number, *batch):
        found = original(self, number, *batch)
        if number in (1, 6) and os.environ.get("STOPPED") != str(number):
            monkeypatch.setenv("STOPPED", str(number))
            os.kill(os.getpid(), signal.SIGTERM if number == 1 else signal.SIGINT)
        return found

    monkeypatch.setattr(Trainer, "step", stopping)
    for name, done in (("SIGTERM", 2), ("SIGINT", 7)):
        words = f"{name} stopped the run after {done} of 9 steps; the same command goes on from step {done}"
        with pytest.raises(SystemExit, match=words):
            run_training(config(tmp_path, name="run"))
    run_training(config(tmp_path, name="run"))
    (tmp_path / "calm").rename(tmp_path / "first")
    for name in ("model", "ema"):
        files = [tmp_path / run / "weights" / f"{name}.safetensors" for run in ("first", "run")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_a_changed_setting_is_named(tmp_path: Path) -> None:
    run_training(config(tmp_path, name="run"))
    with pytest.raises(ValueError, match=r"lr is 0\.1, and the run in .*run has 0\.004; give it the same"):
        run_training(config(tmp_path, name="run", lr=0.1))
    run_training(config(tmp_path, name="run", sample_steps=7))  # does not matter to the training
    assert run_folder(config(tmp_path)) == tmp_path / "digits"
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match=r"name is 'taken'; .*taken exists and holds no run"):
        run_folder(config(tmp_path, name="taken"))


@pytest.mark.slow
def test_other_contents_of_the_same_name_are_refused(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8)
    labels = np.arange(60) % 3
    data = tmp_path / "mine.npz"
    np.savez(data, images=images, labels=labels)
    run_training(config(tmp_path, name="run", data=str(data)))
    np.savez(data, images=255 - images, labels=labels)
    with pytest.raises(
        ValueError, match=r"data is '.*mine.npz'; it is not what the run in .* was trained on"
    ):
        run_training(config(tmp_path, name="run", data=str(data)))


@pytest.mark.slow
@pytest.mark.parametrize("data", ["npz", "images"])
def test_flips_and_sets_on_disk_go_on_too(data: str, tmp_path: Path) -> None:
    """In three parts as at once, from memory and from a folder of pictures."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8)
    if data == "npz":
        name = str(tmp_path / "mine.npz")
        np.savez(name, images=pixels, labels=np.arange(60) % 3)
    else:
        name = f"images:{tmp_path / 'pictures'}"
        for number, picture in enumerate(pixels):
            folder = tmp_path / "pictures" / str(number % 3)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).convert("RGB").save(folder / f"{number}.png")
    settings = {"data": name, "flip": True, "image_size": 8 if data == "images" else 0, "steps": 6}
    found = []
    for run, stops in (("calm", []), ("parts", [2, 4])):
        for stop in stops:
            with pytest.MonkeyPatch.context() as monkeypatch:
                original = Trainer.step

                def stopping(self, number, *batch, stop=stop, original=original):
                    if number == stop:
                        raise KeyboardInterrupt  # the process is gone
                    return original(self, number, *batch)

                monkeypatch.setattr(Trainer, "step", stopping)
                with pytest.raises(KeyboardInterrupt):
                    run_training(config(tmp_path / run, checkpoint_every=1, **settings, name="run"))
        run_training(config(tmp_path / run, checkpoint_every=1, **settings, name="run"))
        found.append((tmp_path / run / "run" / "weights" / "ema.safetensors").read_bytes())
    assert found[0] == found[1]


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(ValueError, match="is in use: another process trains there"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass


@pytest.mark.slow
def test_a_run_survives_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Checkpoints.save

    def full(self, step, tensors, state):
        if step == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, step, tensors, state)

    monkeypatch.setattr(Checkpoints, "save", full)
    run_training(config(tmp_path, name="run"))
    assert kept(tmp_path / "run" / "checkpoint") == ["step-3", "step-9"]
    assert "no checkpoint at step 6: [Errno 28] No space left on device" in capsys.readouterr().out


@pytest.mark.slow
def test_a_line_that_was_cut_off(tmp_path: Path) -> None:
    """stats.jsonl is cut to what the checkpoint knows, and has every line once."""
    run_training(config(tmp_path, name="run", steps=9, log_every=2))
    stats = tmp_path / "run" / "stats.jsonl"
    expected = [json.loads(line)["loss"] for line in stats.read_text().splitlines()]
    stats.write_text(stats.read_text() + '{"step": 10, "lo')
    run_training(config(tmp_path, name="run", steps=9, log_every=2))
    assert [json.loads(line)["loss"] for line in stats.read_text().splitlines()] == expected


def test_interrupted_is_not_an_error_of_the_user() -> None:
    assert not issubclass(Interrupted, (ValueError, OSError))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_again_and_again(processes: int) -> None:
    """SIGKILL and SIGTERM at random moments, half of them in a save: `make kill-test` is the long form."""
    seed = str(int.from_bytes(os.urandom(2), "little"))
    command = [sys.executable, str(Path(__file__).parent / "kill_run.py"), "--kills", "12", "--seed", seed]
    command += ["--processes", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "every run ended the same to the bit" in done.stdout
