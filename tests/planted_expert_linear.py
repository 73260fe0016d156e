"""Bugs that test_expert_linear_hopper.py plants in csrc/expert_linear*_hopper.h, one at a time."""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    name: str
    changes: tuple[tuple[str, str], ...]
    modulate: bool = False
    tokens: int = 200  # of gradients


def bug(name: str, *old_and_new: str, modulate: bool = False, tokens: int = 200) -> Bug:
    return Bug(name, tuple(zip(old_and_new[::2], old_and_new[1::2], strict=True)), modulate, tokens)


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

# In expert_linear_weight_plan.h, _hopper.h and _sum.h.
WEIGHT_BUGS = [
    bug(
        "no wait for a stage",
        "barrier_wait(this->barrier(Layout::kFull, this->stage.place), this->stage.parity);\n"
        "            product_fence();",
        "product_fence();",
    ),
    bug(
        "no wait for tokens of the bias",
        "barrier_wait(this->barrier(Layout::kFull, this->stage.place), this->stage.parity);\n"
        "            if (turn",
        "if (turn",
    ),
    bug(
        "releases a stage before it is multiplied",
        "product_wait<1>();\n                this->release(this->stage.before(), thread);",
        "this->release(this->stage.before(), thread);",
    ),
    bug(
        "releases a stage before all lanes have read it",
        "            __syncwarp();\n            this->release(this->stage.place, lane);",
        "            this->release(this->stage.place, lane);",
    ),
    bug("reads unfinished products", "product_wait<0>(product);", "product_wait<1>(product);"),
    bug("counts one block's readers", "3 * kMergedCluster", "3"),
    bug("forgets the readers of the bias", "3 * kMergedCluster", "2 * kMergedCluster"),
    bug(
        "releases a stage of its own block only",
        "barrier_arrive_at(barrier(Layout::kEmpty, place), thread)",
        "barrier_arrive_at(barrier(Layout::kEmpty, place), rank)",
    ),
    bug(
        "loads x for itself only",
        "At3{row + half, token, route.sample}, full, 3)",
        "At3{row + half, token, route.sample}, full, 1 << this->rank)",
    ),
    bug(
        "loads dm for itself only",
        "At3{column + half, token, route.sample}, full, 3)",
        "At3{column + half, token, route.sample}, full, 1 << this->rank)",
    ),
    bug("wrong parity of the loader", "this->stage.parity ^ 1", "this->stage.parity"),
    bug("ends before its neighbour", "    cluster_sync();  // no block", "    // no block"),
    bug(
        "no wait for weights",
        "barrier_wait(this->barrier(Layout::kWeightFull, place)",
        "if (false) barrier_wait(this->barrier(Layout::kWeightFull, place)",
    ),
    bug(
        "loads over weights that are read",
        "barrier_wait(this->barrier(Layout::kWeightEmpty, place)",
        "if (false) barrier_wait(this->barrier(Layout::kWeightEmpty, place)",
    ),
    bug(
        "gives weights back once for all warps",
        "kWeightEmpty + 8 * place, 8)",
        "kWeightEmpty + 8 * place, 1)",
    ),
    bug("weights of the neighbouring columns", "At3{column + 64, row, expert}", "At3{column, row, expert}"),
    bug("wrong swizzle of weights", "^ row % 8) * 16", "^ row % 4) * 16"),
    bug(
        "writes over shares that are read",
        "barrier_wait(this->barrier(Layout::kShareEmpty, slot)",
        "if (false) barrier_wait(this->barrier(Layout::kShareEmpty, slot)",
        tokens=40,
    ),
    bug(
        "no wait for shares",
        "barrier_wait(this->barrier(Layout::kShareFull, slot)",
        "if (false) barrier_wait(this->barrier(Layout::kShareFull, slot)",
    ),
    bug("warpgroups share their places", "(threadIdx.x / 32 - 4)", "(threadIdx.x / 32 % 4)"),
    bug("an expert chosen twice counts once", "sum += route.gate[j];", "sum = route.gate[j];"),
    bug("forgets what memory has", "if (written >> expert & 1) {", "if (false) {"),
    bug("adds to what was never written", "if (written >> expert & 1) {", "if (true) {"),
    bug("no zeros for an expert of nobody", "quads(expert)[i * 128] = Quad{};", "(void)i;"),
    bug(
        "keeps the places of another tile",
        "            places.clear();\n",
        "            if (samples == 0) places.clear();\n",
    ),
    bug("keeps a sum that is written", "for (int i = 0; i < 64; ++i) sum[i] = 0.f;", ""),
    bug("forgets the last part", "split < sizes.splits", "split + 1 < sizes.splits"),
    bug("each tile sums all tokens", "if (turn == unit.row && bias != nullptr)", "if (bias != nullptr)"),
    bug("wrong swizzle of the tokens", "^ token % 8) * 16", "^ token % 4) * 16"),
    bug("one row for two tiles", "(pair - across) * 2 + rank", "(pair - across) * 2"),
    bug("samples of another part", "int64_t{sizes.batch} * (split + 1) / sizes.splits", "sizes.batch"),
]
