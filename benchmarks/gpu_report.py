"""Builds for the GPU of this machine, runs the tests on it, then measures every kernel. `make gpu` runs it.

    python -m benchmarks.gpu_report                  # writes benchmarks/results/<gpu>.json, .md and .png
    python -m benchmarks.gpu_report --sanitize       # also compute-sanitizer's memcheck and racecheck

Where a test or the sanitizer fails there is no speed: the failures are printed, earlier results stay as they
are, and it exits with 1. It also exits with 1 where a kernel of ours is wrong or fails at a measured shape,
which the results then say. What does not fit into --minutes is listed as not measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_tables, gpu_timing
from benchmarks.case import COMPILED, PEER_TOLERANCE, Case, checked, describe
from benchmarks.environment import ROOT, git, version

# benchmarks.plans imports the compiled kernels, so it is imported after the build.

RESULTS = ROOT / "benchmarks" / "results"
TESTED = ("expert_linear", "expert_mlp", "timestep_gate", "diffusion_prior", "dispatch", "linear_assignment",
          "layer", "prior")  # fmt: skip
TOLERANCES = (
    "ours at most 1e-5 off (relative RMS) in float32, in bfloat16 1.5 times the error of the reference run "
    f"in bfloat16 or half a rounding step of it, others at most {PEER_TOLERANCE:g}."
)
STARTED = time.monotonic()
WRITING_SECONDS = 10
WARM_UP_BYTES = 4 << 30  # of device memory, for a process that compiles the largest case


class Refused(Exception):
    """No speed is reported, for the reasons in it."""


class Budget:
    """The time that is left."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return max(0.0, self.end - WRITING_SECONDS - time.monotonic())


def say(text: str) -> None:
    print(f"gpu_report, {time.monotonic() - STARTED:.0f} s: {text}", flush=True)


