"""A training step of whole models, through AdamW and the moving average: see benchmarks/steps.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.case import OURS
from benchmarks.conftest import Recorder
from benchmarks.measure import time_with
from benchmarks.steps import TRAIN, Prepared, Setting, settings_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, TRAIN)


def parametrize(metafunc: pytest.Metafunc, which: str) -> None:
    """``setting``: the steps of each device."""
    quick = metafunc.config.getoption("--quick")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = [setting for device in devices for setting in settings_of(which, device, quick)]
    metafunc.parametrize("setting", found, ids=[f"{setting} {setting.device}" for setting in found])


def measure(setting: Setting, benchmark: Any, recorder: Recorder) -> None:
    """Checks, times in turns and records all contenders; pytest-benchmark times ours."""
    prepared = Prepared(setting)
    wrong, samples = prepared.checks[OURS]["failure"], {}
    if wrong is None:
        benchmark.group = setting.group
        samples = time_with(benchmark, prepared.steps, OURS, recorder.seconds, setting.device)
    for row in prepared.rows(samples):
        recorder.add(**row)
    if wrong is not None:
        pytest.fail(f"nothing is timed: {wrong}")


def test_train_step(benchmark, recorder, setting: Setting) -> None:
    measure(setting, benchmark, recorder)
