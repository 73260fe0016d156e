// Merging linear experts on the CPU.
//
// Legend: R routes (rows of gates, one per sample or per group of samples that share a timestep), M experts,
// k experts chosen per route, E elements of one expert (Din * Dout).
#pragma once

#include <cstdint>

namespace switch_moe {

enum class DType : int { float32 = 0, bfloat16 = 1 };

// V_r = sum_j gate[r, j] * weight[index[r, j]], summed in float32 and rounded once.
void merge_experts(
    // inputs
    const void* weight,    // [M, E] dtype
    const int32_t* index,  // [R, k], each in [0, M)
    const float* gate,     // [R, k]
    DType dtype, int64_t elements, int64_t routes, int64_t top_k, int threads,
    // outputs
    void* merged  // [R, E] dtype
);

// With P_r = dL/dV_r: dW_e += sum_{r, j: index[r, j] = e} gate[r, j] * P_r and dgate[r, j] = <P_r, W_index[r,
// j]>. Each tile of E is summed by one thread in the order of r, so results do not depend on the thread
// count.
void merge_experts_backward(
    // inputs
    const void* grad_merged,  // [R, E] dtype
    const void* weight,       // [M, E] dtype
    const int32_t* index,     // [R, k], each in [0, M)
    const float* gate,        // [R, k]
    DType dtype, int64_t elements, int64_t routes, int64_t top_k, int threads,
    // outputs
    float* grad_weight,  // [M, E] added to
    float* grad_gate     // [R, k] written
);

}  // namespace switch_moe
