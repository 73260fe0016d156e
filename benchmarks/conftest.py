"""Options of the benchmarks, the rows that they record, and the ratio tables at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.case import Case, Inputs, checked
from benchmarks.environment import describe
from benchmarks.peers import parse_peer_path, peer_states

GROUPS = ("gate", "expert_linear", "expert_mlp", "assignment", "prior", "layer", "train_step", "sample_step",
          "growth")  # fmt: skip


class Recorder:
    """Rows of this session.

    ``quick``: few shapes and rounds. ``seconds``: for the rounds of a line of a table; ``least`` of them.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.quick: bool = config.getoption("--quick")
        self.seconds, self.least = (0.4, 5) if self.quick else (3.0, 7)
        self.rows: list[dict[str, Any]] = []
        self._checked: dict[Any, dict[str, dict[str, Any]]] = {}

    def check(self, case: Case, inputs: Inputs) -> dict[str, dict[str, Any]]:
        """What :func:`benchmarks.case.checked` found for each contender, once for all passes."""
        key = (case.name, case.dtype, next(iter(inputs.values())).device)
        if key not in self._checked:
            memo: dict[Any, Any] = {}
            self._checked[key] = {c.name: checked(case, c, inputs, memo) for c in case.contenders}
        return self._checked[key]

    def add(self, **row: Any) -> None:
        assert row["group"] in GROUPS
        self.rows.append(row)

    def report(self) -> dict[str, Any]:
        """What a result file holds."""
        return {"format": 1, **describe(), "quick": self.quick, "peers": peer_states(), "rows": self.rows}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("switch_moe")
    group.addoption("--quick", action="store_true", help="few shapes and rounds: about a minute on two cores")
    group.addoption(
        "--peer-path", action="append", default=[], metavar="NAME=DIR",
        help="a clone of another library, for example official=../Switch-DiT; may be given several times",
    )  # fmt: skip
    group.addoption("--results", type=Path, metavar="FILE", help="write the measurements as JSON")


def pytest_configure(config: pytest.Config) -> None:
    try:
        for text in config.getoption("--peer-path"):
            parse_peer_path(text)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[_RECORDER] = Recorder(config)


_RECORDER = pytest.StashKey[Recorder]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``measured``: the passes of ``cases(device, quick)`` of the module, on each device."""
    if "measured" in metafunc.fixturenames:
        from benchmarks.measure import Measured

        module, quick = metafunc.module, metafunc.config.getoption("--quick")
        found = [
            Measured(group, case, which, device)
            for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
            for group, case in module.cases(device, quick)
            for which in case.passes
        ]
        metafunc.parametrize("measured", found, ids=[str(one) for one in found])


@pytest.fixture
def recorder(pytestconfig: pytest.Config) -> Recorder:
    return pytestconfig.stash[_RECORDER]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    recorder = config.stash[_RECORDER]
    if not recorder.rows:
        return
    from benchmarks.report import ratio_tables

    report = recorder.report()
    terminalreporter.section("time as a multiple of the first column's, medians of turns side by side")
    terminalreporter.write(ratio_tables(report))
    path: Path | None = config.getoption("--results")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        terminalreporter.write_line(f"wrote {path}")
