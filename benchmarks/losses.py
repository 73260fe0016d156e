"""Sentences that say where ours loses, made from the rows of a table alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.case import BOTH, LINEAR, OURS
from benchmarks.cases import WITH_TABLE
from benchmarks.peers import OFFICIAL
from benchmarks.result_files import Contenders, Row, Turn, ratio

DENSE_MODEL = "dense DiT"
GOAL_SHAPES = ((32, 256, 384), (16, 256, 768), (8, 256, 1152))  # B, T, D of the design's goals on a CPU
GOAL_EXPERTS = 3
GOAL_DENSE = {"float32": 1.3, "bfloat16": 1.8}
Cases = dict[Turn, Contenders]
Found = list[tuple[float, str]]  # a ratio and where it was


def against(contenders: Contenders, rival: str) -> float | None:
    """Time of ours over a rival's. The official layer routes all timesteps: beside it ours does so too."""
    mine = WITH_TABLE if rival == OFFICIAL and WITH_TABLE in contenders else OURS
    return ratio(contenders, mine, rival)


class Limit(NamedTuple):
    """A number of the design: ours over ``of`` at most, or ``of`` over ours at least."""

    of: str
    value: float
    at_least: bool = False

    def missed(self, contenders: Contenders) -> float | None:
        """The ratio that misses the limit, None where it is met or not measured."""
        over = against(contenders, self.of)
        if over is None:
            return None
        found = 1 / over if self.at_least else over
        return None if (found >= self.value if self.at_least else found <= self.value) else found

    def __str__(self) -> str:
        text = "at least {:g}x as fast as" if self.at_least else "at most {:g}x the time of"
        return f"{text.format(self.value)} {self.of}"


def limits(turn: Turn, row: Row) -> list[Limit]:
    """What the design asks of a case: of three shapes on a CPU, and of steps of XL/2."""
    shape, found = row["shape"], []
    sizes, experts = tuple(shape.get(key) for key in "BTD"), shape.get("M")
    stated = turn.device == "cpu" and turn.which == BOTH and sizes in GOAL_SHAPES and experts == GOAL_EXPERTS
    if stated and turn.group in ("expert_linear", "layer") and turn.dtype in GOAL_DENSE:
        found = [Limit(LINEAR, GOAL_DENSE[turn.dtype]), Limit("expert loop", 2.0, at_least=True)]
        if turn.group == "layer" and turn.dtype == "float32":
            found.append(Limit(OFFICIAL, 2.0, at_least=True))
    if row.get("model") == "XL/2":
        found.append(Limit(DENSE_MODEL, 1.1 if turn.group == "train_step" else 1.03))
    return found


def times(value: float) -> str:
    """A ratio, with two decimals or three digits."""
    return f"{value:.2f}x" if value < 99.995 else f"{value:.3g}x"


def label(turn: Turn, row: Row) -> str:
    """How a table names a case: without the group; along an axis of growth by the size alone."""
    if turn.group == "growth" and row["note"] in row["shape"]:
        return f"{row['note']}={row['shape'][row['note']]}"
    return turn.label


def short_names(cases: Cases) -> dict[Turn, str]:
    """Names for sentences: what all cases have in common is left out, the type is there where it differs."""
    words = {turn: label(turn, next(iter(rows.values()))).split(" ") for turn, rows in cases.items()}
    if len({turn.dtype for turn in cases}) > 1:
        words = {turn: [*found, turn.dtype] for turn, found in words.items()}
    common = set.intersection(*(set(found) for found in words.values())) if len(words) > 1 else set()
    return {turn: " ".join(word for word in found if word not in common) for turn, found in words.items()}


def listing(found: Found, total: int, named: int) -> str:
    """Each case with its ratio; of more than ``named``, the range and the worst."""
    if len(found) <= named:
        return ", ".join(f"{where} ({times(value)})" for value, where in found)
    least, (most, where) = min(found)[0], max(found)
    many = f"all {total} cases" if len(found) == total else f"{len(found)} of {total} cases"
    return f"{many} ({times(least)} to {times(most)}, the most at {where})"


def _beaten(
    cases: Cases, over: Callable[[Contenders, str], float | None]
) -> tuple[dict[str, Found], dict[str, int]]:
    """For each rival the cases where ``over``, ours over the rival, is above 1; how many cases it has."""
    beaten: dict[str, Found] = {}
    counted: dict[str, int] = {}
    names = short_names(cases)
    for turn, contenders in cases.items():
        for name, row in contenders.items():
            value = None if row["ours"] else over(contenders, name)
            if value is not None:
                counted[name] = counted.get(name, 0) + 1
                if round(value, 2) > 1:
                    beaten.setdefault(name, []).append((value, names[turn]))
    return beaten, counted


def slower(cases: Cases, named: int = 6) -> str:
    """Who is faster than ours where and by how much, where ours failed, which limits are missed and met."""
    names = short_names(cases)
    failed, missed, stated = [], {}, []
    for turn, contenders in cases.items():
        ours = contenders.get(OURS)
        if ours is None:
            continue
        if ours["microseconds"] is None:
            failed.append(f"{names[turn]} ({ours['failure'] or 'no time'})")
        for limit in limits(turn, ours):
            if against(contenders, limit.of) is not None:
                stated.append(limit)
                value = limit.missed(contenders)
                if value is not None:
                    missed.setdefault(limit, []).append((value, names[turn]))
    beaten, counted = _beaten(cases, against)
    said = [f"Ours failed at {', '.join(failed)}."] if failed else []
    said += [f"Ours is slower than {n}: {listing(found, counted[n], named)}." for n, found in beaten.items()]
    if not beaten and not failed:
        said.append("Ours is the fastest here." if counted else "Nothing else was measured here.")
    for limit, found in missed.items():
        said.append(f"Missed: {limit}, at {listing(found, len(found), len(found))}.")
    met = [str(limit) for limit in dict.fromkeys(stated) if limit not in missed]
    return " ".join([*said, *([f"Met: {', '.join(met)}."] if met else [])])


def larger(cases: Cases, key: str, what: str, named: int = 6) -> str:
    """Who has a smaller ``key`` than ours, where and by how much; '' where nothing can be compared."""

    def over(contenders: Contenders, name: str) -> float | None:
        mine, other = (contenders.get(n, {}).get(key) for n in (OURS, name))
        return mine / other if mine and other else None

    beaten, counted = _beaten(cases, over)
    if not beaten:
        return f"{what} of ours is the least here." if counted else ""
    found = [f"{n}: {listing(found, counted[n], named)}" for n, found in beaten.items()]
    return f"{what} of ours is above that of {'; '.join(found)}."
