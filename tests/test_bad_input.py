"""What does not fit is refused by name: images, labels, timesteps, schedules, samplers, settings, files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_model
from safetensors.torch import load_file, save_file
from switch_dit import GaussianDiffusion, SwitchDiT, convert_official_state_dict, create_model, sample
from switch_dit.checkpoint import load_checkpoint, save_checkpoint
from switch_dit.convert import convert_to_official_state_dict
from switch_dit.data import load_data
from switch_dit.metrics import evaluate
from switch_dit.objectives import create_objective
from torch import Tensor

from switch_moe import DiffusionPrior, Router, SwitchMoE, ops

X, T, Y = torch.zeros(2, 3, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 2])
LEARNED = create_objective("eps", learn_sigma=True)  # what random_model() fits


@pytest.mark.parametrize("routing", ["switch", "dtr", "none"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *(
            ({"x": torch.zeros(2, 3, *size)}, ValueError, r"x has shape .* it must be \[B, 3, 8, 8\]")
            for size in ((4, 16), (16, 4), (9, 9), (11, 10), (16, 16))
        ),
        ({"x": torch.zeros(2, 1, 8, 8)}, ValueError, "x has shape"),
        ({"x": X.int()}, TypeError, "x is torch.int32"),
        ({"x": np.zeros((2, 3, 8, 8))}, TypeError, "x is array"),
        ({"x": X[:1]}, ValueError, r"t has shape \(2,\); it must be \[1\]"),
        ({"t": torch.tensor([1, 2, 3])}, ValueError, r"t has shape \(3,\); it must be \[2\]"),
        ({"t": torch.tensor(3)}, ValueError, r"t has shape \(\)"),
        ({"t": 3}, TypeError, r"t is 3 \(int\); it must be a tensor"),
        ({"t": torch.tensor([-1, 3])}, ValueError, r"t holds -1 to 3; it must stay in \[0, 1000\)"),
        ({"t": torch.tensor([3, 1000])}, ValueError, "t holds 3 to 1000"),
        ({"t": torch.tensor([3, math.nan])}, ValueError, "t holds nan to nan"),
        ({"y": Y[:1]}, ValueError, r"y has shape \(1,\); it must be \[2\]"),
        ({"y": torch.tensor([0, 6])}, ValueError, r"y holds 0 to 6; it must stay in \[0, 6\)"),
        ({"y": torch.tensor([0, -1])}, ValueError, "y holds -1 to 0"),
        ({"y": Y.float()}, TypeError, "y is torch.float32"),
        ({"y": None}, ValueError, r"y is None; a model with 5 classes takes labels \[B\]"),
    ],
)
def test_of_the_model(change: dict[str, Any], error: type[Exception], message: str, routing: str) -> None:
    model = random_model(routing=routing).eval()
    with pytest.raises(error, match=message):
        model(**{"x": X, "t": T, "y": Y, **change})


def test_labels_for_a_model_without_classes() -> None:
    with pytest.raises(ValueError, match="y is given; a model with 0 classes takes None"):
        random_model(num_classes=0)(X, T, Y)


@pytest.mark.parametrize(
    ("scale", "error"), [(math.inf, ValueError), (math.nan, ValueError), (None, TypeError)]
)
def test_guidance_that_is_no_number(scale: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"cfg_scale is {scale}"):
        random_model().forward_with_cfg(X, T, Y, scale)
    with pytest.raises(error, match=f"guidance is {scale}"):
        sample(random_model(), LEARNED, Y, steps=2, guidance=scale)


def test_guidance_of_an_odd_batch() -> None:
    with pytest.raises(ValueError, match="x has 3 rows; their number must be even"):
        random_model().forward_with_cfg(torch.zeros(3, 3, 8, 8), torch.zeros(3), torch.zeros(3).long(), 1.5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GaussianDiffusion(num_timesteps=20), ValueError, "num_timesteps is 20; the linear schedule"),
        (lambda: GaussianDiffusion(num_timesteps=0), ValueError, "num_timesteps is 0"),
        (lambda: GaussianDiffusion(num_timesteps=100.0), TypeError, "num_timesteps is 100.0"),
        (lambda: GaussianDiffusion("cosin"), ValueError, "schedule is 'cosin'"),
        (lambda: GaussianDiffusion(weighting=5), ValueError, "weighting is 5"),
        (lambda: GaussianDiffusion(betas=[0.1, 1.0]), ValueError, "betas holds 1.0; each must be in"),
        (lambda: GaussianDiffusion(betas=[0.1, 0.0]), ValueError, "betas holds 0.0"),
        (lambda: GaussianDiffusion(betas=[0.1, math.nan]), ValueError, "betas holds nan"),
        (lambda: GaussianDiffusion(betas=[[0.1]]), ValueError, r"betas has shape \(1, 1\)"),
        (lambda: GaussianDiffusion(betas=[]), ValueError, r"betas has shape \(0,\)"),
        (lambda: GaussianDiffusion().respaced(2.5), TypeError, "steps is 2.5"),
        (lambda: DiffusionPrior(2, 3, 2, alpha=-1.0), ValueError, "alpha is -1.0; it must be a positive"),
        (lambda: DiffusionPrior(2, 3, 2, alpha=math.nan), ValueError, "alpha is nan"),
        (lambda: DiffusionPrior(2, 3, 2, alpha=True), TypeError, "alpha is True"),
        (lambda: DiffusionPrior(2.5, 3, 2), TypeError, "depth is 2.5"),
        (lambda: DiffusionPrior(2, 3, torch.tensor(2)), TypeError, "top_k is tensor"),
        (lambda: DiffusionPrior(2, 3, 2, alpha=10**400), ValueError, "alpha is 1000"),
        (lambda: DiffusionPrior(2, 3, 2, alpha=np.ones(3)), TypeError, "alpha is array"),
        (lambda: GaussianDiffusion(betas=[1e-17, 0.5]), ValueError, "betas holds 1e-17"),
        (lambda: GaussianDiffusion(betas=np.array([0.1 + 1j])), TypeError, "betas is ndarray of complex128"),
        (lambda: GaussianDiffusion(betas=["0.1"]), TypeError, "betas is list"),
        (lambda: GaussianDiffusion(num_timesteps=10**30), ValueError, "num_timesteps is 1000"),
        (lambda: SwitchMoE(10**30), ValueError, "hidden_size is 1000"),
        (lambda: SwitchMoE(16, top_k=np.array(2.5)), TypeError, "top_k is array"),
        (lambda: SwitchMoE(16, expert=np.ones(2)), ValueError, "expert is array"),
        (lambda: create_model([]), ValueError, r"preset is \[\]"),
        (lambda: random_model(routing="none").route(X), ValueError, "routing is 'none'; only a model with"),
        (lambda: random_model(routing="dtr")(X, T.short(), Y), TypeError, "t is torch.int16"),
        (lambda: random_model()(X, T, Y, with_prior=1), TypeError, "with_prior is 1"),
        (lambda: random_model()(X.to("meta"), T, Y), ValueError, "x is on meta; it must be on cpu"),
        (lambda: SwitchMoE(16)(torch.zeros(2, 3, 16), routing=(1, 2)), TypeError, "routing is a tuple"),
        (lambda: SwitchMoE(16, expert="mlp")(torch.zeros(2, 3, 16), X, modulate=3), TypeError, "modulate is"),
        (lambda: Router(2, 16)(torch.zeros(3, 16)).block("a"), TypeError, "index is 'a'"),
        (lambda: Router(2, 16)(torch.zeros(3, 16)).block(0).selected(), ValueError, r"\(\) is of all"),
        (lambda: ops.timestep_gate(torch.zeros(3, 4), X, X, None), TypeError, "top_k is None"),
        (lambda: ops.linear_assignment(torch.eye(2).to(torch.uint64)), TypeError, "cost is torch.uint64"),
        (lambda: ops.linear_assignment(torch.eye(2), prices=[0, 0]), TypeError, r"prices is \[0, 0\]"),
        (
            lambda: ops.match_columns(torch.eye(4) + 5j, torch.eye(4), *[torch.arange(4)] * 2),
            TypeError,
            "selected is torch.complex64",
        ),
        (lambda: ops.match_columns(torch.eye(4), None, *[torch.arange(4)] * 2), TypeError, "table is None"),
        (lambda: DiffusionPrior(1, 3, 1).match([1]), TypeError, r"selected is \[1\]"),
        (lambda: SwitchMoE(16.0), TypeError, "hidden_size is 16.0"),
        (lambda: SwitchMoE(True), TypeError, "hidden_size is True"),
        (lambda: SwitchMoE(16, 3.0), TypeError, "num_experts is 3.0"),
        (lambda: SwitchMoE(16, top_k=math.nan), TypeError, "top_k is nan"),
        (lambda: SwitchMoE(16, bias=None), TypeError, "bias is None"),
        (lambda: SwitchMoE(16, expert="mlp", expert_hidden_size=2.5), TypeError, "expert_hidden_size is 2.5"),
        (lambda: Router(True, 16), TypeError, "depth is True"),
        (lambda: Router(1, "16"), TypeError, "hidden_size is '16'"),
        (lambda: SwitchDiT(depth=2.5), TypeError, "depth is 2.5"),
        (lambda: SwitchDiT(mlp_ratio=math.inf), ValueError, "mlp_ratio is inf"),
        (lambda: SwitchDiT(num_classes=-1), ValueError, "num_classes is -1"),
        (lambda: SwitchDiT(learn_sigma=1), TypeError, "learn_sigma is 1"),
        (lambda: SwitchDiT(class_dropout_prob=True), TypeError, "class_dropout_prob is True"),
        (lambda: SwitchDiT(backend="cudnn"), ValueError, "backend is 'cudnn'"),
        (lambda: SwitchMoE(16)([[1.0]], X), TypeError, r"x is \[\[1.0\]\] \(list\)"),
        (lambda: SwitchMoE(16)(torch.zeros(2, 3, 16), 5), TypeError, r"time_embedding is 5 \(int\)"),
        (lambda: ops.timestep_gate(None, X, X, 1), TypeError, "embedding is None"),
        (lambda: ops.linear_assignment([[1.0]]), TypeError, "cost is"),
        (
            lambda: ops.match_columns(torch.full((4, 2), 0.5), torch.ones(4, 2), *[torch.arange(2)] * 2),
            ValueError,
            "selected holds 0.5; every entry must be 0 or 1",
        ),
        (
            lambda: ops.match_columns(torch.ones(4, 2), torch.full((4, 2), math.nan), *[torch.arange(2)] * 2),
            ValueError,
            "table holds nan; every entry must be 0 or 1",
        ),
    ],
)  # fmt: skip
def test_of_settings_and_operations(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.q_sample(X, torch.tensor([-1, 0]), X), "t holds -1 to 0"),
        (lambda d: d.q_sample(X, torch.tensor([0, 1000]), X), "t holds 0 to 1000"),
        (lambda d: d.q_sample(X[:1], T, X), r"noise has shape .* it must be \[1, 3, 8, 8\]"),
        (lambda d: d.q_sample(X, T[:1], X), "t has shape"),
        (lambda d: d.predict_x_start(X, T, X[:, :1]), "noise has shape"),
        (lambda d: d.training_losses(X[:, :2], X, X, T, X), "model_output has shape"),
        (lambda d: d.p_mean_variance(X, X, T), "model_output has shape"),
        (lambda d: d.q_sample(X[0, 0, 0], T, X[0, 0, 0]), "x_start has shape"),
        (lambda d: d.q_sample(X.to("meta"), T, X.to("meta")), "t is on cpu; it must be on meta"),
    ],
)
def test_of_the_process(call: Callable[[GaussianDiffusion], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(GaussianDiffusion())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("count", [50, 100])
def test_dpm_solver_takes_fewer_steps_than_timesteps(schedule: str, count: int) -> None:
    model = random_model(num_timesteps=count)
    objective = create_objective("eps", schedule=schedule, num_timesteps=count, learn_sigma=True)
    for steps in (1, 2, count // 2, count - 1):
        assert sample(model, objective, Y, steps=steps, scheduler="dpm-solver++").isfinite().all()
    with pytest.raises(ValueError, match=f"steps is {count}; dpm-solver\\+\\+ takes fewer"):
        sample(model, objective, Y, steps=count, scheduler="dpm-solver++")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": [1, 2]}, TypeError, r"labels is \[1, 2\] \(list\)"),
        ({"labels": Y[None]}, ValueError, "labels has shape"),
        ({"labels": Y.float()}, TypeError, "labels is torch.float32"),
        ({"labels": torch.tensor([5])}, ValueError, r"labels holds \[5\]"),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"steps": True}, TypeError, "steps is True"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"scheduler": "euler"}, ValueError, "scheduler is 'euler'"),
        ({"start": X[:1]}, ValueError, "start has shape"),
        ({"start": X * 1j}, TypeError, "start is torch.complex64"),
        ({"start": X + math.nan}, ValueError, "start holds numbers that are not finite"),
        ({"steps": 0, "labels": Y[:0]}, ValueError, "steps is 0"),
        ({"scheduler": "euler", "labels": Y[:0]}, ValueError, "scheduler is 'euler'"),
        ({"generator": 3}, TypeError, "generator is a int"),
        ({"clip": "yes"}, TypeError, "clip is 'yes'"),
        ({"count": "a"}, TypeError, "count is 'a'"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model is a Linear"),
        ({"objective": None}, TypeError, "objective is a NoneType; it must be an Objective"),
        (
            {"objective": GaussianDiffusion()},
            TypeError,
            r"objective is a GaussianDiffusion; .* DiffusionObjective\(diffusion, 'eps', learn_sigma=True\)",
        ),
        (
            {"objective": create_objective("eps", num_timesteps=500, learn_sigma=True)},
            ValueError,
            "objective has num_timesteps 500; it must be 1000, the model's",
        ),
        (
            {"objective": create_objective("eps")},
            ValueError,
            "objective has learn_sigma False; it must be True",
        ),
        ({"objective": create_objective("flow")}, ValueError, "objective has learn_sigma False"),
    ],
)
def test_of_sampling(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"model": random_model(), "objective": LEARNED, "labels": Y, "steps": 2}
    with pytest.raises(error, match=message):
        sample(**{**arguments, **options})


def test_sampling_is_evaluation_and_modes_come_back() -> None:
    model = random_model(class_dropout_prob=0.9).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    generator = torch.Generator()
    images = [
        sample(model, LEARNED, Y, steps=2, guidance=1, generator=generator.manual_seed(0)) for _ in range(4)
    ]
    assert [module.training for module in model.modules()] == modes
    model.eval()
    right = sample(model, LEARNED, Y, steps=2, guidance=1, generator=generator.manual_seed(0))
    assert all(torch.equal(image, right) for image in images)
    model.train()
    with pytest.raises(ValueError, match="labels holds"):
        sample(model, LEARNED, torch.tensor([9]), steps=2)
    assert model.training


def test_weights_that_are_not_finite_are_not_sampled() -> None:
    model = random_model()
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="samples are not finite"):
        sample(model, LEARNED, Y, steps=2)
    with pytest.raises(ValueError, match="generated holds numbers that are not finite"):
        evaluate(load_data("digits"), torch.full((20, 1, 8, 8), math.nan), torch.arange(20) % 10)


def test_the_share_of_pixels_out_of_range_is_measured() -> None:
    images = load_data("digits")
    held_out = images.scale(images.held_out)
    exact, wide = (evaluate(images, factor * held_out, images.held_out_labels) for factor in (1, 1.2))
    assert exact.out_of_range == 0
    assert wide.out_of_range == pytest.approx(float((1.2 * held_out.abs() > 1.01).float().mean()))


class TestCheckpoints:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        model = random_model()
        settings = {"model": model.settings, "objective": {"name": "eps", "learn_sigma": True}}
        save_checkpoint(str(tmp_path / "checkpoint"), model, model, settings)
        return tmp_path / "checkpoint"

    def test_paths_are_taken_as_text(self, saved: Path) -> None:
        load_checkpoint(str(saved))

    @pytest.mark.parametrize("name", ["config.json", "ema.safetensors"])
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_cut_off(self, saved: Path, name: str, share: float) -> None:
        path = saved / name
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(ValueError, match=rf"{name} is broken") as caught:
            load_checkpoint(saved)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "text",
        ['{"objective": {}}', "[]", '{"model": {"width": 3}, "objective": {}}', "null", '{"objective": 3}'],
    )
    def test_another_config(self, saved: Path, text: str) -> None:
        (saved / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json is broken"):
            load_checkpoint(saved)

    def test_of_an_older_version(self, saved: Path) -> None:
        settings = json.loads((saved / "config.json").read_text())
        settings["diffusion"] = {"schedule": settings.pop("objective")["name"]}
        (saved / "config.json").write_text(json.dumps(settings))
        with pytest.raises(
            ValueError, match=r"config.json lacks the key 'objective', the arguments of create"
        ):
            load_checkpoint(saved)

    @pytest.mark.parametrize(
        ("objective", "message"),
        [
            ({"learn_sigma": False}, "the model has learn_sigma True and its objective False"),
            ({"name": "flow"}, "learn_sigma is True; it must be False for flow"),
            ({"name": "x0"}, "name is 'x0'; it must be one of eps, v, flow"),
            ({"num_timesteps": 50}, "the model has num_timesteps 1000 and its objective 50"),
            ({"steps": 3}, "unexpected keyword argument 'steps'"),
        ],
    )
    def test_an_objective_that_does_not_fit(
        self, saved: Path, objective: dict[str, Any], message: str
    ) -> None:
        settings = json.loads((saved / "config.json").read_text())
        settings["objective"] |= objective
        (saved / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=rf"config.json is broken \(.*{message}"):
            load_checkpoint(saved)

    def test_a_model_that_does_not_fit_its_objective(self, saved: Path) -> None:
        settings = json.loads((saved / "config.json").read_text())
        settings["model"]["learn_sigma"] = False
        (saved / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match="the model has learn_sigma False and its objective True"):
            load_checkpoint(saved)

    @pytest.mark.parametrize("name", ["eps", "v", "flow"])
    def test_the_objective_comes_back(self, tmp_path: Path, name: str) -> None:
        model = random_model(learn_sigma=name == "eps", num_timesteps=500)
        given = {
            "name": name,
            "schedule": "linear" if name == "flow" else "cosine",
            "weighting": "constant" if name == "flow" else "min_snr_5",
            "learn_sigma": name == "eps",
            "num_timesteps": 500,
        }
        save_checkpoint(tmp_path / "weights", model, model, {"model": model.settings, "objective": given})
        loaded, objective = load_checkpoint(tmp_path / "weights")
        expected = create_objective(**given)
        assert (objective.name, objective.num_timesteps) == (name, 500)
        assert objective.learn_sigma == loaded.learn_sigma == (name == "eps")
        t = torch.tensor([0.1, 0.9]) if name == "flow" else torch.tensor([3, 400])
        out, x = torch.ones(2, loaded.out_channels, 8, 8), torch.randn(2, 3, 8, 8)
        losses = [each.losses(out, x, each.q_sample(x, t, x), t, x)["mse"] for each in (objective, expected)]
        assert torch.equal(*losses)  # schedule and weighting

    def test_of_another_model(self, saved: Path) -> None:
        for other in (random_model(hidden_size=48), random_model(routing="none"), random_model(depth=3)):
            save_file(other.state_dict(), saved / "ema.safetensors")
            with pytest.raises(ValueError, match=r"ema.safetensors is of another model: it") as caught:
                load_checkpoint(saved)
            assert len(str(caught.value)) < 300

    def test_prefixes_of_wrappers(self, saved: Path) -> None:
        state = load_file(saved / "ema.safetensors")
        save_file({f"module._orig_mod.{k}": v for k, v in state.items()}, saved / "ema.safetensors")
        model, _ = load_checkpoint(saved)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    def test_a_full_disk(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = load_file(saved / "ema.safetensors")
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(OSError, match="MiB are needed and 0 MiB are free"):
            save_checkpoint(saved, random_model(1), random_model(1), {"model": {}, "objective": {}})
        assert sorted(path.name for path in saved.parent.iterdir()) == ["checkpoint"]
        assert torch.equal(load_file(saved / "ema.safetensors")["pos_embed"], before["pos_embed"])

    @pytest.mark.parametrize("kind", [b"I32", b"U32"])
    def test_weights_of_another_type(self, saved: Path, kind: bytes) -> None:
        path = saved / "ema.safetensors"
        path.write_bytes(path.read_bytes().replace(b"F32", kind))
        with pytest.raises(ValueError, match=r"ema.safetensors is broken: .* is torch.u?int32"):
            load_checkpoint(saved)

    def test_weights_that_are_not_finite(self, saved: Path) -> None:
        state = load_file(saved / "ema.safetensors")
        state["pos_embed"][0, 0, 0] = math.inf
        save_file(state, saved / "ema.safetensors")
        with pytest.raises(ValueError, match=r"ema.safetensors is broken: pos_embed is not finite"):
            load_checkpoint(saved)

    @pytest.mark.parametrize(
        "change",
        [{"hidden_size": 2**62}, {"num_classes": 2**60}, {"mlp_ratio": 1e300}, {"num_timesteps": 50}],
    )
    def test_a_config_that_no_model_has(self, saved: Path, change: dict[str, Any]) -> None:
        settings = json.loads((saved / "config.json").read_text())
        settings["model"] |= change
        (saved / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=r"config.json is broken"):
            load_checkpoint(saved)

    @pytest.mark.parametrize(
        "settings", [None, [1], {}, {"model": {}, "objective": object()}, {"model": {}, "diffusion": {}}]
    )
    def test_settings_that_fit_no_checkpoint_replace_none(self, saved: Path, settings: Any) -> None:
        with pytest.raises(TypeError, match="settings"):
            save_checkpoint(saved, random_model(), random_model(), settings)
        load_checkpoint(saved)

    def test_permissions_are_those_of_the_umask(self, saved: Path) -> None:
        modes = {path.stat().st_mode & 0o777 for path in saved.iterdir()}
        usual = saved.parent / "usual"
        usual.touch()
        assert modes == {usual.stat().st_mode & 0o777}

    def test_whole_official_checkpoints(self) -> None:
        model = random_model()
        official = convert_to_official_state_dict(model.state_dict(), "switch")
        own = {name: value + 1 for name, value in official.items()}
        wrapped = {f"module.{name}": value for name, value in own.items()}
        for given in ({"model": wrapped, "ema": official, "opt": {}, "args": object()}, official):
            converted = convert_official_state_dict(given)
            assert converted.keys() == model.state_dict().keys()
            assert all(torch.equal(converted[name], value) for name, value in model.state_dict().items())
        assert torch.equal(convert_official_state_dict(wrapped)["pos_embed"], model.pos_embed + 1)
        with pytest.raises(TypeError, match="state_dict is a list"):
            convert_official_state_dict([official])
        with pytest.raises(ValueError, match="state_dict holds 'opt', a dict"):
            convert_official_state_dict({"opt": {}})


@pytest.mark.parametrize("spoil", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"no archive" * 9])
def test_broken_data_files(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "own.npz"
    np.savez_compressed(path, images=np.zeros((20, 4, 4, 3), np.uint8), labels=np.arange(20) % 2)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"own.npz'; the file is broken or no .npz file") as caught:
        load_data(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"images": np.zeros((20, 0, 0), np.uint8), "labels": np.arange(20) % 2},
            "they must be square uint8",
        ),
        (
            {"images": np.zeros((20, 4, 4), np.uint8), "labels": 2**40 * (np.arange(20) % 2)},
            "fewer images than",
        ),
        (
            {"images": np.zeros((20, 4, 4), np.uint8), "labels": np.full(20, 2**64 - 1, dtype=np.uint64)},
            "fewer images than",
        ),
    ],
)
def test_data_that_cannot_be_meant(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_data(str(tmp_path / "own.npz"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.arange(20)[:, None] % 10}, "labels has shape"),
        ({"labels": torch.arange(1)}, "labels has shape"),
        ({"labels": torch.arange(20) % 10 + 100}, "labels holds 100 to 109"),
        ({"labels": (torch.arange(20) % 10).float()}, "labels is torch.float32"),
        ({"generated": torch.zeros(20, 64)}, "generated has shape"),
        ({"generated": torch.zeros(20, 1, 8, 8, dtype=torch.complex64)}, "generated is torch.complex64"),
        ({"generated": None}, "generated is None"),
        ({"generated": torch.zeros(1, 1, 8, 8), "labels": torch.zeros(1).long()}, "generated has 1 images"),
    ],
)
def test_of_the_measures(change: dict[str, Any], message: str) -> None:
    given = {"generated": torch.zeros(20, 1, 8, 8), "labels": torch.arange(20) % 10} | change
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(load_data("digits"), **given)


@pytest.mark.slow
def test_pictures_without_samples_or_with_many(tmp_path: Path) -> None:
    from switch_dit.plots import check_picture, grid_of, plot_samples

    images: Tensor = torch.rand(3, 3, 4, 5) * 2 - 1
    grid = grid_of(images, columns=2)
    assert grid.shape == (11, 13, 3)
    assert np.allclose(grid[1:5, 1:6], (images[0].permute(1, 2, 0).numpy() + 1) / 2)
    assert np.allclose(grid[6:10, 1:6], (images[2].permute(1, 2, 0).numpy() + 1) / 2)
    assert (grid[6:, 7:] == 1).all()
    plot_samples(str(tmp_path / "many.png"), torch.zeros(2000, 1, 8, 8), None, 40, "many")
    with pytest.raises(ValueError, match=r"output is x\.npy; it must end in one of"):
        check_picture("output", "x.npy")
