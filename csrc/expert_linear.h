// Merging linear experts on the CPU.
//
// Legend: R routes (rows of gates, one per sample or per group of samples that share a timestep), M experts,
// k experts chosen per route, E elements of one expert (Din * Dout).
#pragma once

#include <cstdint>

#include "elements.h"

namespace switch_moe {

struct Routes {
    int64_t experts;       // M
    int64_t elements;      // E
    int64_t count;         // R
    int64_t top_k;         // k
    const int32_t* index;  // [R, k], each in [0, M)
    const float* gate;     // [R, k]
};

// Routes that do not fit the workspace together are worked through in rounds.
struct Round {
    bool first, last;
};

// V_r = sum_j gate[r, j] * weight[index[r, j]], summed in float32 and rounded once.
void merge_experts(
    // inputs
    const void* weight,  // [M, E] dtype
    const Routes& routes, DType dtype, int threads,
    // outputs
    void* merged  // [R, E] dtype
);

// With P_r = dL/dV_r: dW_e = sum_{r, j: index[r, j] = e} gate[r, j] * P_r over the routes of all rounds,
// summed in float32 and rounded once, and dgate[r, j] = <P_r, W_index[r, j]>. Each tile of E is summed by one
// thread in the order of r, so results do not depend on the number of threads.
void merge_experts_backward(
    // inputs
    const void* grad_merged,  // [R, E] dtype
    const void* weight,       // [M, E] dtype
    const Routes& routes, Round round, DType dtype, int threads,
    // outputs
    float* carry,       // [M, E] the sum from round to round; not touched by a round that is first and last
    void* grad_weight,  // [M, E] dtype, written in the last round
    float* grad_gate    // [R, k]
);

}  // namespace switch_moe
