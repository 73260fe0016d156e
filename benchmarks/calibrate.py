"""What the GPU gives: copies from L2, shared memory under wgmma, and the clock under each kernel.

    python -m benchmarks.calibrate FILE       # writes one JSON object; `make gpu` does it

Kernels of calibrate.cu report their clock themselves, from two timers of the GPU. nvidia-smi is asked for the
clock under expert_linear and F.linear, while they run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.assembler import architecture, cuda_tool

SOURCE = Path(__file__).with_name("calibrate.cu")
STAGE_BYTES, TOKEN_BYTES, THREADS, CHUNKS = 80 << 10, 32 << 10, 512, 200  # as in calibrate.cu
SHARED_MEMORY = 2 * STAGE_BYTES + 1024 + 32
STEP_FLOPS = 2 * 192 * 256 * 64
DEVICE = "cuda"
SECONDS = 0.2  # of one kernel: its clock settles
SAMPLED_SECONDS = 2.0  # of one kernel while nvidia-smi looks, every 50 ms


class Kernel(NamedTuple):
    """A kernel of calibrate.cu; ``shared`` bytes of each stage are multicast to two blocks."""

    name: str
    copies: bool = False
    shared: int = 0
    multiplies: bool = False


KERNELS = (
    Kernel("copies", True),
    Kernel("multicast copies", True, STAGE_BYTES),
    Kernel("wgmma", multiplies=True),
    Kernel("wgmma + ldmatrix", multiplies=True),
    Kernel("wgmma + ldmatrix + copies", True, multiplies=True),
    Kernel("wgmma + ldmatrix + copies, tokens multicast", True, TOKEN_BYTES, True),
)  # fmt: skip


class Unavailable(Exception):
    """Something cannot be measured here; the text says why."""


def obstacle(kernel: Kernel, capability: tuple[int, int], shared_memory: int) -> str | None:
    """Why a kernel cannot run on a GPU, or None."""
    if capability < (9, 0):
        return "bulk copies and wgmma need sm_90"
    if capability != (9, 0) and (kernel.multiplies or kernel.shared):
        return "wgmma, and multicast here, are for sm_90a alone"
    if shared_memory < SHARED_MEMORY:
        return f"a block needs {SHARED_MEMORY} bytes of shared memory, the GPU has {shared_memory}"
    return None


def compile_command(nvcc: str, name: str, output: Path) -> list[str]:
    """nvcc's command for one architecture; what an older GPU leaves out is unused there (177)."""
    number = name.removeprefix("sm_")
    return [nvcc, "-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", "-diag-suppress=177",
            f"-gencode=arch=compute_{number},code={name}", str(SOURCE), "-o", str(output)]  # fmt: skip


def build(folder: Path) -> ctypes.CDLL:
    """Compiles calibrate.cu for the GPU of this machine and loads it."""
    nvcc = cuda_tool("nvcc")
    if nvcc is None:
        raise Unavailable("nvcc is not in CUDA_HOME or PATH")
    output = folder / "calibrate.so"
    command = compile_command(nvcc, architecture(torch.cuda.get_device_capability()), output)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc does not compile {SOURCE.name}:\n{done.stdout}{done.stderr}")
    library = ctypes.CDLL(str(output))
    library.calibrate.restype = ctypes.c_char_p
    return library


class Gpu:
    """Starts the kernels of the compiled library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        count = torch.cuda.get_device_properties(0).multi_processor_count
        self.library = library
        # From 0.5 to 2, of either sign: zeros would take less power, and clock higher.
        self.source = 0.5 + 1.5 * torch.rand(CHUNKS, STAGE_BYTES // 2, device=DEVICE)
        self.source = torch.where(torch.rand_like(self.source) < 0.5, self.source, -self.source).bfloat16()
        self.sums = torch.empty(count, THREADS, device=DEVICE)
        self.spans = torch.zeros(count, 2, dtype=torch.int64, device=DEVICE)

    def launch(self, which: int, steps: int) -> tuple[float, int, float]:
        """Seconds, blocks and the median clock in MHz of one launch."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        blocks, stream = ctypes.c_int(), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        source, sums, spans = (ctypes.c_void_p(t.data_ptr()) for t in (self.source, self.sums, self.spans))
        start.record()
        error = self.library.calibrate(which, source, steps, sums, spans, ctypes.byref(blocks), stream)
        if error is not None:
            raise RuntimeError(f"calibrate.cu, {KERNELS[which].name}: {error.decode()}")
        end.record()
        end.synchronize()
        spans_of_blocks = self.spans[: blocks.value].tolist()
        return start.elapsed_time(end) / 1e3, blocks.value, median_clock(spans_of_blocks)


