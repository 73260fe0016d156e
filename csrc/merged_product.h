// Products with merged linear experts on the CPU: the merged weights, and the gradients with respect to them,
// exist only in cache and registers. Sums are float32.
//
// Legend: B samples of T tokens, R routes (rows of gates), M experts [Din, Dout], k experts chosen per route.
#pragma once

#include <cstdint>

#include "elements.h"

namespace switch_moe {

// Floats of a vector: 16 needs AVX-512 (F, BW, DQ, VL; for bfloat16 BF16 too), 8 needs AVX2, both FMA. False:
// there is no such kernel in this build. Whether the processor can run it is for the caller to know. The
// instruction that multiplies bfloat16 takes denormal numbers for zero.
bool merged_product_takes(DType dtype, int lanes);

// FLOPs of all products so far, two for a multiplication and its addition; merging is not counted.
int64_t merged_product_flops();

struct Experts {
    int64_t count, inputs, outputs;  // M, Din, Dout
    const void* weight;              // [M, Din, Dout] dtype
};

struct Gates {
    int64_t routes, top_k;  // R, k
    const int32_t* index;   // [R, k], each in [0, M)
    const float* gate;      // [R, k]
};

// out[i] = x[i] V_r + bias[r] for the rows i in [starts[r], starts[r + 1]) of each route r, where
// V_r = sum_j gate[r, j] W_index[r, j], rounded once; or, transposed, out[i] = x[i] V_r^T. Results do not
// depend on the number of threads.
void merged_product(const void* x,  // [rows, Din] dtype, transposed [rows, Dout]
                    const Experts& experts, const Gates& gates,
                    const int64_t* starts,  // [R + 1]
                    const void* bias,       // [R, Dout] dtype or null
                    bool transposed, DType dtype, int lanes, int threads,
                    void* out  // [rows, Dout] dtype, transposed [rows, Din]
);

// Bytes that merged_product_backward needs for a sample.
int64_t merged_product_workspace(int64_t tokens, const Experts& experts, DType dtype, int lanes);

// The gradients of the experts and their gates. With P_b = x_b^T grad_b, one route for each sample:
// dW_e = sum_{b, j: index[b, j] = e} gate[b, j] P_b and dgate[b, j] = <P_b, W_index[b, j]>. x and grad are
// packed for some samples at a time. Results do not depend on their number or on that of the threads.
void merged_product_backward(
    const void* x,     // [B, T, Din] dtype
    const void* grad,  // [B, T, Dout] dtype
    int64_t tokens, const Experts& experts, const Gates& gates, DType dtype, int lanes, int threads,
    int64_t samples,
    void* workspace,    // 64-byte aligned, for `samples` samples
    float* carry,       // [M, Din, Dout] room if dtype is not float32 and samples < B, else null
    void* grad_weight,  // [M, Din, Dout] dtype
    float* grad_gate    // [B, k]
);

}  // namespace switch_moe
