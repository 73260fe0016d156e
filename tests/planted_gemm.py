"""Bugs that test_hopper_on_host.py plants in cuda_on_host/hopper/gemm.h, one at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Variant(NamedTuple):
    dtype: torch.dtype
    register_a: bool = False
    transposed_a: bool = False
    transposed_c: bool = False

    def kernel(self, space: str) -> str:
        flags = ", ".join(str(flag).lower() for flag in self[1:])
        return f"{space}::gemm<hopper::{'BFloat16' if self.dtype == torch.bfloat16 else 'Float16'}, {flags}>"


SHARED_A = Variant(torch.bfloat16)
REGISTER_A = Variant(torch.bfloat16, register_a=True, transposed_c=True)
VARIANTS = [
    SHARED_A,
    REGISTER_A,
    Variant(torch.float16, transposed_a=True),
    Variant(torch.float16, register_a=True, transposed_a=True),
]


class Bug(NamedTuple):
    name: str
    old: str
    new: str
    found: str = ""  # words of the fault that some schedule ends with; "error" stands for wrong numbers
    variant: Variant = SHARED_A


BUGS = [
    Bug("no wait for loads", "barrier_wait(full + 8 * stage, step / kStages & 1);", "", "error"),
    Bug(
        "no wait for readers",
        "barrier_wait(empty + 8 * stage, (step / kStages & 1) ^ 1);",
        "",
        "past its count",
    ),
    Bug("wrong parity of the loader", "(step / kStages & 1) ^ 1", "step / kStages & 1", "deadlock"),
    Bug(
        "wrong parity of the readers", "full + 8 * stage, step / kStages & 1", "full + 8 * stage, (step & 1)"
    ),
    Bug(
        "counts the readers of one block only",
        "empty + 8 * stage, 2 * kCluster",
        "empty + 8 * stage, 2",
        "past its count",
    ),
    Bug(
        "counts one reader too many",
        "empty + 8 * stage, 2 * kCluster",
        "empty + 8 * stage, 2 * kCluster + 1",
        "deadlock",
    ),
    Bug("releases its own block only", "empty + 8 * stage, thread)", "empty + 8 * stage, rank)", "error"),
    Bug("releases before the products are done", "product_wait<0>(sums);", "", "under way"),
    Bug("waits for all groups but the last", "product_wait<0>(sums);", "product_wait<1>(sums);", "under way"),
    Bug("no commit of the products", "product_commit();", "", "under way"),
    Bug("no fence before the products", "product_fence();", "", "no product_fence since its accumulator"),
    Bug(
        "expects too few bytes",
        "barrier_expect(barrier, kStage)",
        "barrier_expect(barrier, kStage - kBox)",
        "under way",
    ),
    Bug(
        "expects too many bytes",
        "barrier_expect(barrier, kStage)",
        "barrier_expect(barrier, kStage + 16)",
        "deadlock",
    ),
    Bug("multicast to itself only", "at, barrier, 3);", "at, barrier, 1 << rank);", "deadlock"),
    Bug("multicast to the wrong half", "load_box(a + rank * kBox", "load_box(a + (1 - rank) * kBox", "error"),
    Bug(
        "no meeting before the first load",
        "        fence_barrier_init();\n    }\n    cluster_sync();",
        "        fence_barrier_init();\n    }\n    __syncthreads();",
        "not initialised",
    ),
    Bug(
        "no meeting at the end",
        "store_wait_read<0>();\n    }\n    cluster_sync();",
        "store_wait_read<0>();\n    }",
        "a block that has ended",
    ),
    Bug("no fence of new barriers", "fence_barrier_init();", "", "without a fence_barrier_init"),
    Bug("no fence before the store", "fence_async();", "", "fence_async"),
    Bug("only the storing thread fences", "fence_async();", "if (thread == 0) fence_async();", "fence_async"),
    Bug(
        "no meeting before the store",
        "fence_async();\n                named_sync(me + 1, 128);",
        "fence_async();",
        "fence_async",
    ),
    Bug(
        "no wait before the output is reused",
        "if (thread == 0) store_wait_read<0>();\n                named",
        "named",
        "error",
    ),
    Bug(
        "no meeting before the output is reused",
        "store_wait_read<0>();\n                named_sync(me + 1, 128);",
        "store_wait_read<0>();",
        "fence_async",
    ),
    Bug(
        "no wait for the last store",
        "        if (thread == 0) store_wait_read<0>();\n    }",
        "    }",
        "stores have read",
    ),
    Bug("no commit of the store", "store_commit();", "", "stores have read"),
    Bug(
        "one named barrier for both warpgroups",
        "named_sync(me + 1, 128);\n#pragma",
        "named_sync(1, 128);\n#pragma",
    ),
    Bug("output without swizzle", "(chunk + lane / 16) ^ (straight % 8)", "chunk + lane / 16", "error"),
    Bug(
        "steps too wide in an operand",
        "kTransposedA ? 2048 : 32",
        "kTransposedA ? 2048 : 64",
        "first row of a swizzle",
    ),
    Bug(
        "steps too short in an operand",
        "b_16 = operand<Swizzle::k128>(b + j * 2048",
        "b_16 = operand<Swizzle::k128>(b + j * 1024",
        "error",
    ),
    Bug("wrong distance in an operand", "1024, kBox)", "1024, 1024)", "error"),
    Bug(
        "operand that starts within a swizzle",
        "operand<Swizzle::k128>(b + j * 2048",
        "operand<Swizzle::k128>(b + 128 + j * 2048",
        "first row of a swizzle",
    ),
    Bug(
        "never starts at zero",
        "b_16, k + j > 0);\n                    }\n                }",
        "b_16, true);\n                    }\n                }",
        "error",
    ),
    Bug(
        "overwrites registers of a product",
        "rows[j], b_16, k + j > 0);",
        "rows[0], b_16, k + j > 0); product_fence();\n"
        "if (j < 3) for (int r = 0; r < 4; ++r) rows[0][r] = rows[j + 1][r]; product_fence();",
        "registers that a product under way reads",
        REGISTER_A,
    ),
    Bug(
        "wrong row for a lane",
        "straight = warp * 16 + lane % 16",
        "straight = warp * 16 + lane / 2",
        "error",
        REGISTER_A,
    ),
    Bug(
        "rows without swizzle",
        "(j * 2 + lane / 16) ^ (straight % 8)",
        "j * 2 + lane / 16",
        "error",
        REGISTER_A,
    ),
    Bug(
        "takes more registers than there are",
        "take_registers<232>",
        "take_registers<240>",
        "for 240 registers",
    ),
    Bug("gives too few registers", "give_registers<40>", "give_registers<48>", "for 232 registers"),
    Bug("box at an odd address", "load_box(b + kBox", "load_box(b + kBox + 64", "no multiple of 1024"),
    Bug(
        "more stages than fit",
        "barrier_wait(full",
        "if (k == 0) load_shared<int>(memory + kSharedBytes);\n barrier_wait(full",
        "outside the block",
    ),
    Bug(
        "barrier at an odd address",
        "kEmpty = kFull + 8 * kStages;",
        "kEmpty = kFull + 8 * kStages + 4;",
        "no multiple of 8",
    ),
    Bug(
        "barriers in one place",
        "kEmpty = kFull + 8 * kStages;",
        "kEmpty = kFull + 8 * kStages - 8;",
        "initialised twice",
    ),
    Bug(
        "output over a barrier",
        "output = memory + kOutput + me * kBox",
        "output = memory + kOutput + (me + 1) * kBox",
    ),
    Bug(
        "one lane skips an instruction",
        "product_fence();",
        "if (thread != 77) product_fence();",
        "while others of its warp",
    ),
    Bug(
        "releases before it waits",
        "product_wait<0>(sums);\n                if (thread < kCluster) "
        "barrier_arrive_at(empty + 8 * stage, thread);",
        "if (thread < kCluster) barrier_arrive_at(empty + 8 * stage, thread);\nproduct_wait<0>(sums);",
        "error",
    ),
    Bug(
        "writes sums before they are there",
        "product_wait<0>(sums);",
        "if (k + 1 == steps) sums[0] += 1.f; product_wait<0>(sums);",
        "an accumulator of a product under way",
    ),
    Bug(
        "releases twice",
        "empty + 8 * stage, thread);",
        "empty + 8 * stage, thread); if (thread < kCluster) barrier_arrive_at(empty + 8 * stage, thread);",
        "past its count",
    ),
    Bug(
        "changes sums after the fence",
        "product_fence();",
        "product_fence(); if (k > 0) sums[5] *= 0.5f;",
        "no product_fence since its accumulator",
    ),
    Bug(
        "changes registers after the fence",
        "product_fence();",
        "product_fence(); rows[0][0] ^= 0x8000;",
        "no product_fence since its registers",
        REGISTER_A,
    ),
    Bug(
        "no meeting of the warps that write an operand",
        "product_fence();",
        "store_shared(a + 4 * thread, load_shared<uint32_t>(a + 4 * thread)); fence_async();\n"
        "__syncwarp(); product_fence();",
        "has met no other warp since",
    ),
    Bug(
        "releases while other lanes read",
        "if (thread < kCluster) barrier_arrive_at(empty + 8 * stage, thread);",
        "if (warp == 0) sums[0] += 0.f * first_of<T>(load_shared<uint32_t>(a + 4 * thread));\n"
        "if (thread / 2 == 8) barrier_arrive_at(empty + 8 * stage, thread % 2);",
        "error",
    ),
    Bug(
        "one lane at the cluster's barrier",
        "    cluster_sync();\n}",
        "    if (lane == 0) cluster_sync();\n}",
        "deadlock",
    ),
    Bug(
        "lanes at two barriers",
        "fence_async();\n                named_sync(me + 1, 128);",
        "fence_async();\n                named_sync(me + 1 + lane / 16 * 2, 64);",
        "named_sync: the threads of a warp disagree",
    ),
]
