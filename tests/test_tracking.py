"""Trackers: TensorBoard for real, wandb and trackio as modules that refuse what the real ones do not take."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from switch_dit.tracking import check_tracker, create_tracker

ROOT = Path(__file__).parent.parent


class Fake:
    """A module with the signatures of wandb 0.31 or trackio 0.43, which keeps what it was told."""

    def __init__(self, name: str, logged_in: bool = False) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished, self.fails = 0, ""
        self.module = module = types.ModuleType(name)
        module.__file__ = f"{name}/__init__.py"
        module.init = self.init_of_wandb if name == "wandb" else self.init_of_trackio
        module.Image = lambda value: ("image", value)
        if name == "wandb":
            module.login = self.login(logged_in)

    def init_of_wandb(self, entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None,
                      config=None, config_exclude_keys=None, config_include_keys=None, allow_val_change=None,
                      group=None, job_type=None, mode=None, force=None, reinit=None, resume=None,
                      resume_from=None, fork_from=None, save_code=None, tensorboard=None,
                      sync_tensorboard=None, monitor_gym=None, settings=None) -> Fake:  # fmt: skip
        assert mode in ("online", "offline", "disabled", "shared", None)
        assert not set(r"/\#?%:") & set(id)
        return self.started(locals())

    def init_of_trackio(self, project, name=None, group=None, space_id=None, server_url=None, dataset_id=None,
                        bucket_id=None, config=None, resume="never", settings=None, private=None, embed=True,
                        auto_log_gpu=None, gpu_log_interval=10.0, auto_log_cpu=None, cpu_log_interval=10.0,
                        webhook_url=None, webhook_min_level=None) -> Fake:  # fmt: skip
        return self.started(locals())

    def started(self, told: dict[str, Any]) -> Fake:
        if self.fails == "init":
            raise ConnectionError("no network")
        assert told["resume"] in ("allow", "never", "must")
        self.inits.append({key: value for key, value in told.items() if key != "self"})
        return self

    @staticmethod
    def login(logged_in: bool) -> Callable[..., bool]:
        def login(key=None, relogin=None, host=None, force=None, timeout=None, verify=True, referrer=None,
                  prompt=True) -> bool:  # fmt: skip
            assert not prompt
            assert not verify
            return logged_in

        return login

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        if self.fails == "log":
            raise ConnectionError("no network")
        self.logged.append((step, data))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)

    def install(name: str, **options: Any) -> Fake:
        made = Fake(name, **options)
        monkeypatch.setitem(sys.modules, name, made.module)
        return made

    return install


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "samples.png"
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(path)
    return path


def run_in(tmp_path: Path, name: str = "digits") -> Path:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    return folder


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return accumulator.Reload()


def test_tensorboard_has_the_numbers_pictures_and_settings(tmp_path: Path, picture: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = run_in(tmp_path)
    tracker = create_tracker("tensorboard", folder, {"lr": 0.25, "output": Path("runs")})
    tracker.log(20, {"loss": 0.5, "prior": float("nan")})
    tracker.log(40, {"loss": 0.25})
    tracker.images(40, {"samples": picture})
    read = events(folder)  # before close: each call is on the disk, as a run may be killed
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(20, 0.5), (40, 0.25)]
    assert np.isnan(read.Scalars("prior")[0].value)
    (image,) = read.Images("samples")
    (tmp_path / "read.png").write_bytes(image.encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "read.png")), np.asarray(Image.open(picture)))
    (text,) = read.Tensors("settings/text_summary")
    assert '"lr": 0.25' in text.tensor_proto.string_val[0].decode()
    tracker.close()
    assert not tracker.failed


def test_tensorboard_goes_on_and_drops_what_is_computed_again(tmp_path: Path) -> None:
    """The first process is killed after step 60, and its last checkpoint is of step 40."""
    pytest.importorskip("tensorboard")
    folder = run_in(tmp_path)
    first = create_tracker("tensorboard", folder, {})
    for step in (20, 40, 60):
        first.log(step, {"loss": step / 100})
    second = create_tracker("tensorboard", folder, {}, start=40)
    second.log(60, {"loss": 1.0})
    second.log(80, {"loss": 2.0})
    second.close()
    loss = [(event.step, round(event.value, 3)) for event in events(folder).Scalars("loss")]
    assert loss == [(20, 0.2), (40, 0.4), (60, 1.0), (80, 2.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_dashboards_are_told_all_and_resume(name: str, tmp_path: Path, fake: Any, picture: Path) -> None:
    tool, folder = fake(name), run_in(tmp_path, "my #1 run?")
    for start in (0, 40):
        tracker = create_tracker(name, folder, {"lr": 0.25}, start)
        tracker.log(start + 20, {"loss": 0.5})
        tracker.images(start + 20, {"samples": picture})
        tracker.close()
        assert not tracker.failed
    pictures = {"samples": ("image", str(picture))}
    assert tool.logged == [(20, {"loss": 0.5}), (20, pictures), (60, {"loss": 0.5}), (60, pictures)]
    assert tool.finished == 2
    key = "id" if name == "wandb" else "name"
    first, second = tool.inits
    assert first == second  # the same run
    assert first[key].startswith("my--1-run--")
    assert first["config"] == {"lr": 0.25}
    assert first["resume"] == "allow"
    # A folder of that name that is made anew is another run.
    (folder / "track-id").unlink()
    create_tracker(name, folder, {})
    assert tool.inits[-1][key] != first[key]


@pytest.mark.parametrize(
    ("variable", "logged_in", "mode"),
    [("", False, "offline"), ("", True, None), ("WANDB_MODE", False, None), ("WANDB_API_KEY", False, None)],
)
def test_wandb_needs_no_account(
    variable: str,
    logged_in: bool,
    mode: str | None,
    tmp_path: Path,
    fake: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tool = fake("wandb", logged_in=logged_in)
    if variable:
        monkeypatch.setenv(variable, "online")
    create_tracker("wandb", run_in(tmp_path), {})
    assert tool.inits[0]["mode"] == mode
    assert tool.inits[0]["dir"] == str(tmp_path / "digits")


def test_an_older_wandb_cannot_be_asked_and_stays_offline(tmp_path: Path, fake: Any) -> None:
    tool = fake("wandb")
    tool.module.login = lambda verify: pytest.fail("it would ask at the terminal")
    create_tracker("wandb", run_in(tmp_path), {})
    assert tool.inits[0]["mode"] == "offline"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(ModuleNotFoundError, match=f"^track is '{name}'; pip install {name}$"):
        create_tracker(name, run_in(tmp_path), {})


def test_a_folder_named_wandb_is_no_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb leaves such a folder where it ran, and Python would import it."""
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match=r"^track is 'wandb'; pip install wandb$"):
        check_tracker("wandb")
    sys.modules.pop("wandb", None)


