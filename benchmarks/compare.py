"""Whether a change made anything slower: compares two result files of one machine.

    python -m benchmarks.compare OLD.json NEW.json --limit 1.05

Two files come from two runs, and a machine drifts between runs. So ours is compared with what ran beside it,
round by round: with o_i the time of ours in round i and b_i that of a base, which a change of ours leaves
alone,

    r_i = log(o_i / b_i)    e = median(r of NEW) - median(r of OLD)    s^2 = s_OLD^2 + s_NEW^2
    s_FILE = 1.2533 * 1.4826 * median |r_i - median(r)| / sqrt(rounds)

where 1.4826 turns a median absolute deviation into a standard deviation, and 1.2533 the error of a mean into
that of a median. The interval of the ratio new / old is exp(e - 3 s) to exp(e + 3 s). Slower: all of it is
above the limit. Faster: all of it is below 1 / limit. What differs between two runs of one program beyond the
noise of their rounds (where memory lies, for instance) is for the limit to absorb. Rows without a base in
both files are compared by their times alone, and are flagged as unpaired.

Counts that do not depend on the machine are compared exactly: none may grow. Exits with 1 where something
became slower, failed or grew, with 2 where the files cannot be compared.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.case import COMPILED, LINEAR
from benchmarks.losses import DENSE_MODEL, label
from benchmarks.result_files import BadFile, Contenders, Report, Row, Turn, read, turns

BASES = (LINEAR, DENSE_MODEL, "expert loop", "official structure", "reference", COMPILED)  # the first in both
COUNTS = ("saved_bytes", "peak_bytes", "flops", "operators", "launches", "host_waits")
SAME_MACHINE = ("cpu", "cpu_family", "cores", "threads", "isa", "gpu")
LEAST_ROUNDS = 5
WIDTH = 3.0  # standard errors on each side
SLOWER, FASTER, SAME, UNCLEAR = "slower", "faster", "same", "too few rounds"


class Change(NamedTuple):
    """The time of a row of ours, new over old."""

    turn: Turn
    row: Row
    base: str | None  # None: unpaired
    ratio: float
    low: float
    high: float
    verdict: str

    def __str__(self) -> str:
        beside = f"beside {self.base}" if self.base else "unpaired"
        interval = f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f}), {beside}"
        return f"{self.verdict:8} {interval:40} {describe(self.turn, self.row)}"


def describe(turn: Turn, row: Row) -> str:
    return f"{turn.group}: {label(turn, row)}, {turn.dtype}, {turn.which}, {turn.device}, {row['contender']}"


def log_ratios(contenders: Contenders, name: str, base: str | None) -> list[float]:
    """``r_i``, or log times without a base."""
    times = contenders[name]["samples"]
    if base is None:
        return [math.log(time) for time in times]
    return [math.log(a / b) for a, b in zip(times, contenders[base]["samples"], strict=True)]


def find_base(old: Contenders, new: Contenders, name: str) -> str | None:
    """The contender to pair with: not ours, timed in the same rounds in both files."""
    paired = [
        other
        for other in old
        if other in new and not old[other]["ours"] and all(
            file[other]["samples"] and len(file[other]["samples"]) == len(file[name]["samples"])
            for file in (old, new)
        )
    ]  # fmt: skip
    known = [other for other in BASES if other in paired]
    return next(iter([*known, *sorted(paired)]), None)


def centre_and_error(values: list[float]) -> tuple[float, float]:
    """Median and its standard error, from the median absolute deviation."""
    centre = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - centre) for value in values)
    return centre, 1.2533 * deviation / math.sqrt(len(values))


def change(turn: Turn, old: Contenders, new: Contenders, name: str, limit: float) -> Change:
    """The change of a row that both files have timed."""
    base = find_base(old, new, name)
    values = [log_ratios(contenders, name, base) for contenders in (old, new)]
    (before, error_before), (after, error_after) = map(centre_and_error, values)
    error = math.hypot(error_before, error_after)
    low, middle, high = (math.exp(after - before + side * WIDTH * error) for side in (-1, 0, 1))
    if min(map(len, values)) < LEAST_ROUNDS:
        verdict = UNCLEAR
    else:
        verdict = SLOWER if low > limit else FASTER if high < 1 / limit else SAME
    return Change(turn, new[name], base, middle, low, high, verdict)


def compare(old: Report, new: Report, limit: float) -> tuple[list[Change], list[str], list[str]]:
    """Changes of time; what failed or grew; what can be compared in one file only."""
    before, after = turns(old["rows"]), turns(new["rows"])
    changes, worse, missing = [], [], []
    for here, there, where in ((before, after, "old"), (after, before, "new")):
        missing += [
            f"only in the {where} file: {describe(turn, row)}"
            for turn, contenders in here.items()
            for name, row in contenders.items()
            if name not in there.get(turn, {})
        ]
    for turn, contenders in before.items():
        for name, row in contenders.items():
            twin = after.get(turn, {}).get(name)
            if twin is None or not row["ours"]:
                continue
            if twin["failure"] and not row["failure"]:
                worse.append(f"failed: {describe(turn, row)}: {twin['failure']}")
            elif row["samples"] and twin["samples"]:
                changes.append(change(turn, contenders, after[turn], name, limit))
            else:
                missing.append(f"not timed in both files: {describe(turn, row)}")
            for key in COUNTS:
                counts = row.get(key), twin.get(key)
                if None in counts and counts != (None, None) and not twin["failure"]:
                    missing.append(f"{key} not counted in both files: {describe(turn, row)}")
                elif None not in counts and counts[1] > counts[0]:
                    worse.append(f"grew: {key} from {counts[0]:g} to {counts[1]:g}: {describe(turn, row)}")
    return changes, worse, missing


def check_machines(old: Report, new: Report) -> None:
    """Raises where the files are of different machines."""
    for key in SAME_MACHINE:
        found = old["machine"].get(key), new["machine"].get(key)
        if found[0] != found[1]:
            raise BadFile(
                f"the files are of different machines: {key} is {found[0]!r} and {found[1]!r}"
                "; --different-machines compares them all the same"
            )


def above_one(text: str) -> float:
    value = float(text)
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"is {text}; it must be at least 1")
    return value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument(
        "--limit", type=above_one, default=1.05, help="ratio of times that passes, 1.05 by default"
    )
    parser.add_argument("--different-machines", action="store_true", help="compare files of two machines")
    arguments = parser.parse_args(argv)
    try:
        old, new = read(arguments.old), read(arguments.new)
        if not arguments.different_machines:
            check_machines(old, new)
    except BadFile as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    changes, worse, missing = compare(old, new, arguments.limit)
    order = (SLOWER, UNCLEAR, SAME, FASTER)
    for line in sorted(changes, key=lambda found: (order.index(found.verdict), -found.ratio)):
        print(line)
    print("\n".join([*worse, *missing]), end="\n" if worse or missing else "")
    slow = sum(found.verdict == SLOWER for found in changes)
    total = f"{len(changes)} times compared at a limit of {arguments.limit:g}"
    print(f"{total}: {slow} slower, {len(worse)} failed or grew")
    if not changes:
        print("compare: no row of ours is timed in both files", file=sys.stderr)
        return 2
    return 1 if slow or worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
