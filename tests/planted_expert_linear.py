"""Bugs that test_expert_linear_hopper.py plants in csrc/expert_linear_hopper.h, one at a time."""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    name: str
    changes: tuple[tuple[str, str], ...]
    modulate: bool = False


def bug(name: str, *old_and_new: str, modulate: bool = False) -> Bug:
    return Bug(name, tuple(zip(old_and_new[::2], old_and_new[1::2], strict=True)), modulate)


BUGS = [
    bug("no wait for a stage", "barrier_wait(memory + Layout::kFull + 8 * stage.place, stage.parity);", ""),
    bug(
        "releases a stage before it is multiplied",
        "if (j == kBuffers - 1 && k > 0) release(stage.before());",
        "if (j == 1) release(stage.place);",
        "product_wait<0>(sums[0], sums[1]);\n        release(stage.before());",
        "product_wait<0>(sums[0], sums[1]);",
    ),
    bug(
        "releases a stage of its own block only",
        "barrier_arrive_at(memory + Layout::kEmpty + 8 * stage, thread)",
        "barrier_arrive_at(memory + Layout::kEmpty + 8 * stage, rank)",
    ),
    bug("merges over what is multiplied", "product_wait<kBuffers - 1>();", "product_wait<kBuffers>();"),
    bug("reads unfinished sums", "product_wait<0>(sums[0], sums[1]);", "product_wait<1>(sums[0], sums[1]);"),
    bug("wrong parity of the loader", "turn.parity ^ 1", "turn.parity"),
    bug("counts one block's readers", "kGroups * kMergedCluster);", "kGroups);"),
    bug("loads for itself only", "full, 3);", "full, 1 << rank);"),
    bug("ends before its neighbour", "    cluster_sync();  // no block", "    // no block"),
    bug("stores without a fence", "fence_async();", ""),
    bug(
        "writes over a piece that leaves",
        "store_wait_read<Layout::kSlots - 1>()",
        "store_wait_read<Layout::kSlots>()",
    ),
    bug(
        "meets the wrong warpgroup",
        "fence_async();\n            named_sync(group + 1, 128);",
        "fence_async();\n            named_sync(1, 128);",
    ),
    bug(
        "loads over a piece that leaves",
        "store_wait_read<1>();  //",
        "store_wait_read<3>();  //",
        modulate=True,
    ),
    bug("does not wait for a piece", "barrier_wait(ready + 8 * slot.place, slot.parity);", "", modulate=True),
    bug(
        "loads a piece too early",
        "load_piece(first, 1, 1);",
        "load_piece(first, 1, 1); load_piece(first, 2, 2);",
        modulate=True,
    ),
    bug(
        "expects one of two pieces",
        "(kGradient ? 2 : 1) * Layout::kPieceBytes",
        "Layout::kPieceBytes",
        modulate=True,
    ),
    bug("wrong swizzle", "(chunk ^ row / 2 % 4)", "(chunk ^ row % 4)"),
    bug("one gate for all experts", "fmaf(gates[expert], low", "fmaf(gates[0], low"),
    bug("bias of another output", "thread % 32 / 4 + 8, gates", "thread % 32 / 4, gates"),
    bug(
        "forgets the last tile",
        "number < tiles.count; number += step",
        "number + 1 < tiles.count; number += step",
    ),
]
