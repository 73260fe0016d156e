"""Whether a change made anything slower: two revisions on this machine, or two result files of one machine.

    python -m benchmarks.compare --base main             # builds main beside this tree, times both in turns
    python -m benchmarks.compare OLD.json NEW.json       # of `pytest benchmarks --benchmark-json=...`

With ``--base`` each revision has a process of its own; the two take turns, call by call. Two result files
come from two runs, and a machine drifts between runs, so switch_moe is taken relative to what ran beside it
in the same round. In both cases there are pairs of times, (a_i, b_i), and

    r_i = log(a_i / b_i)    e = median(r)    s = 1.2533 * 1.4826 * median |r_i - e| / sqrt(rounds)

where 1.4826 turns a median absolute deviation into a standard deviation, and 1.2533 the error of a mean into
that of a median. The interval of the ratio is exp(e - 3 s) to exp(e + 3 s); for two files e is the difference
of the files' and s^2 the sum. Slower: all of the interval is above the limit. Faster: all of it is below
1 / limit. Exits with 1 where something became slower, with 2 where nothing can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.case import SWITCH_MOE
from benchmarks.environment import DEVICE, ROOT
from benchmarks.report import Line, Report, lines, load

SAME_MACHINE = ("device", "gpu", "cpu", "cpu_family", "cores", "threads", "isa")
WIDTH = 3.0  # standard errors on each side
CALLS = Path(__file__).parent / "compare_calls.py"


class Change(NamedTuple):
    """A time, new over old."""

    case: str
    low: float
    ratio: float
    high: float

    def verdict(self, limit: float) -> str:
        return "slower" if self.low > limit else "faster" if self.high < 1 / limit else "same"


def centre_and_error(values: list[float]) -> tuple[float, float]:
    """Median and its standard error, from the median absolute deviation."""
    centre = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - centre) for value in values)
    return centre, 1.2533 * deviation / math.sqrt(len(values))


def change(case: str, *log_ratios: list[float]) -> Change:
    """The change from log(new / old), or from log(new / base) and log(old / base)."""
    (centre, error), *others = map(centre_and_error, log_ratios)
    centre -= sum(other for other, _ in others)
    error = math.hypot(error, *(other for _, other in others))
    return Change(case, *(math.exp(centre + side * WIDTH * error) for side in (-1, 0, 1)))


def compare_files(old: Report, new: Report) -> Iterator[Change]:
    """Every line of switch_moe that both files have timed beside the same contender."""
    for key in SAME_MACHINE:
        if old.machine.get(key) != new.machine.get(key):
            values = f"{old.machine.get(key)!r} and {new.machine.get(key)!r}"
            raise ValueError(f"the files are of different machines: {key} is {values}")
    before = {label(line): line for line in lines(old)}
    for line in lines(new):
        pair = [found for found in (line, before.get(label(line))) if found]
        for base in (name for name in line.contenders if not name.startswith(SWITCH_MOE)):
            ratios = [log_ratios(found, base) for found in pair]
            if len(pair) == 2 and all(ratios):
                yield change(f"{label(line)}, beside {base}", *ratios)
                break


def label(line: Line) -> str:
    row = line.first
    axis = f" along {row['note']}" if row["operation"] == "growth" else ""
    return f"{row['operation']} {line.case}{axis} {row['dtype']} {row['pass']}"


def log_ratios(line: Line, base: str) -> list[float]:
    times, others = (line.contenders.get(name, {}).get("samples") or [] for name in (SWITCH_MOE, base))
    return [math.log(a / b) for a, b in zip(times, others, strict=False)]


class Worker:
    """A process that times calls of one tree's switch_moe, one sample for each line that it reads."""

    def __init__(self, tree: Path, device: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(CALLS), device], cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.cases: list[str] = json.loads(self._read())

    def sample(self, case: str) -> float | None:
        """Seconds of one call; None where this revision cannot run it."""
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return json.loads(self._read())

    def _read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"the process in {self.process.args} ended; its error is above")
        return line


def build(revision: str, folder: Path, device: str) -> None:
    """Checks a revision out into ``folder`` and builds it there."""
    git = ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(folder), revision]
    compile_ = [sys.executable, "setup.py", "build_ext", "--inplace"]
    cuda = "1" if device == "cuda" else "0"
    for command, where in ((git, ROOT), (compile_, folder)):
        print(f"compare: {' '.join(command)}", file=sys.stderr, flush=True)
        environment = os.environ | {"SWITCH_MOE_CUDA": os.environ.get("SWITCH_MOE_CUDA", cuda)}
        done = subprocess.run(
            command, cwd=where, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ValueError(f"{command} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def compare_trees(base: Path, tree: Path, rounds: int, device: str) -> Iterator[Change]:
    """Times every call of compare_calls.py in both trees."""
    workers = [Worker(base, device), Worker(tree, device)]
    try:
        for case in workers[0].cases:
            values = []
            for number in range(rounds + 1):  # the first one compiles
                order = (0, 1) if number % 2 else (1, 0)
                times = {which: workers[which].sample(case) for which in order}
                if None in times.values():
                    print(f"not in both revisions: {case}", flush=True)
                    break
                values.append(math.log(times[1] / times[0]))
            else:
                yield change(case, values[1:])
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()


def compare_revision(revision: str, rounds: int, device: str) -> Iterator[Change]:
    """This tree, as it is, against a revision."""
    with tempfile.TemporaryDirectory(prefix="switch_moe_base_") as scratch:
        folder = Path(scratch) / "tree"
        try:
            build(revision, folder, device)
            yield from compare_trees(folder, ROOT, rounds, device)
        finally:
            remove = ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(folder)]
            subprocess.run(remove, capture_output=True, check=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="OLD.json NEW.json")
    parser.add_argument("--base", metavar="REV", help="a git revision to build and to compare this tree with")
    parser.add_argument("--rounds", type=int, default=15, help="of --base, 15 by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=DEVICE, help="of --base")
    parser.add_argument("--limit", type=float, default=1.05, help="ratio that passes, 1.05 by default")
    arguments = parser.parse_args(argv)
    if len(arguments.files) != (0 if arguments.base else 2) or arguments.limit < 1 or arguments.rounds < 5:
        parser.error(
            "give either --base REV or OLD.json NEW.json, a --limit of at least 1, 5 --rounds or more"
        )
    changes = []
    try:
        if arguments.base:
            found = compare_revision(arguments.base, arguments.rounds, arguments.device)
        else:
            found = compare_files(*map(load, arguments.files))
        for one in found:
            changes.append(one)
            interval = f"{one.ratio:.3f} ({one.low:.3f} to {one.high:.3f})"
            print(f"{one.verdict(arguments.limit):8}{interval:26}{one.case}", flush=True)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    slow = sum(one.verdict(arguments.limit) == "slower" for one in changes)
    print(f"{len(changes)} times compared, new over old, at a limit of {arguments.limit:g}: {slow} slower")
    return 1 if slow else 0 if changes else 2


if __name__ == "__main__":
    raise SystemExit(main())
