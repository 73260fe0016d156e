// The second kernel for the gradients of weights, biases and gates: adds the parts that
// expert_linear_weight_hopper.h has left, in a fixed order, and rounds.
#pragma once

#include <cstdint>

#include "expert_linear_weight_plan.h"

namespace switch_moe {

struct WeightGradientResults {
    void* weight;  // [M, Din, Dout] of type T or, with `single`, float32
    void* bias;    // [M, Dout] of the same type
    float* gate;   // [B, k]
    bool single;
};

// How many blocks of add_gradient_parts take each of the gradients. A block has 256 threads, and takes 1024
// quads of weights, or 256 numbers of the others.
struct GradientBlocks {
    int weight, bias, gate;
};

template <typename T>
HOPPER_INLINE void store_pair(void* to, int64_t at, float first, float second, bool single) {
    if (single) {
        static_cast<float*>(to)[at] = first;
        static_cast<float*>(to)[at + 1] = second;
    } else {
        *reinterpret_cast<uint32_t*>(static_cast<T*>(to) + at) = hopper::pack<T>(first, second);
    }
}

template <typename T>
__global__ void __launch_bounds__(256)
    add_gradient_parts(const __grid_constant__ WeightGradientParts parts,
                       const __grid_constant__ WeightGradientResults results,
                       const __grid_constant__ WeightGradientSizes sizes, int top_k,
                       const __grid_constant__ GradientBlocks blocks) {
    const int thread = threadIdx.x;
    const GradientTiles& tiles = sizes.tiles;
    const int64_t of_all = int64_t{tiles.rows} * tiles.columns * sizes.experts * kTileQuads;
    int block = blockIdx.x;
    if (block < blocks.weight) {
        const int tile_and_expert = block / 4;
        const int tile = tile_and_expert / sizes.experts, expert = tile_and_expert % sizes.experts;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int quad = block % 4 * 1024 + i * 256 + thread;
            const Quad* part = parts.weight + int64_t{tile_and_expert} * kTileQuads + quad;
            Quad sum = *part;
#pragma unroll 4
            for (int split = 1; split < sizes.splits; ++split) {
                const Quad more = part[split * of_all];
#pragma unroll
                for (int n = 0; n < 4; ++n) sum.numbers[n] += more.numbers[n];
            }
            const int row = tile / tiles.columns * kGradientTile + quad / 2048 * 64 + quad % 128 / 32 * 16 +
                            quad % 32 / 4;
            const int column = tile % tiles.columns * kGradientTile + quad / 128 % 16 * 8 + quad % 4 * 2;
            if (column >= sizes.outputs) continue;
            const int64_t at = (int64_t{expert} * sizes.inputs + row) * sizes.outputs + column;
            if (row < sizes.inputs) {
                store_pair<T>(results.weight, at, sum.numbers[0], sum.numbers[1], results.single);
            }
            if (row + 8 < sizes.inputs) {
                store_pair<T>(results.weight, at + int64_t{8} * sizes.outputs, sum.numbers[2], sum.numbers[3],
                              results.single);
            }
        }
        return;
    }
    block -= blocks.weight;
    const bool of_bias = block < blocks.bias;
    if (!of_bias) block -= blocks.bias;
    const int64_t count = of_bias ? int64_t{sizes.experts} * sizes.outputs : int64_t{sizes.batch} * top_k;
    const int rows = of_bias ? sizes.splits * tiles.rows : tiles.rows * tiles.columns;
    const int64_t at = int64_t{block} * 256 + thread;
    if (at >= count) return;
    const float* part = (of_bias ? parts.bias : parts.gate) + at;
    float sum = *part;
#pragma unroll 8
    for (int row = 1; row < rows; ++row) sum += part[row * count];
    if (!of_bias) {
        results.gate[at] = sum;
    } else if (results.single) {
        static_cast<float*>(results.bias)[at] = sum;
    } else {
        static_cast<T*>(results.bias)[at] = T{static_cast<uint16_t>(hopper::pack<T>(sum, 0.f))};
    }
}

}  // namespace switch_moe
