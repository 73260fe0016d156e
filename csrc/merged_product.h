// Products with merged linear experts on the CPU, float32: the merged weights, and the gradients with respect
// to them, exist only in cache and registers.
//
// Legend: B samples of T tokens, R routes (rows of gates), M experts [Din, Dout], k experts chosen per route.
#pragma once

#include <cstdint>

namespace switch_moe {

// Floats of a vector: 16 needs AVX-512 (F, BW, DQ, VL), 8 needs AVX2, both FMA. False: there is no such
// kernel in this build. Whether the processor can run it is for the caller to know.
bool merged_product_takes(int lanes);

// FLOPs of all products so far, two for a multiplication and its addition; merging is not counted.
int64_t merged_product_flops();

struct Experts {
    int64_t count, inputs, outputs;  // M, Din, Dout
    const float* weight;             // [M, Din, Dout]
};

struct Gates {
    int64_t routes, top_k;  // R, k
    const int32_t* index;   // [R, k], each in [0, M)
    const float* gate;      // [R, k]
};

// out[i] = x[i] V_r + bias[r] for the rows i in [starts[r], starts[r + 1]) of each route r, where
// V_r = sum_j gate[r, j] W_index[r, j]; or, transposed, out[i] = x[i] V_r^T. Results do not depend on the
// number of threads.
void merged_product(const float* x,  // [rows, Din], transposed [rows, Dout]
                    const Experts& experts, const Gates& gates,
                    const int64_t* starts,  // [R + 1]
                    const float* bias,      // [R, Dout] or null
                    bool transposed, int lanes, int threads,
                    float* out  // [rows, Dout], transposed [rows, Din]
);

// Floats that merged_product_backward needs for a sample.
int64_t merged_product_workspace(int64_t tokens, const Experts& experts, int lanes);

// The gradients of the experts and their gates. With P_b = x_b^T grad_b, one route for each sample:
// dW_e = sum_{b, j: index[b, j] = e} gate[b, j] P_b and dgate[b, j] = <P_b, W_index[b, j]>. x and grad are
// packed for some samples at a time. Results do not depend on their number or on that of the threads.
void merged_product_backward(const float* x,     // [B, T, Din]
                             const float* grad,  // [B, T, Dout]
                             int64_t tokens, const Experts& experts, const Gates& gates, int lanes,
                             int threads, int64_t samples,
                             float* workspace,    // 64-byte aligned, for `samples` samples
                             float* grad_weight,  // [M, Din, Dout]
                             float* grad_gate     // [B, k]
);

}  // namespace switch_moe
