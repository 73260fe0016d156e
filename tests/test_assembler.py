"""benchmarks/assembler.py: which ptxas the tests run under, and that Triton takes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import assembler, environment


def ptxas(path: Path, version: str, architectures: str = "'sm_90','sm_90a','sm_100a'") -> str:
    """A program that says what a ptxas of this version says."""
    said = f"Cuda compilation tools, release {version.rpartition('.')[0]}, V{version}"
    path.write_text(f'#!/bin/sh\n[ "$1" = --help ] && echo "{architectures}." || echo "{said}"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        (["12.8.93", "12.9.86"], "12.9.86"),  # of Triton 3.6.0
        (["12.8.93", "12.9.86", "13.2.10"], "13.2.10"),  # with a newer toolkit
        (["12.8.93", "13.0.88"], None),  # one that miscompiles
        (["12.8.93", "13.4.59", "13.1.80"], "13.4.59"),
        (["12.8.93", "12.8.93"], None),
    ],
)
def test_the_other_assembler(tmp_path: Path, versions: list[str], chosen: str | None) -> None:
    paths = [ptxas(tmp_path / str(i), version) for i, version in enumerate(versions)]
    paths += [ptxas(tmp_path / "old", "14.0.1", "'sm_90','sm_100'"), str(tmp_path / "missing")]
    own = assembler.assembler(paths[0])
    assert str(own) == versions[0]
    second = assembler.another(own, paths, "sm_90a")
    assert (second and str(second)) == chosen


def test_versions_are_in_the_result_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Made Up 100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = environment.describe("cuda")["assemblers"]
    assert found["triton"] != found["second"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["triton"])
    assert "assemblers" not in environment.describe("cpu")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_triton_takes_the_assembler_that_the_variable_names(
    capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, _, variable = assembler.pair(capability)
    monkeypatch.setenv(variable, ptxas(tmp_path / "ptxas", "13.7.1"))
    taken, _ = assembler.of_triton(10 * capability[0] + capability[1])
    assert taken.path == str(tmp_path / "ptxas") != own.path
