"""Prints the ratios after the table."""

from __future__ import annotations

import platform

import pytest
import torch

_RATIOS: list[str] = []


@pytest.fixture
def ratios() -> list[str]:
    """Lines for the end of the report."""
    return _RATIOS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _RATIOS:
        threads = torch.get_num_threads()
        terminalreporter.section("ratios of medians taken side by side")
        terminalreporter.write_line(
            f"{platform.processor() or platform.machine()}, {threads} threads, torch {torch.__version__}"
        )
        for line in _RATIOS:
            terminalreporter.write_line(line)
