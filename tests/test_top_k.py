"""Another k than in training: set_top_k, sampling with it, and the sweep of models/sweep_top_k.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sample_switch_dit
import sweep_top_k
import torch
from helpers import random_model
from sample_switch_dit import SampleConfig
from sweep_top_k import SHIPPED, SweepConfig
from switch_dit import SwitchDiT, metrics, sample
from switch_dit.checkpoint import save_checkpoint
from switch_dit.objectives import create_objective
from switch_dit.pipeline import load_pipeline

from switch_moe import Router, SwitchMoE, set_top_k


@pytest.mark.parametrize("routing", ["switch", "dit_moe"])
def test_a_model_with_another_k_is_one_that_was_built_with_it(routing: str, tmp_path: Path) -> None:
    model = random_model(routing=routing, num_experts=4, top_k=2).eval()
    x, t, y = torch.randn(3, 3, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([0, 4, 5])
    before = model(x, t, y)
    for k in (1, 4, 3):
        model.set_top_k(k)
        other = random_model(routing=routing, num_experts=4, top_k=k).eval()
        assert torch.equal(model(x, t, y), other(x, t, y))
        assert not torch.equal(model(x, t, y), before)
    assert model.config.top_k == 2
    model.save_pretrained(tmp_path)
    saved = SwitchDiT.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert torch.equal(saved(x, t, y), before), "a saved model has the k of its training"
    model.set_top_k(model.config.top_k)
    assert torch.equal(model(x, t, y), before)


def test_sampling_and_the_table_follow_and_the_prior_stays() -> None:
    model, other = random_model(), random_model(top_k=1)
    model.set_top_k(1)
    drawn = [
        sample(
            one, create_objective("eps", learn_sigma=True), torch.arange(5), steps=3,
            generator=torch.Generator().manual_seed(0),
        )
        for one in (model, other)
    ]  # fmt: skip
    assert torch.equal(*drawn)
    assert (model.route_all_timesteps().selected().sum(1) == len(model.blocks)).all()
    assert (model.prior.top_k, other.prior.top_k) == (2, 1)


def test_a_k_that_does_not_fit_changes_nothing() -> None:
    model = random_model()
    for wrong, error in ((0, ValueError), (4, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="top_k is"):
            model.set_top_k(wrong)
    assert model.router.top_k == model.blocks[0].moe.top_k == 2
    mixed = torch.nn.ModuleList([Router(2, 8, 4, 2), SwitchMoE(8, 3, 2)])
    with pytest.raises(ValueError, match=r"top_k is 4; .* experts, 3"):
        set_top_k(mixed, 4)
    assert [layer.top_k for layer in mixed] == [2, 2]
    for routing in ("none", "dtr", "ec_dit"):
        with pytest.raises(ValueError, match="SwitchDiT without a layer that chooses top_k experts"):
            random_model(routing=routing).set_top_k(1)


def test_a_sweep_of_the_model_that_is_in_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = lambda images: (images.scale(images.train[:150]), images.train_labels[:150])  # noqa: E731
    monkeypatch.setattr(metrics, "fitting_images", few)  # the classifier is fitted faster
    config = SweepConfig(images=20, steps=2, seed=7)
    found = sweep_top_k.run(config)
    assert list(found) == [1, 2, 3]
    assert len({measured.mind for measured in found.values()}) == 3
    written = json.loads((tmp_path / "top-k" / "top-k.json").read_text())
    assert written["trained_top_k"] == 2
    assert written["settings"]["images"] == 20
    for k, measured in found.items():
        assert written["top_k"][str(k)]["frechet_distance"] == measured.frechet_distance
    assert (tmp_path / "top-k" / "top-k.png").stat().st_size > 1000
    path = sample_switch_dit.run(
        SampleConfig(images=20, steps=2, seed=7, top_k=3, output=tmp_path / "samples.npz")
    )
    pipeline = load_pipeline(SHIPPED)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.set_top_k(3)
    drawn, labels = sweep_top_k._draw(config, pipeline)
    with np.load(path) as file:  # of the same noise
        pixels = ((drawn.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        assert np.array_equal(file["arr_0"], pixels.numpy())
        assert file["arr_1"].tolist() == labels.tolist()


def test_settings_of_a_sweep_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="top_k is 4"):
        sweep_top_k.run(SweepConfig(top_k=(1, 4)))
    with pytest.raises(ValueError, match="images is 1"):
        sweep_top_k.run(SweepConfig(images=1))
    data = tmp_path / "four.npz"
    np.savez(data, images=np.zeros((40, 4, 4), np.uint8), labels=np.arange(40) % 2)
    with pytest.raises(
        ValueError, match=r"channels, size and classes \(1, 4, 2\); the model has \(1, 8, 10\)"
    ):
        sweep_top_k.run(SweepConfig(data=str(data)))
    model = random_model()
    settings = {"model": model.settings, "objective": {"learn_sigma": True}}
    save_checkpoint(tmp_path / "weights", model, model, settings)
    with pytest.raises(ValueError, match=r"has no config\.json that says it; give --data"):
        sweep_top_k.run(SweepConfig(tmp_path))
    (tmp_path / "config.json").write_text('{"data": "digits"}')
    with pytest.raises(ValueError, match=r"data is 'digits' with .* \(1, 8, 10\); the model has \(3, 8, 5\)"):
        sweep_top_k.run(SweepConfig(tmp_path))
    with pytest.raises(FileExistsError, match="it is a file"):
        sweep_top_k.run(SweepConfig(output=tmp_path / "config.json"))