def median_clock(spans: list[list[int]]) -> float:
    """MHz from pairs of cycles and nanoseconds."""
    return statistics.median(1e3 * cycles / nanoseconds for cycles, nanoseconds in spans)


def rates(kernel: Kernel, blocks: int, steps: int, seconds: float, clock: float) -> dict[str, float]:
    """What a launch moved and computed each second: TB/s into shared memory and from L2, TFLOP/s."""
    scale = blocks * steps / seconds / 1e12
    found = {"blocks": blocks, "clock_mhz": clock}
    if kernel.copies:
        found["tb_s_to_shared"] = scale * STAGE_BYTES
        found["tb_s_from_l2"] = scale * (STAGE_BYTES - kernel.shared / 2)
    if kernel.multiplies:
        found["tflop_s"] = scale * STEP_FLOPS
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def measure(kernel: Kernel, launch: Callable[[int, int], tuple[float, int, float]]) -> dict[str, float]:
    """Runs a kernel, first briefly, then for SECONDS."""
    which, brief = KERNELS.index(kernel), 2000
    launch(which, brief)
    steps = min(10_000_000, max(brief, int(brief * SECONDS / launch(which, brief)[0])))
    seconds, blocks, clock = launch(which, steps)
    return rates(kernel, blocks, steps, seconds, clock)


def kernels() -> dict[str, Any]:
    """The rates of every kernel of calibrate.cu, or why it has none."""
    capability, properties = torch.cuda.get_device_capability(), torch.cuda.get_device_properties(0)
    memory = properties.shared_memory_per_block_optin
    found: dict[str, Any] = {one.name: {"left_out": obstacle(one, capability, memory)} for one in KERNELS}
    possible = [one for one in KERNELS if found[one.name]["left_out"] is None]
    if not possible:
        return found
    with tempfile.TemporaryDirectory() as folder:
        try:
            gpu = Gpu(build(Path(folder)))
        except Unavailable as why:
            return found | {one.name: {"left_out": str(why)} for one in possible}
        return found | {one.name: measure(one, gpu.launch) for one in possible}


def parse_samples(text: str) -> dict[str, float]:
    """The median clock and power of nvidia-smi's lines "1980, 612.30"; what it does not know is left out."""
    columns: dict[str, list[float]] = {"clock_mhz": [], "watts": []}
    lines = [line.split(",") for line in text.splitlines()]
    for line in (line for line in lines if len(line) == len(columns)):  # the last may have been cut off
        for column, cell in zip(columns.values(), line, strict=True):
            with contextlib.suppress(ValueError):  # "[N/A]"
                column.append(float(cell))
    return {name: statistics.median(values) for name, values in columns.items() if values}


def sample(run: Callable[[], object], seconds: float = SAMPLED_SECONDS) -> dict[str, Any]:
    """What nvidia-smi says while ``run`` is called again and again."""
    device = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", f"--id=GPU-{device.uuid}", "--query-gpu=clocks.sm,power.draw",
               "--format=csv,noheader,nounits", "--loop-ms=50"]  # fmt: skip
    for _ in range(3):  # compiles
        run()
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        return {"left_out": f"nvidia-smi does not run: {error.strerror}"}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            run()
        torch.cuda.synchronize()
    process.terminate()
    text = process.communicate()[0]
    return parse_samples(text) or {"left_out": f"nvidia-smi says: {' '.join(text.split())[:200]}"}


def package(batch: int = 128, tokens: int = 256, size: int = 768) -> dict[str, Any]:
    """The clock under F.linear and expert_linear in bfloat16."""
    from benchmarks.case import LINEAR, SWITCH_MOE
    from benchmarks.test_expert_linear import linear_case

    case = linear_case(DEVICE, torch.bfloat16, batch, tokens, size)
    inputs = case.make(0)
    contenders = [one for one in case.contenders if one.name in (LINEAR, SWITCH_MOE)]
    return {
        f"{contender.name}, {which}": sample(case.call(contender, inputs, which))
        for contender in contenders
        for which in case.passes
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("calibrate: torch sees no GPU here", file=sys.stderr)
        return 1
    arguments.file.write_text(json.dumps(kernels() | package(), indent=1) + "\n")
    print(arguments.file.read_text(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
