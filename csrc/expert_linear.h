// Linear experts on the CPU. Every route r mixes its experts into one matrix, the merged weight
// V_r = sum_j gate[r, j] * W_index[r, j], and multiplies its tokens with that matrix once. There are two
// paths:
//
//     merge   merge_experts writes every V_r to memory, and torch multiplies. (expert_linear_merge.cpp)
//     fused   fused_product multiplies too. A piece of V_r exists only in cache, where the product packs its
//             operands; so do the gradients with respect to V_r. (expert_linear_fused.cpp)
//
// Legend: R routes, M experts [Din, Dout] of E = Din * Dout elements each, k experts chosen per route, B
// samples of T tokens. A route is a row of gates: of one sample, or of several that share a timestep. A
// choice is a pair (r, j), the j-th expert that route r chose, and is numbered r * k + j. All sums are
// float32.
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
};

// Writes V_r for every route. It is summed in float32 and rounded once.
void merge_experts(const Experts& experts, const Routes& routes, DType dtype, int threads,
                   void* merged  // [R, E] dtype
);

// Where the gradients of all V_r do not fit the caller's workspace together, the caller passes the routes in
// several rounds.
struct Round {
    bool first, last;
};

// The gradients of the experts and their gates, from P_r = dL/dV_r:
// dW_e = sum of gate[r, j] * P_r over the choices (r, j) of expert e in all rounds, rounded once, and
// dgate[r, j] = <P_r, W_index[r, j]>. One thread sums a tile of E in the order of r, so results do not depend
// on the number of threads.
void merge_experts_backward(
    // inputs
    const void* grad_merged,  // [R, E] dtype
    const Experts& experts, const Routes& routes, Round round, DType dtype, int threads,
    // outputs
    float* carry,       // [M, E], dW from round to round; a round that is first and last does not touch it
    void* grad_weight,  // [M, E] dtype, written in the last round
    float* grad_gate    // [R, k]
);

// Whether this build has a fused kernel for vectors of `vector_width` floats. A width of 16 needs AVX-512 (F,
// BW, DQ, VL, and for bfloat16 BF16), a width of 8 needs AVX2, and both need FMA. The caller has to know
// whether the processor can run it. The instruction that multiplies bfloat16 takes denormal numbers for zero.
bool fused_product_takes(DType dtype, int vector_width);

// The FLOPs of all fused products so far. A multiplication and its addition count as two; merging counts as
// none.
int64_t fused_product_flops();

// Multiplies the rows i in [starts[r], starts[r + 1]) of each route r: out[i] = x[i] V_r + bias[r], or, where
// `transposed`, out[i] = x[i] V_r^T. V_r is rounded once. Results do not depend on the number of threads.
void fused_product(const void* x,  // [rows, Din] dtype, transposed [rows, Dout]
                   const Experts& experts, const Routes& routes,
                   const int64_t* starts,  // [R + 1]
                   const void* bias,       // [R, Dout] dtype or null
                   bool transposed, DType dtype, int vector_width, int threads,
                   void* out  // [rows, Dout] dtype, transposed [rows, Din]
);

// The bytes of workspace that fused_product_backward needs for one sample.
int64_t fused_product_workspace(int64_t tokens, const Experts& experts, DType dtype, int vector_width);

// The gradients of the experts and their gates, as in merge_experts_backward, where every sample b is a route
// and P_b = x_b^T grad_b is summed here. x and grad are packed for `samples` samples at a time; results
// depend neither on that number nor on the number of threads.
void fused_product_backward(
    // inputs
    const void* x,     // [B, T, Din] dtype
    const void* grad,  // [B, T, Dout] dtype
    int64_t tokens, const Experts& experts, const Routes& routes, DType dtype, int vector_width, int threads,
    int64_t samples,
    // outputs
    void* workspace,    // room for `samples` samples, 64-byte aligned
    float* carry,       // [M, Din, Dout] room if dtype is not float32 and samples < B, else null
    void* grad_weight,  // [M, Din, Dout] dtype
    float* grad_gate    // [B, k]
);

}  // namespace switch_moe
