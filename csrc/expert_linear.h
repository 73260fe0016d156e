// Linear experts with per-sample gates on a CPU, in two ways.
//
// merge  writes the merged weights V_r to memory, for the products of another library.
// fused  multiplies with V_r, which exists only in cache and registers (expert_linear_fused_kernel.h).
//
// Legend: B samples of T tokens, M experts [Din, Dout], k experts chosen per sample. A route is a row of
// gates: there is one for each sample, or for each group of samples that share a timestep. R routes. A choice
// is one of the k experts of one route; choice c = r * k + j. Sums are float32, and no result depends on the
// number of threads.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace switch_moe {

struct Experts {
    int64_t num_experts, inputs, outputs;  // M, Din, Dout
    const void* weight;                    // [M, Din, Dout] dtype

    int64_t elements() const { return inputs * outputs; }
};

struct Routes {
    int64_t num_routes, top_k;  // R, k
    const int32_t* index;       // [R, k], each in [0, M)
    const float* gate;          // [R, k]

    int64_t choices() const { return num_routes * top_k; }
};

// Routes that do not fit the workspace together are worked through in rounds.
struct Round {
    bool first, last;
};

// Writes V_r = sum_j gate[r, j] * weight[index[r, j]], summed in float32 and rounded once.
void merge_experts(
    // inputs
    const Experts& experts, const Routes& routes, DType dtype, int threads,
    // outputs
    void* merged  // [R, Din, Dout] dtype
);

// With P_r = dL/dV_r: dW_e = sum_{r, j: index[r, j] = e} gate[r, j] * P_r over the routes of all rounds,
// summed in float32 and rounded once, and dgate[r, j] = <P_r, W_index[r, j]>. One thread sums a tile of
// elements in the order of r.
void merge_experts_backward(
    // inputs
    const void* grad_merged,  // [R, Din, Dout] dtype
    const Experts& experts, const Routes& routes, Round round, DType dtype, int threads,
    // outputs
    float* carry,  // [M, Din, Dout] the sum from round to round; a round that is first and last leaves it
    void* grad_weight,  // [M, Din, Dout] dtype, written in the last round
    float* grad_gate    // [R, k]
);

// Whether this build has fused products of `vector_width` floats a vector: 16 needs AVX-512 (F, BW, DQ, VL;
// for bfloat16 BF16 too), 8 needs AVX2, both need FMA. The caller must know whether the processor can run
// them. The instruction that multiplies bfloat16 takes denormal numbers for zero.
bool fused_product_takes(DType dtype, int vector_width);

// FLOPs of all fused products so far: two for a multiplication and its addition. Merging is not counted.
int64_t fused_product_flops();

// out[i] = x[i] V_r + bias[r] for the rows i in [starts[r], starts[r + 1]) of each route r, where
// V_r = sum_j gate[r, j] W_index[r, j], rounded once; or, transposed, out[i] = x[i] V_r^T.
void fused_product(
    // inputs
    const void* x,  // [rows, Din] dtype, transposed [rows, Dout]
    const Experts& experts, const Routes& routes,
    const int64_t* starts,  // [R + 1]
    const void* bias,       // [R, Dout] dtype or null
    bool transposed, DType dtype, int vector_width, int threads,
    // outputs
    void* out  // [rows, Dout] dtype, transposed [rows, Din]
);

// Bytes that fused_product_backward needs for a sample.
int64_t fused_product_workspace(int64_t tokens, const Experts& experts, DType dtype, int vector_width);

// The gradients of the experts and their gates. With P_b = x_b^T grad_b and one route for each sample:
// dW_e = sum_{b, j: index[b, j] = e} gate[b, j] P_b and dgate[b, j] = <P_b, W_index[b, j]>. x and grad are
// packed for `samples` samples at a time, which does not change the results.
void fused_product_backward(
    // inputs
    const void* x,     // [B, T, Din] dtype
    const void* grad,  // [B, T, Dout] dtype
    int64_t tokens, const Experts& experts, const Routes& routes, DType dtype, int vector_width, int threads,
    int64_t samples,
    // outputs
    void* workspace,    // 64-byte aligned, for `samples` samples
    float* carry,       // [M, Din, Dout] room if dtype is not float32 and samples < B, else null
    void* grad_weight,  // [M, Din, Dout] dtype
    float* grad_gate    // [B, k]
);

}  // namespace switch_moe
