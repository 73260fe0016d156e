"""Builds for the GPU of this machine, tests, calibrates and measures, in nine minutes. `make gpu` runs it.

    python -m benchmarks.gpu                  # writes benchmarks/results/<gpu>.json, the page and the README
    python -m benchmarks.gpu --sanitize       # 20 minutes more, for compute-sanitizer

Each step has its share of the time, and what the steps before it left. Benchmarks that have not begun by then
are left out; any other step that is late fails. Where a step fails nothing after it runs, earlier results
stay as they are, and it exits with 1: no speed is reported for a kernel whose tests fail. The CUDA kernels of
expert_linear stand beside Triton's, so where their tests fail they alone are left out, and it exits with 1
at the end. Arguments after `--` go to the benchmarks, for example `-- --peer-path official=../Switch-DiT`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks import assembler
from benchmarks.environment import ROOT, describe, slug

RESULTS = ROOT / "benchmarks" / "results"
SHARES = {  # seconds; without the sanitizer they are nine minutes
    "build": 60, "tests of the CUDA kernels": 40, "tests": 130, "tests under another assembler": 100,
    "sanitizer": 1200, "calibration": 40, "benchmarks": 150, "report": 20,
}  # fmt: skip
MARGIN = 45.0  # seconds for the benchmark that begins last; torch.compile takes most of them
# Their machine code depends on the assembler.
ASSEMBLED = ("expert_linear_kernels", "expert_mlp", "routed_mlp_kernels", "dispatch")
QUICK = "not broken"  # kernels broken on purpose need no GPU to be noticed
CALCULATES = f"{QUICK} and not compile and not opcheck"
CUDA_KERNELS = ("expert_linear_hopper",)
SANITIZED = ("dispatch", "expert_linear_kernels", "routed_mlp_kernels", "timestep_gate", "token_gate",
             "route_pairs", "diffusion_prior", "linear_assignment")  # fmt: skip
MEASURED = ("expert_linear", "layer", "expert_mlp", "routed_mlp", "steps", "growth", "timestep_gate",
            "token_gate", "diffusion_prior", "linear_assignment", "family_steps")  # fmt: skip
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# Without the options that ask for pytest-xdist, which may be missing, and without tests that use no GPU.
TESTS = [*PYTEST, "-o", "addopts=--strict-markers --import-mode=append", "--on-gpu"]


class Failed(Exception):
    """A step failed, and with it the run."""


class Budget:
    """When each step must have ended."""

    def __init__(self, steps: list[str], minutes: float | None) -> None:
        scale = 1.0 if minutes is None else 60 * minutes / sum(SHARES[step] for step in steps)
        self.shares = {step: scale * SHARES[step] for step in steps}
        self.end = time.monotonic()
        self.took: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Adds the share of a step to the time, and says what it took."""
        started = time.monotonic()
        self.end += self.shares[name]
        yield
        self.took[name] = round(time.monotonic() - started, 1)
        print(f"gpu: {name} took {self.took[name]} s; the share is {self.shares[name]:.0f} s", flush=True)

    def left(self) -> float:
        """Seconds until the present step must have ended."""
        return max(1.0, self.end - time.monotonic())


