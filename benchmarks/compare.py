"""Whether a change made anything slower: this tree and a revision, timed side by side on this machine.

    python -m benchmarks.compare --base main

Each has a process of its own; the two take turns, call by call. Of pairs of times (a_i, b_i), new and old,

    r_i = log(a_i / b_i)    e = median(r)    s = 1.2533 * 1.4826 * median |r_i - e| / sqrt(rounds)

where 1.4826 turns a median absolute deviation into a standard deviation, and 1.2533 the error of a mean into
that of a median. The interval of the ratio is exp(e - 3 s) to exp(e + 3 s). Slower: all of it is above the
limit. Faster: all of it is below 1 / limit. Exits with 1 where something became slower, with 2 where nothing
can be compared.
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

from benchmarks.environment import DEVICE, ROOT

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


def change(case: str, log_ratios: list[float]) -> Change:
    """The change from log(new / old) of every round."""
    centre = statistics.median(log_ratios)
    deviation = 1.4826 * statistics.median(abs(ratio - centre) for ratio in log_ratios)
    error = 1.2533 * deviation / math.sqrt(len(log_ratios))
    return Change(case, *(math.exp(centre + side * WIDTH * error) for side in (-1, 0, 1)))


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
    parser.add_argument(
        "--base", metavar="REV", required=True, help="a git revision to build and to compare this tree with"
    )
    parser.add_argument("--rounds", type=int, default=15, help="15 by default, at least 5")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=DEVICE)
    parser.add_argument("--limit", type=float, default=1.05, help="ratio that passes, 1.05 by default")
    arguments = parser.parse_args(argv)
    if arguments.limit < 1 or arguments.rounds < 5:
        parser.error("--limit must be at least 1 and --rounds at least 5")
    changes = []
    try:
        for one in compare_revision(arguments.base, arguments.rounds, arguments.device):
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
