// Linear experts on the GPU.
#pragma once

#include <cstdint>

namespace switch_moe {

// One product of every sample with its merged weight: the forward, or the gradient of x. Sizes B, T, Din,
// Dout, M, k as in expert_linear.h. Tensors are contiguous and start at multiples of 16 bytes.
struct MergedProduct {
    bool is_bfloat16;  // else float16
    bool gradient;     // dx in place of m(x)
    bool modulate;
    int64_t batch, tokens, inputs, outputs;  // B, T, Din, Dout
    int64_t num_experts, top_k;              // M, k
    const void* weight;                      // [M, Din, Dout]
    const void* bias;                        // [M, Dout], or null; not read by the gradient
    const int32_t* index;                    // [B, k]; one out of range is expert 0 with a gate of NaN
    const float* gate;                       // [B, k]
    const void* input;                       // x [B, T, Din]; of the gradient dm [B, T, Dout]
    const void* grad;  // [B, T, Din], of the output; read by the gradient with modulate, where Din = Dout
    void* mixture;     // [B, T, Dout], m(x); with modulate read by the gradient, and written where not null
    void* output;      // [B, T, Dout]: m(x), or x (1 + m(x)) with modulate; of the gradient dx [B, T, Din],
                       // dm V^T, with modulate dm V^T + grad (1 + m(x))
};

// Whether a kernel of this build can form the product: k at most 4, Din and Dout multiples of 8, B, T, Din
// and Dout not 0, sizes that fit 32 bits.
bool merged_product_runs(const MergedProduct& product);

// On `stream` (a cudaStream_t) of the current device, which is of compute capability 9.0.
void merged_product_cuda(const MergedProduct& product, void* stream);

// Gradients of weights, biases and gates. Sizes and tensors as above.
struct WeightGradientProblem {
    int64_t batch, tokens, inputs, outputs;  // B, T, Din, Dout
    int64_t num_experts, top_k;              // M, k
    bool has_bias;
};
struct WeightGradient {
    WeightGradientProblem problem;
    bool is_bfloat16;      // else float16
    bool single;           // gradients of weights and biases are float32
    const void* weight;    // [M, Din, Dout]
    const void* bias;      // [M, Dout], or null
    const int32_t* order;  // [B]: every sample once, best those with the same experts together
    const int32_t* index;  // [B, k]; one out of range is expert 0 with a gate of NaN
    const float* gate;     // [B, k]
    const void* x;         // [B, T, Din]
    const void* grad;      // [B, T, Dout], of the mixture: dm
    void* workspace;       // as many bytes as weight_gradient_workspace says, from a multiple of 16 on
    void* weight_grad;     // [M, Din, Dout]
    void* bias_grad;       // [M, Dout]; not written without a bias
    float* gate_grad;      // [B, k]
};

constexpr int kMaxGradientTopK = 2, kMaxGradientExperts = 32;

// How many bytes weight_gradient_cuda works in on the current device. It splits the samples into parts, as
// many as a model of the device finds fastest, but never so that their sums take more than 256 MB. Throws
// where no kernel of this build takes the sizes: k and M at most as above, Din and Dout multiples of 8, B, T,
// Din and Dout not 0, sizes that fit 32 bits.
int64_t weight_gradient_workspace(const WeightGradientProblem& problem);

// On `stream` (a cudaStream_t) of the current device, which is of compute capability 9.0. Throws as above.
void weight_gradient_cuda(const WeightGradient& gradient, void* stream);

}  // namespace switch_moe
