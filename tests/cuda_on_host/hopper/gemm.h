// C[b] = A[b] B[b] in 16 bits, summed in float32: a kernel that uses what hopper.h has, to test the emulation
// with. It compiles for sm_90a too.
//
// A block makes tiles of 128 x 128. One warpgroup loads, two multiply 64 rows each. The two blocks of a
// cluster have the same rows of A, of which each loads half for both, and neighbouring columns of B. A comes
// from shared memory or, with kRegisterA, from registers. A[b] may be stored transposed; so may C[b] be
// written.
#pragma once

#include "hopper.h"

constexpr int kThreads = 384, kCluster = 2, kStages = 3;
constexpr int kDeep = 64;                       // summed elements of a stage
constexpr uint32_t kBox = 64 * 64 * 2;          // bytes of every box: 64 rows of 64 elements
constexpr uint32_t kStage = 4 * kBox;           // two boxes of A, by rows of C, and two of B, by columns
constexpr uint32_t kOutput = kStages * kStage;  // one box for each warpgroup
constexpr uint32_t kFull = kOutput + 2 * kBox, kEmpty = kFull + 8 * kStages;
constexpr uint32_t kSharedBytes = kEmpty + 8 * kStages;

struct Problem {
    int batch, rows, columns, depth;
};

// Tiles in the order in which clusters take them: columns fastest.
struct Tile {
    int row, column, batch;
};
__device__ __forceinline__ Tile tile_at(const Problem& problem, int number, int rank) {
    const int wide = (problem.columns + 255) / 256, high = (problem.rows + 127) / 128;
    return {number / wide % high * 128, (number % wide * 2 + rank) * 128, number / wide / high};
}

template <typename T, bool kRegisterA, bool kTransposedA, bool kTransposedC>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1) gemm(
    const __grid_constant__ hopper::TensorMap a_map,  // [batch * rows, depth], or [batch * depth, rows]
    const __grid_constant__ hopper::TensorMap b_map,  // [batch, depth, columns]
    const __grid_constant__ hopper::TensorMap c_map,  // [batch, rows, columns], or [batch, columns, rows]
    Problem problem) {
    using namespace hopper;
    const uint32_t memory = shared_memory(), full = memory + kFull, empty = memory + kEmpty;
    const int thread = threadIdx.x % 128, group = threadIdx.x / 128, warp = thread / 32, lane = thread % 32;
    const int rank = cluster_rank();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, 2 * kCluster);
        }
        fence_barrier_init();
    }
    cluster_sync();

    const int tiles = (problem.columns + 255) / 256 * ((problem.rows + 127) / 128) * problem.batch;
    const int steps = (problem.depth + kDeep - 1) / kDeep;
    int step = 0;
    if (group == 0) {
        give_registers<40>();
        if (thread == 0) {
            for (int number = blockIdx.x / kCluster; number < tiles; number += gridDim.x / kCluster) {
                const Tile tile = tile_at(problem, number, rank);
                for (int k = 0; k < steps * kDeep; k += kDeep, ++step) {
                    const int stage = step % kStages;
                    const uint32_t a = memory + stage * kStage, b = a + 2 * kBox, barrier = full + 8 * stage;
                    barrier_wait(empty + 8 * stage, (step / kStages & 1) ^ 1);
                    barrier_expect(barrier, kStage);
                    const int row = tile.row + rank * 64;
                    const At2 at = kTransposedA ? At2{row, tile.batch * problem.depth + k}
                                                : At2{k, tile.batch * problem.rows + row};
                    load_box(a + rank * kBox, &a_map, at, barrier, 3);
                    load_box(b, &b_map, At3{tile.column, k, tile.batch}, barrier);
                    load_box(b + kBox, &b_map, At3{tile.column + 64, k, tile.batch}, barrier);
                }
            }
        }
        __syncwarp();  // the barrier at the end is an instruction of whole warps
    } else {
        take_registers<232>();
        const int me = group - 1;
        const uint32_t output = memory + kOutput + me * kBox;
        // In a box, of 64-element rows in eight chunks: where this lane's row is for load_matrices and
        // store_matrices, if rows of C are rows of the box, and if they are its columns.
        const int straight = warp * 16 + lane % 16, crossed = lane / 16 * 8 + lane % 8;
        for (int number = blockIdx.x / kCluster; number < tiles; number += gridDim.x / kCluster) {
            const Tile tile = tile_at(problem, number, rank);
            float sums[64];
            uint32_t rows[4][4];
            for (int k = 0; k < steps; ++k, ++step) {
                const int stage = step % kStages;
                const uint32_t a = memory + stage * kStage + me * kBox,
                               b = memory + stage * kStage + 2 * kBox;
                barrier_wait(full + 8 * stage, step / kStages & 1);
                if constexpr (kRegisterA) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        if constexpr (kTransposedA) {
                            const int chunk = (warp * 2 + lane / 8 % 2) ^ (crossed % 8);
                            load_matrices_transposed(rows[j], a + (j * 16 + crossed) * 128 + chunk * 16);
                        } else {
                            const int chunk = (j * 2 + lane / 16) ^ (straight % 8);
                            load_matrices(rows[j], a + straight * 128 + chunk * 16);
                        }
                    }
                }
                product_fence();
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const uint64_t b_16 = operand<Swizzle::k128>(b + j * 2048, 1024, kBox);
                    if constexpr (kRegisterA) {
                        product<T, 128, true>(sums, rows[j], b_16, k + j > 0);
                    } else {
                        const uint64_t a_16 =
                            operand<Swizzle::k128>(a + j * (kTransposedA ? 2048 : 32), 1024);
                        product<T, 128, kTransposedA, true>(sums, a_16, b_16, k + j > 0);
                    }
                }
                product_commit();
                product_wait<0>(sums);
                if (thread < kCluster) barrier_arrive_at(empty + 8 * stage, thread);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (thread == 0) store_wait_read<0>();
                named_sync(me + 1, 128);
#pragma unroll
                for (int chunk = 0; chunk < 8; chunk += 2) {
                    const float* sum = sums + (half * 8 + chunk) * 4;
                    const uint32_t packed[4] = {pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3]),
                                                pack<T>(sum[4], sum[5]), pack<T>(sum[6], sum[7])};
                    if constexpr (kTransposedC) {
                        const int place = (warp * 2 + lane / 8 % 2) ^ (crossed % 8);
                        store_matrices_transposed(output + (chunk * 8 + crossed) * 128 + place * 16, packed);
                    } else {
                        const int place = (chunk + lane / 16) ^ (straight % 8);
                        store_matrices(output + straight * 128 + place * 16, packed);
                    }
                }
                fence_async();
                named_sync(me + 1, 128);
                if (thread == 0) {
                    const int row = tile.row + me * 64, column = tile.column + half * 64;
                    store_box(&c_map,
                              kTransposedC ? At3{row, column, tile.batch} : At3{column, row, tile.batch},
                              output);
                    store_commit();
                }
            }
        }
        if (thread == 0) store_wait_read<0>();
    }
    cluster_sync();
}
