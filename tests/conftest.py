"""What is tested, and how: the installed package, and Triton kernels in its interpreter without a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The workers share the cores: a thread that spins while it waits takes them from another worker. OpenMP reads
# this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

ROOT = Path(__file__).resolve().parent.parent
# At the end of the path: the package that is installed comes before the folder of the same name here.
sys.path += [str(ROOT / "tests"), str(ROOT / "models"), str(ROOT)]
import helpers  # noqa: E402
import interpreter_bfloat16  # noqa: E402

# The rest of test_family.py, which is too long for one file: --golden runs them with it.
FAMILY = ("test_family_tokens.py", "test_family_gates.py", "test_mmdit.py")

if not torch.cuda.is_available():  # settled before the kernels are imported
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Tests of plain PyTorch alone would pass, and say nothing about the compiled code."""
    if config.getoption("--golden"):
        helpers.GOLDEN = Path(config.getoption("--golden")).absolute()
        for path in [arg for arg in config.args if arg.endswith("test_family.py")]:
            config.args += [path.replace("test_family.py", name) for name in FAMILY]
    from switch_moe import native
    from switch_moe.ops import _backend

    if not torch.cuda.is_available() and _backend.triton_reason(torch.device("cpu")) is None:
        interpreter_bfloat16.install()
        _backend.INTERPRETER_HAS_BFLOAT16 = True
    if native.cpu.reason is not None and os.environ.get("SWITCH_MOE_CPU") != "0":
        raise pytest.UsageError(f"{native.cpu.reason}; to test without it set SWITCH_MOE_CPU=0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        help="other files of the form of those in tests/golden, for test_golden and test_family",
    )
    parser.addoption(
        "--on-gpu", action="store_true", help="only tests that start kernels where there is a GPU"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--on-gpu"):
        config.hook.pytest_deselected(items=[item for item in items if not runs_on_gpu(item)])
        items[:] = [item for item in items if runs_on_gpu(item)]


def runs_on_gpu(item: pytest.Item) -> bool:
    """Whether a test takes ``device``, or is skipped without a GPU."""
    reasons = [mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")]
    return "device" in getattr(item, "fixturenames", ()) or any("GPU" in reason for reason in reasons)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core, at most eight. With a GPU there are at most four, for they share its memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4 if torch.cuda.is_available() else 8)


@pytest.fixture
def device() -> str:
    """Where the Triton kernels are tested: a GPU, or the interpreter on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty holds NaN: whatever is read before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
