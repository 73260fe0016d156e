"""models/sample_switch_dit.py: grids, folders and .npz files that depend on seeds only and can be resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sample_switch_dit
import torch
from helpers import random_model
from PIL import Image
from sample_switch_dit import SHIPPED, SampleConfig, Store, run
from switch_dit.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model with 16 tokens, whose groups have 16 images."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    model = random_model()
    settings = {"model": model.settings, "objective": {"learn_sigma": True}}
    save_checkpoint(folder / "weights", model, model, settings)
    return folder


def settings(trained: Path, output: Path, **options) -> SampleConfig:
    return SampleConfig(trained, output=output, **{"images": 37, "steps": 2, "batch_size": 16, **options})


def pixels(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm-solver++", "unipc"])
def test_folders_and_npz_hold_the_same_images(trained: Path, tmp_path: Path, scheduler: str) -> None:
    """For any number of processes and any batch size."""
    options = {"scheduler": scheduler}
    folder = run(settings(trained, tmp_path / "images", **options))
    images = pixels(folder)
    assert len(images) == 37
    npz = run(settings(trained, tmp_path / "images.npz", batch_size=3, **options))
    with np.load(npz) as file:
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], images)
        assert file["arr_1"].tolist() == [i % 5 for i in range(37)]
    for rank in (1, 0):
        run(settings(trained, tmp_path / "ranks.npz", **options), rank, 2)
    with np.load(tmp_path / "ranks.npz") as file:
        assert np.array_equal(file["arr_0"], images)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(("parts", "incomplete"))]


def test_a_stopped_command_goes_on(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pixels(run(settings(trained, tmp_path / "whole")))
    for output in (tmp_path / "images", tmp_path / "images.npz"):
        write, written = Store.write, []

        def stop(store: Store, number: int, *arguments, write=write, written=written) -> None:
            if written:
                raise KeyboardInterrupt
            written.append(number)
            write(store, number, *arguments)

        monkeypatch.setattr(Store, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            run(settings(trained, output))
        drawn, draw = [], sample_switch_dit._draw
        monkeypatch.setattr(Store, "write", write)
        monkeypatch.setattr(
            sample_switch_dit, "_draw", lambda *a, draw=draw, drawn=drawn: drawn.append(a[3]) or draw(*a)
        )
        run(settings(trained, output))
        assert drawn == [16, 32]  # the first batch was there
        monkeypatch.setattr(sample_switch_dit, "_draw", draw)
    assert np.array_equal(pixels(tmp_path / "images"), whole)
    assert np.array_equal(np.load(tmp_path / "images.npz")["arr_0"], whole)
    (tmp_path / "images" / "000020.png").unlink()
    run(settings(trained, tmp_path / "images"))
    assert np.array_equal(pixels(tmp_path / "images"), whole)


def test_seeds_follow_each_other(trained: Path, tmp_path: Path) -> None:
    first = pixels(run(settings(trained, tmp_path / "a", images=16)))
    later = pixels(run(settings(trained, tmp_path / "b", images=6, seed=5)))
    assert np.array_equal(first[5:11], later)


def test_guidance_reaches_the_pipeline(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = random_model(1, depth=1)
    save_checkpoint(
        other / "weights", model, model, {"model": model.settings, "objective": {"learn_sigma": True}}
    )
    options = [
        {},
        {"guidance_interval": (0.1, 0.9)},
        {"guidance_channels": 1},
        {"guide": other},
        {"guidance": 1.0},
    ]
    found = [
        pixels(run(settings(trained, tmp_path / str(i), images=8, steps=6, **each)))
        for i, each in enumerate(options)
    ]
    for i, images in enumerate(found):
        assert [j for j, other in enumerate(found) if np.array_equal(images, other)] == [i]


def test_the_shipped_model_draws_digits_that_a_classifier_reads(tmp_path: Path) -> None:
    from switch_dit.data import load_digits
    from switch_dit.metrics import evaluate

    npz = run(SampleConfig(images=100, steps=20, output=tmp_path / "digits.npz"))
    with np.load(npz) as file:
        images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1
        metrics = evaluate(load_digits(), images, torch.from_numpy(file["arr_1"]))
    assert metrics.conditional_accuracy >= 0.95
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 5e6


@pytest.mark.slow
def test_no_arguments_are_needed(tmp_path: Path) -> None:
    script = ROOT / "models" / "sample_switch_dit.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "100 samples in samples-1.png\n"
    assert "Loading" not in done.stderr
    assert np.asarray(Image.open(tmp_path / "samples-1.png").convert("L")).std() > 30


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"images": -1}, ValueError, "images is -1"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"labels": (7,)}, ValueError, r"labels holds \[7"),
        ({"scheduler": "euler"}, ValueError, "scheduler is 'euler'; eps takes ddim"),
        ({"guidance_channels": 4}, ValueError, "guidance_channels is 4"),
        ({"vae": str(ROOT / "csrc")}, ValueError, "vae is '.*csrc'; diffusers cannot load it"),
        ({"output": Path("nowhere/x.npz")}, FileNotFoundError, "its folder does not exist"),
        (
            {"output": Path("grid.png")},
            ValueError,
            "images is 37; output must then be a folder or an .npz file",
        ),
    ],
)
def test_settings_that_do_not_fit(
    trained: Path, tmp_path: Path, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(settings(trained, **{"output": tmp_path / "x", **options}))


def test_other_settings_in_the_same_place(trained: Path, tmp_path: Path) -> None:
    run(settings(trained, tmp_path / "images", images=3))
    with pytest.raises(ValueError, match="has images of other settings: steps was 2 and is 3"):
        run(settings(trained, tmp_path / "images", images=3, steps=3))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cat.png").write_bytes(b"")
    with pytest.raises(FileExistsError, match="has other images, choose another"):
        run(settings(trained, tmp_path / "mine"))
    (tmp_path / "images" / "samples.json").write_text("{")
    with pytest.raises(ValueError, match=r"samples.json is broken; remove"):
        run(settings(trained, tmp_path / "images", images=3))
    with pytest.raises(ValueError, match="a saved pipeline; it has no other weights to choose"):
        run(SampleConfig(weights="model", output=tmp_path / "y"))
    note = json.loads((run(settings(trained, tmp_path / "again", images=2)) / "samples.json").read_text())
    assert note["classes"] == [0, 1, 2, 3, 4]
