"""benchmarks/calibrate.py and calibrate.cu, where there is no GPU: what is compiled, computed and read."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import assembler, calibrate, sass
from benchmarks.case import BOTH, FORWARD

PASSES = (FORWARD, BOTH)
NVCC = assembler.cuda_tool("nvcc")
COPIES, MULTICAST, WGMMA = calibrate.KERNELS[:3]
INSTRUCTIONS = {
    "copy": r"UBLKCP\.S\.G \[",
    "multicast": r"UBLKCP\.S\.G\.MULTICAST",
    "product with A in registers": r"HGMMA\.64x128x16\.F32\.BF16 R\d+, R\d+, gdesc",
    "ldmatrix": r"LDSM\.16\.MT88\.4",
}
COPY, CAST, PRODUCT, LOAD = INSTRUCTIONS
ON_HOPPER = {  # the arguments of each kernel's template, and what it must hold
    "100": {COPY}, "300": {CAST}, "001": {PRODUCT}, "011": {PRODUCT, LOAD}, "111": {COPY, PRODUCT, LOAD},
    "211": {COPY, CAST, PRODUCT, LOAD},
}  # fmt: skip


def compiled(name: str, folder: Path) -> str:
    """The machine code of calibrate.cu for one architecture; no warning of ptxas may come with it."""
    output = folder / "calibrate.so"
    done = subprocess.run(
        calibrate.compile_command(NVCC, name, output), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert not re.search("Potential Performance Loss|warning", said), said
    return sass.disassemble(output)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize(("name", "kernels"), [("sm_80", ()), ("sm_90a", ON_HOPPER), ("sm_100a", ("100",))])
def test_machine_code(name: str, kernels: Iterable[str], tmp_path: Path) -> None:
    """Each kernel has the instructions that it measures and no others; where it cannot run it is empty."""
    found = {}
    for function in compiled(name, tmp_path).split("Function : ")[1:]:
        template = "".join(re.search(r"ILi(\d)ELb(\d)ELb(\d)E", function).groups())
        found[template] = {each for each, pattern in INSTRUCTIONS.items() if re.search(pattern, function)}
    assert found == {
        template: ON_HOPPER[template] if template in kernels else set() for template in ON_HOPPER
    }


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None or torch.cuda.is_available(), reason="needs nvcc, and a machine that fails")
def test_errors_of_cuda_are_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library is built and loaded as on a GPU; here its first call of CUDA fails."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    library, blocks = calibrate.build(tmp_path), ctypes.c_int()
    for which in range(len(calibrate.KERNELS)):
        assert library.calibrate(which, None, 1, None, None, ctypes.byref(blocks), None), which


@pytest.mark.parametrize(
    ("capability", "memory", "names"),
    [
        ((8, 0), 166_912, []),
        ((9, 0), 232_448, [kernel.name for kernel in calibrate.KERNELS]),
        ((10, 0), 232_448, ["copies"]),
        ((12, 0), 101_376, []),
    ],
)
def test_what_runs_where(capability: tuple[int, int], memory: int, names: list[str]) -> None:
    runs = [one.name for one in calibrate.KERNELS if calibrate.obstacle(one, capability, memory) is None]
    assert runs == names


def test_constants_are_those_of_the_kernels() -> None:
    source = calibrate.SOURCE.read_text()
    for name, number in {"kStages": 2, "kGroups": 3, "kChunks": calibrate.CHUNKS}.items():
        assert re.search(rf"{name} = {number}[,;]", source), name
    for name, size in {"kTokenBytes": calibrate.TOKEN_BYTES, "kExpertBytes": 24 << 10}.items():
        assert f"{name} = {size >> 10} << 10" in source
    assert calibrate.STAGE_BYTES == calibrate.TOKEN_BYTES + 2 * (24 << 10)


def test_rates() -> None:
    """132 blocks, 1000 steps in a millisecond: 80 KB a step arrive, half of it from L2 where two share it."""
    scale = 132 * 1000 / 1e-3 / 1e12
    found = calibrate.rates(MULTICAST, 132, 1000, 1e-3, 1755.0)
    assert found["tb_s_to_shared"] == pytest.approx(81920 * scale, rel=1e-4)
    assert found["tb_s_from_l2"] == pytest.approx(40960 * scale, rel=1e-4)
    assert calibrate.rates(COPIES, 132, 1000, 1e-3, 1755.0)["tb_s_from_l2"] == found["tb_s_to_shared"]
    found = calibrate.rates(WGMMA, 132, 1000, 1e-3, 1755.0)
    assert found == {
        "blocks": 132,
        "clock_mhz": 1755.0,
        "tflop_s": pytest.approx(6_291_456 * scale, rel=1e-4),
    }


def test_a_kernel_runs_for_a_fifth_of_a_second() -> None:
    launched = []

    def launch(which: int, steps: int) -> tuple[float, int, float]:
        launched.append(steps)
        return 1e-6 * steps, 132, calibrate.median_clock([[1_500_000, 1_000_000], [9, 1], [1, 1]])

    found = calibrate.measure(COPIES, launch)
    assert launched == [2000, 2000, 200_000]
    assert found["clock_mhz"] == 1500
    assert found["tb_s_to_shared"] == pytest.approx(132 * 81920 / 1e6, rel=1e-4)


class Library:
    """Takes the place of the compiled kernels: writes the spans of two blocks, or fails."""

    def __init__(self, error: bytes | None = None) -> None:
        self.error, self.started = error, []

    def calibrate(self, which, source, steps, sums, spans, blocks, stream) -> bytes | None:
        self.started.append(which)
        ctypes.cast(spans, ctypes.POINTER(ctypes.c_int64 * 4))[0][:] = [1500, 1000, 1500, 1000]
        blocks._obj.value = 2
        return self.error


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What calibrate.py takes from a GPU, without one: launches of a millisecond."""
    event = SimpleNamespace(record=int, synchronize=int, elapsed_time=lambda _: 1.0)
    properties = SimpleNamespace(multi_processor_count=2, shared_memory_per_block_optin=232_448, uuid="0")
    fake = SimpleNamespace(
        get_device_capability=lambda: (9, 0), get_device_properties=lambda _: properties, synchronize=int,
        Event=lambda **_: event, current_stream=lambda: SimpleNamespace(cuda_stream=0),
        is_available=lambda: True,
    )  # fmt: skip
    monkeypatch.setattr(calibrate.torch, "cuda", fake)
    monkeypatch.setattr(calibrate, "DEVICE", "cpu")