def test_an_unknown_tracker() -> None:
    with pytest.raises(ValueError, match="track is 'mlflow'; it must be one of tensorboard, wandb, trackio"):
        check_tracker("mlflow")


@pytest.mark.parametrize("fails", ["init", "log"])
def test_a_failing_tracker_is_said_once(
    fails: str, tmp_path: Path, fake: Any, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = fake("wandb")
    tool.fails = fails
    tracker = create_tracker("wandb", run_in(tmp_path), {})
    for step in (20, 40):
        tracker.log(step, {"loss": 0.5})
        tracker.images(step, {"samples": picture})
    tracker.close()
    said = capsys.readouterr().err
    assert said == "track is 'wandb'; it has failed (ConnectionError: no network). The run goes on.\n"


def test_a_picture_that_is_missing_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    tracker = create_tracker("tensorboard", run_in(tmp_path), {})
    tracker.images(20, {"samples": tmp_path / "none.png"})
    tracker.log(20, {"loss": 0.5})
    tracker.close()
    assert "track is 'tensorboard'; it has failed (FileNotFoundError" in capsys.readouterr().err
    assert [event.value for event in events(tmp_path / "digits").Scalars("loss")] == [0.5]


def test_no_tracker_does_nothing(tmp_path: Path) -> None:
    tracker = create_tracker("", run_in(tmp_path), {})
    tracker.log(20, {"loss": 0.5})
    tracker.images(20, {"samples": tmp_path / "none.png"})
    tracker.close()
    assert not tracker.failed
    assert not list((tmp_path / "digits").iterdir())


@pytest.mark.slow
def test_what_takes_long_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys; sys.path.insert(0, 'models'); import switch_dit.tracking, switch_dit.trainer; "
        "slow = {'tensorboard', 'wandb', 'trackio', 'torch.utils.tensorboard', 'switch_dit.mmdit', "
        "'diffusers.models.transformers.transformer_sd3'}; print(*(slow & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == ""
