"""Builds for the GPU of this machine, runs the tests on it, then measures every kernel. `make gpu` runs it.

    python -m benchmarks.gpu                  # writes benchmarks/results/<gpu>.json, the page and the README
    python -m benchmarks.gpu --sanitize       # also compute-sanitizer's memcheck and racecheck

Where a step fails nothing after it runs, earlier results stay as they are, and it exits with 1: no speed is
reported for a kernel whose tests fail. Arguments after `--` go to the benchmarks, for example
`-- --peer-path official=../Switch-DiT`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.environment import ROOT, describe, slug

RESULTS = ROOT / "benchmarks" / "results"
TESTED = ("expert_linear", "expert_mlp", "timestep_gate", "diffusion_prior", "dispatch", "linear_assignment",
          "layer", "prior", "no_host_wait")  # fmt: skip
SANITIZED = ("dispatch", "expert_linear_kernels", "timestep_gate", "diffusion_prior", "linear_assignment")
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
TESTS = [*PYTEST, "-o", "addopts="]  # without the options that ask for pytest-xdist, which may be missing


class Failed(Exception):
    """A step failed, and with it the run."""


def run(what: str, command: list[str], end: float, **variables: str) -> None:
    """Runs a command in the repository; ``Failed`` where it fails or does not end in time."""
    print(f"gpu: {what}: {' '.join(command)}", flush=True)
    try:
        left = max(1.0, end - time.monotonic())
        done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=False, timeout=left)
    except subprocess.TimeoutExpired:
        raise Failed(f"{what} did not end in time; give it more with --minutes") from None
    if done.returncode != 0:
        raise Failed(f"{what} failed with exit code {done.returncode}")


def build(end: float) -> None:
    """Compiles csrc for this GPU, unless SWITCH_MOE_CUDA_ARCHS names others."""
    major, minor = torch.cuda.get_device_capability()
    own = f"{major}{minor}{'a' if major == 9 else ''}"
    command = [sys.executable, "-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps", "-q"]
    archs = os.environ.get("SWITCH_MOE_CUDA_ARCHS", own)
    run("the build", command, end, SWITCH_MOE_CUDA="1", SWITCH_MOE_CUDA_ARCHS=archs)


def test_files(stems: tuple[str, ...]) -> list[str]:
    """The test files whose names begin with one of the stems."""
    found = {path for stem in stems for path in (ROOT / "tests").glob(f"test_{stem}*.py")}
    return sorted(str(path.relative_to(ROOT)) for path in found)


def test(processes: int, end: float) -> None:
    """Runs the tests that start kernels. Triton compiles each of them for seconds, so they run in several
    processes where pytest-xdist is installed.
    """
    parallel = ["-n", str(processes)] if importlib.util.find_spec("xdist") else []
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    run("the tests", [*TESTS, *parallel, *test_files(TESTED)], end, OMP_NUM_THREADS=threads)


def sanitize(end: float) -> None:
    """memcheck and racecheck over the tests of the kernels."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("compute-sanitizer", path=f"{home}/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if tool is None:
        raise Failed("--sanitize needs compute-sanitizer, which is not in CUDA_HOME or PATH")
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *TESTS, *test_files(SANITIZED)]
        run(f"compute-sanitizer {check}", command, end, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def measure(output: Path, arguments: list[str], end: float) -> Path:
    """Runs the benchmarks on the GPU. The result file is put in its place when all of it is there."""
    output.mkdir(parents=True, exist_ok=True)
    target = output / f"{slug(describe('cuda'))}.json"
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        ready = Path(scratch, target.name)
        command = [*PYTEST, "benchmarks", "--device", "cuda", f"--benchmark-json={ready}", *arguments]
        run("the benchmarks", command, end)
        ready.replace(target)
    return target


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=30.0, help="time for everything, 30 by default")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1), help="of the tests")
    parser.add_argument("--no-build", action="store_true", help="the kernels are built")
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer too")
    parser.add_argument("benchmarks", nargs="*", metavar="-- ARGUMENT", help="of pytest benchmarks")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu: torch sees no GPU here; run it on a machine with one", file=sys.stderr)
        return 1
    end = time.monotonic() + 60 * arguments.minutes
    try:
        if not arguments.no_build:
            build(end)
        test(arguments.processes, end)
        if arguments.sanitize:
            sanitize(end)
        target = measure(arguments.output, arguments.benchmarks, end)
        print(f"gpu: wrote {target}")
        if arguments.output == RESULTS:
            run("the report", [sys.executable, "-m", "benchmarks.report"], end)
    except Failed as failed:
        print(f"gpu: {failed}. No speed is reported.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