@pytest.mark.usefixtures("gpu")
def test_every_kernel_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = Library()
    monkeypatch.setattr(calibrate, "build", lambda _: library)
    monkeypatch.setattr(calibrate, "sample", lambda run: {"clock_mhz": 1.0 * len(run())})
    small = calibrate.package(2, 5, 16)
    assert list(small) == [f"{name}, {which}" for name in ("F.linear", "switch_moe") for which in PASSES]
    monkeypatch.setattr(calibrate, "package", lambda: small)
    assert calibrate.main([str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == [*(kernel.name for kernel in calibrate.KERNELS), *small]
    assert library.started == sorted(3 * list(range(len(calibrate.KERNELS))))
    assert all(found[kernel.name]["clock_mhz"] == 1500 for kernel in calibrate.KERNELS)


@pytest.mark.usefixtures("gpu")
def test_errors_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "build", lambda _: Library(b"an illegal instruction"))
    with pytest.raises(RuntimeError, match="copies: an illegal instruction"):
        calibrate.kernels()
    monkeypatch.undo()
    monkeypatch.setattr(calibrate, "cuda_tool", lambda _: None)
    with pytest.raises(calibrate.Unavailable, match="nvcc"):
        calibrate.build(Path())


def test_what_nvidia_smi_says() -> None:
    assert calibrate.parse_samples("1980, 612.5\n1755, 698.5\n1740, 699.0\n") == {
        "clock_mhz": 1755,
        "watts": 698.5,
    }
    assert calibrate.parse_samples("1980, [N/A]\n19") == {"clock_mhz": 1980}
    assert calibrate.parse_samples("No devices were found\n") == {}


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is missing or says something else, a reason takes the place of the numbers."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvidia-smi does not run" in calibrate.sample(lambda: None, 0.0)["left_out"]
    tool = tmp_path / "nvidia-smi"
    for said, found in (
        ("1500, 300", {"clock_mhz": 1500, "watts": 300}),
        ("denied", {"left_out": "nvidia-smi says: denied"}),
    ):
        tool.write_text(f"#!/bin/sh\necho '{said}'\n")
        tool.chmod(0o755)
        assert calibrate.sample(lambda: None, 1.0) == found