def run(what: str, command: list[str], seconds: float, **variables: str) -> None:
    """Runs a command in the repository; ``Failed`` where it fails or does not end in time."""
    print(f"gpu: {what}: {' '.join(command)}", flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Failed(f"{what} did not end in {seconds:.0f} s; give it more with --minutes") from None
    if done.returncode != 0:
        raise Failed(f"{what} failed with exit code {done.returncode}")


def build(seconds: float) -> None:
    """Compiles csrc for this GPU, unless SWITCH_MOE_CUDA_ARCHS names others."""
    own = assembler.architecture(torch.cuda.get_device_capability()).removeprefix("sm_")
    command = [sys.executable, "-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps", "-q"]
    archs = os.environ.get("SWITCH_MOE_CUDA_ARCHS", own)
    run("the build", command, seconds, SWITCH_MOE_CUDA="1", SWITCH_MOE_CUDA_ARCHS=archs)


def test_files(stems: tuple[str, ...], folder: str) -> list[str]:
    """The files of tests or benchmarks whose names begin with one of the stems, in their order."""
    found = [path for stem in stems for path in sorted((ROOT / folder).glob(f"test_{stem}*.py"))]
    return list(dict.fromkeys(str(path.relative_to(ROOT)) for path in found))


def test(what: str, arguments: list[str], processes: int, seconds: float, **variables: str) -> None:
    """Runs tests on the GPU. Triton compiles each kernel for seconds, so they run in several processes where
    pytest-xdist is installed.
    """
    parallel = ["-n", str(processes)] if importlib.util.find_spec("xdist") else []
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    run(what, [*TESTS, *parallel, *arguments], seconds, OMP_NUM_THREADS=threads, **variables)


def outcomes(path: Path) -> dict[str, dict[str, int]]:
    """How many tests of each file passed and how many were skipped, from the XML that pytest wrote."""
    found: dict[str, Counter[str]] = {}
    if not path.exists():  # the tests did not end
        return {}
    for case in ElementTree.parse(path).iter("testcase"):
        file = ".".join(case.attrib["classname"].split(".")[:2])  # the rest is the class
        states = [part.tag for part in case if part.tag in ("failure", "error", "skipped")]
        found.setdefault(file, Counter())[states[0] if states else "passed"] += 1
    return {file: dict(count) for file, count in sorted(found.items())}


def test_cuda_kernels(processes: int, seconds: float, xml: Path) -> bool:
    """Whether the tests of the CUDA kernels of expert_linear pass, or are skipped where there are none."""
    try:
        files = test_files(CUDA_KERNELS, "tests")
        test("the tests of the CUDA kernels", [*files, f"--junitxml={xml}"], processes, seconds)
    except Failed as failed:
        print(f"gpu: {failed}. Triton's kernels are measured without them.", file=sys.stderr, flush=True)
        return False
    return True


def test_again(processes: int, seconds: float) -> None:
    """Runs the tests of kernels that a wrong assembler may spoil, under another one where there is any."""
    own, second, variable = assembler.pair(torch.cuda.get_device_capability())
    if second is None:
        print(f"gpu: Triton's ptxas {own} is the only one here, so no kernel is tested under another")
        return
    arguments = ["-k", CALCULATES, *test_files(ASSEMBLED, "tests")]
    with tempfile.TemporaryDirectory() as cache:  # what the first assembler made is not taken
        folders = {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
        what = f"the tests under ptxas {second} instead of {own}"
        test(what, arguments, processes, seconds, **folders, **{variable: second.path})


def sanitize(stems: tuple[str, ...], seconds: float) -> None:
    """memcheck and racecheck over the tests of the kernels."""
    tool = assembler.cuda_tool("compute-sanitizer")
    if tool is None:
        raise Failed("--sanitize needs compute-sanitizer, which is not in CUDA_HOME or PATH")
    end = time.monotonic() + seconds
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *TESTS, *test_files(stems, "tests")]
        left = max(1.0, end - time.monotonic())
        run(f"compute-sanitizer {check}", command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def measure(ready: Path, information: Path, arguments: list[str], cuda: bool, seconds: float) -> None:
    """Runs the benchmarks on the GPU, in the order of what the README shows."""
    time_for_all = max(0.0, seconds - MARGIN)
    command = [*PYTEST, *test_files(MEASURED, "benchmarks"), "--device", "cuda", f"--benchmark-json={ready}",
               f"--machine-info={information}", f"--seconds={time_for_all:.0f}", *arguments]  # fmt: skip
    run("the benchmarks", command, seconds, SWITCH_MOE_MEASURE_CUDA=str(int(cuda)))
    if not ready.exists():
        raise Failed("no benchmark had the time to begin")


def all_steps(arguments: argparse.Namespace) -> bool:
    """Every step in its order, and whether the CUDA kernels are among what was measured, if there are any.

    The result file is put in its place when all of it is there.
    """
    without = {"build"} if arguments.no_build else set()
    without |= set() if arguments.sanitize else {"sanitizer"}
    without |= {"calibration"} if arguments.no_calibration else set()
    budget = Budget([step for step in SHARES if step not in without], arguments.minutes)
    processes, output = arguments.processes, arguments.output
    if not arguments.no_build:
        with budget.step("build"):
            build(budget.left())
    with tempfile.TemporaryDirectory() as scratch:
        xml, of_cuda = Path(scratch, "tests.xml"), Path(scratch, "cuda.xml")
        with budget.step("tests of the CUDA kernels"):
            cuda = test_cuda_kernels(processes, budget.left(), of_cuda)
        with budget.step("tests"):
            left_out = [f"--ignore={file}" for file in test_files(CUDA_KERNELS, "tests")]
            test(
                "the tests", ["tests", *left_out, "-k", QUICK, f"--junitxml={xml}"], processes, budget.left()
            )
        tested = outcomes(of_cuda) | outcomes(xml)
    with budget.step("tests under another assembler"):
        test_again(processes, budget.left())
    if arguments.sanitize:
        with budget.step("sanitizer"):
            sanitize((*SANITIZED, *(CUDA_KERNELS if cuda else ())), budget.left())
    output.mkdir(parents=True, exist_ok=True)
    target = output / f"{slug(describe('cuda'))}.json"
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        ready, information = Path(scratch, target.name), Path(scratch, "machine.json")
        found: dict[str, Any] = {"seconds_of_steps": budget.took, "tests": tested}
        if not arguments.no_calibration:
            with budget.step("calibration"):
                command = [sys.executable, "-m", "benchmarks.calibrate", str(information)]
                run("the calibration", command, budget.left())
            found["calibration"] = json.loads(information.read_text())
        information.write_text(json.dumps(found))
        with budget.step("benchmarks"):
            measure(ready, information, arguments.benchmarks, cuda, budget.left())
        ready.replace(target)
    print(f"gpu: wrote {target}")
    if output == RESULTS:
        with budget.step("report"):
            run("the report", [sys.executable, "-m", "benchmarks.report"], budget.left())
    return cuda


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument(
        "--minutes", type=float, help="time for everything, 9 by default (29 with --sanitize)"
    )
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1), help="of the tests")
    parser.add_argument("--no-build", action="store_true", help="the kernels are built")
    parser.add_argument("--no-calibration", action="store_true", help="leave calibrate.py out")
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer too")
    parser.add_argument("benchmarks", nargs="*", metavar="-- ARGUMENT", help="of pytest benchmarks")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu: torch sees no GPU here; run it on a machine with one", file=sys.stderr)
        return 1
    try:
        cuda = all_steps(arguments)
    except Failed as failed:
        print(f"gpu: {failed}. No speed is reported.", file=sys.stderr)
        return 1
    if not cuda:
        print("gpu: the CUDA kernels failed their tests; no speed of theirs is reported.", file=sys.stderr)
    return 0 if cuda else 1


if __name__ == "__main__":
    raise SystemExit(main())
