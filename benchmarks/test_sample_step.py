"""A denoising step with guidance of whole models: see benchmarks/steps.py."""

from __future__ import annotations

import pytest

from benchmarks.steps import SAMPLE, Setting
from benchmarks.test_train_step import measure, parametrize


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, SAMPLE)


def test_sample_step(benchmark, recorder, setting: Setting) -> None:
    measure(setting, benchmark, recorder)