def run(what: str, command: list[str], budget: Budget, **variables: str) -> None:
    """Runs a command in the repository; ``Refused`` with the end of its output where it fails."""
    say(what)
    try:
        result = subprocess.run(
            command, cwd=ROOT, env=os.environ | variables, check=False, timeout=budget.left(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Refused(f"{what}: did not end in time") from None
    if result.returncode != 0:
        raise Refused(f"{what}: exit code {result.returncode}\n{result.stdout[-4000:]}")


def build(budget: Budget) -> None:
    """Compiles csrc for this GPU."""
    major, minor = torch.cuda.get_device_capability()
    own = f"{major}{minor}{'a' if major == 9 else ''}"
    arch = os.environ.get("SWITCH_MOE_CUDA_ARCHS", own)
    command = [sys.executable, "-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps"]
    run("building", command, budget, SWITCH_MOE_CUDA="1", SWITCH_MOE_CUDA_ARCHS=arch)


def in_parallel(commands: list[list[str]], seconds: float, **variables: str) -> list[tuple[int | None, str]]:
    """Exit code (None: killed after ``seconds``) and output of commands that run at the same time."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(i)) for i in range(len(commands))]
        running = []
        for command, log in zip(commands, logs, strict=True):
            with log.open("w") as file:
                running.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=os.environ | variables, stdout=file, stderr=subprocess.STDOUT
                    )
                )
        codes: list[int | None] = []
        for process in running:
            try:
                codes.append(process.wait(max(0.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:  # noqa: PERF203
                process.kill()
                process.wait()
                codes.append(None)
        return [(code, log.read_text(errors="replace")) for code, log in zip(codes, logs, strict=True)]


def test_files() -> list[str]:
    """The tests that start kernels."""
    found = {path for stem in TESTED for path in (ROOT / "tests").glob(f"test_{stem}*.py")}
    return sorted(str(path.relative_to(ROOT)) for path in found)


def run_tests(files: list[str], processes: int, budget: Budget) -> dict[str, Any]:
    """Runs the tests in several processes, since Triton compiles each kernel for seconds."""
    say(f"testing {len(files)} files in {processes} processes")
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", *files]
    shards = [[*pytest, "--shard", f"{i + 1}/{processes}"] for i in range(processes)]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    results = in_parallel(shards, budget.left(), OMP_NUM_THREADS=threads)
    failures = failed_tests(results)
    passed = sum(int(n) for _, output in results for n in re.findall(r"(\d+) passed", output)[-1:])
    if not failures and passed == 0:
        failures = ["no test ran"]
    if failures:
        raise Refused("\n".join(["tests failed:", *failures]))
    return {"passed": passed, "files": files, "processes": processes}


def failed_tests(results: list[tuple[int | None, str]]) -> list[str]:
    """A line for each failed test; the end of the output of a process that names none."""
    failures = []
    for code, output in results:
        if code is None:
            failures.append("the tests did not end in time; the last line: " + output.rstrip()[-200:])
        elif code not in (0, 5):  # 5: a shard without tests
            named = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
            failures += named or [f"exit code {code}: {output[-2000:]}"]
    return failures


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME")
    inside = (
        [Path(home, folder, "compute-sanitizer") for folder in ("bin", "compute-sanitizer")] if home else []
    )
    return next((str(path) for path in inside if path.is_file()), shutil.which("compute-sanitizer"))


def sanitize(budget: Budget) -> str:
    """memcheck and racecheck over our kernels at tiny shapes."""
    tool = find_sanitizer()
    if tool is None:
        return "not found in CUDA_HOME or PATH"
    small = [sys.executable, "-m", "benchmarks.plans", "--small"]
    for check_name in ("memcheck", "racecheck"):
        command = [tool, "--tool", check_name, "--error-exitcode", "9", *small]
        run(f"compute-sanitizer {check_name}", command, budget, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return "memcheck and racecheck found nothing"


def warm_up(processes: int, seconds: float) -> None:
    """Compiles the kernels of all cases in parallel into the caches on disk."""
    say(f"compiling in {processes} processes")
    command = [sys.executable, "-m", "benchmarks.plans", "--warm"]
    in_parallel([[*command, f"{i + 1}/{processes}"] for i in range(processes)], seconds)


def floor_us(flops: float, moved: float, limits: dict[str, float], dtype: str) -> float:
    """The least microseconds on a device with these measured ceilings."""
    return max(flops / limits[f"{dtype}_tflops"] / 1e6, moved / limits["gbps"] / 1e3)


def measure(
    cases: Iterable[Case], machine: dict[str, Any], limits: dict[str, float], budget: Budget
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """A row for each case, pass and contender; then what did not fit into the time."""
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for case in cases:
        named = {"what": case.name, "operation": case.operation, "note": case.note}
        if budget.left() < case.seconds:
            skipped.append(named | {"reason": "time"})
            continue
        say(case.name)
        try:
            rows += measure_case(case, machine["l2_bytes"], limits)
        except torch.cuda.OutOfMemoryError:
            skipped.append(named | {"reason": "out of memory"})
        if case.note == COMPILED:
            torch.compiler.reset()  # dynamo compiles one function for a few shapes only
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows, skipped


def measure_case(case: Case, cache_bytes: int, limits: dict[str, float]) -> list[dict[str, Any]]:
    """Checks the contenders, then times those that are right."""
    from benchmarks import counts

    inputs = case.make(0)
    found = {contender.name: checked(case, contender, inputs) for contender in case.contenders}
    right = [contender for contender in case.contenders if found[contender.name]["failure"] is None]
    read = [sum(inputs[name].nbytes for name in (*c.leaves, *c.reads)) for c in case.contenders]
    count = gpu_timing.input_sets(min(read), cache_bytes)
    sets = [inputs, *(case.make(seed) for seed in range(1, count))] if right else []
    rows = []
    for which in case.passes:
        steps = {c.name: [case.step(c, one, which) for one in sets] for c in right}
        timings = gpu_timing.time_steps(steps)
        for contender in case.contenders:
            row: dict[str, Any] = {
                "case": case.name, "operation": case.operation, "note": case.note, "shape": case.shape,
                "dtype": str(case.dtype).removeprefix("torch."), "pass": which, "contender": contender.name,
                "ours": contender.ours, "method": None, "microseconds": None, "quartiles": None,
                "tflops": None, "gbps": None, "floor_us": None, "fraction": None, "peak_bytes": None,
                "sets": count,
                **found[contender.name],
            }  # fmt: skip
            timing = timings.get(contender.name)
            if isinstance(timing, Exception):
                row["failure"] = describe(timing)
            elif timing is not None:
                flops, moved = case.work(contender, inputs, which)
                peak = counts.peak_bytes(steps[contender.name][0], "cuda")
                median, floor = timing.median(), floor_us(flops, moved, limits, row["dtype"])
                row |= {
                    "method": timing.method, "microseconds": median, "quartiles": timing.quartiles(),
                    "tflops": flops / median / 1e6, "gbps": moved / median / 1e3, "floor_us": floor,
                    "fraction": floor / median, "peak_bytes": peak,
                }  # fmt: skip
            rows.append(row)
    return rows


def environment(commit: str | None) -> dict[str, Any]:
    """Machine, versions and commit."""
    machine = gpu_timing.machine()
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"

    return {
        "machine": machine | {"driver": driver},
        "versions": {
            "CUDA": torch.version.cuda or "none", "torch": torch.__version__, "triton": version("triton"),
            "python": platform.python_version(), "switch_moe": version("switch_moe"),
        },
        "commit": commit or git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }  # fmt: skip


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """JSON, Markdown and plot; earlier ones are replaced when all three are ready."""
    slug = re.sub(r"[^a-z0-9]+", "-", report["machine"]["gpu"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder / f"{slug}.{kind}" for kind in ("json", "md", "png")]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        ready = [Path(scratch, path.name) for path in targets]
        ready[0].write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        read_back = json.loads(ready[0].read_text())
        ready[1].write_text(gpu_tables.markdown(read_back))
        gpu_tables.plot(read_back, ready[2])
        for source, target in zip(ready, targets, strict=True):
            source.replace(target)
    return targets


def find_device() -> str | None:
    return "cuda" if torch.cuda.is_available() else None


def plan(device: str) -> Iterable[Case]:
    from benchmarks.plans import full_plan

    return full_plan(device)


def report_on(device: str, arguments: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """All steps but the writing. ``Refused`` where there must be no speed."""
    report = environment(arguments.commit)
    if not arguments.no_build:
        build(budget)
    report["tests"] = run_tests(test_files(), arguments.processes, budget)
    report["sanitizer"] = sanitize(budget) if arguments.sanitize else "not run"
    fitting = max(1, report["machine"]["memory_bytes"] // WARM_UP_BYTES)
    warm_up(min(arguments.processes, fitting), budget.left() / 2)
    from switch_moe.ops._backend import choose

    from benchmarks.peers import peers

    report["backend"] = choose("expert_linear", "auto", torch.device(device), ("cpu",), triton=True)
    report["ceilings"] = gpu_timing.ceilings()
    report["tolerances"] = TOLERANCES
    rows, skipped = measure(plan(device), report["machine"], report["ceilings"], budget)
    if not rows:
        raise Refused("no time was left to measure anything; give it more with --minutes")
    report["cases"] = rows
    missing = [{"what": name, "reason": reason} for name, reason in peers()[1].items()]
    report["not_measured"] = [*skipped, *missing]
    report["verdicts"] = gpu_tables.verdicts(report)
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything, 8 by default")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--commit", help="what to name as the commit where there is no git repository")
    parser.add_argument("--no-build", action="store_true", help="the kernels are built")
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer too")
    arguments = parser.parse_args(argv)
    device = find_device()
    if device is None:
        print("gpu_report: torch sees no GPU here; run it on a machine with one", file=sys.stderr)
        return 1
    try:
        report = report_on(device, arguments, Budget(arguments.minutes))
    except Refused as refused:
        print(f"gpu_report: no speed is reported.\n{refused}", file=sys.stderr)
        return 1
    paths = write(report, arguments.output)
    print(paths[1].read_text())
    say("wrote " + ", ".join(str(path) for path in paths))
    broken = [row for row in report["cases"] if row["ours"] and row["failure"] not in (None, "out of memory")]
    for row in broken:
        print(f"gpu_report: {row['case']}, {row['contender']}: {row['failure']}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
