// What routed_mlp does on the CPU around its products: passes over the pairs of one expert, a row each.
//
//     forward    gather_rows, product, activate, product, add_rows
//     backward   gather_rows (twice), product, activate_backward, products, add_rows; sum_rows for the biases
//
// Legend: n pairs, D columns of x, W columns of the hidden layer before its activation and H units after it;
// W is 2H for SwiGLU, else H. All sums are float32, and one task takes each of them, so that results do not
// depend on the number of threads.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace switch_moe {

enum class Activation : int { gelu = 0, gelu_erf = 1, relu = 2, swiglu = 3, swiglu_second = 4 };

constexpr bool is_gated(Activation activation) { return activation >= Activation::swiglu; }

// The pairs of one expert.
struct Pairs {
    int64_t count;       // n
    const int32_t* row;  // [n]
    const float* gate;   // [n], or null: all are one
};

// out[i] = x[row[i]].
void gather_rows(const void* x,  // [R, D] dtype
                 const Pairs& pairs, int64_t columns, DType dtype, int threads,
                 void* out  // [n, D] dtype
);

// Adds gate[i] * (y[i] + bias) to out[row[i]], in the order of i.
void add_rows(const void* y,     // [n, D] dtype
              const void* bias,  // [D] dtype or null
              const Pairs& pairs, int64_t columns, DType dtype, int threads,
              float* out  // [R, D]
);

// Adds the bias to `hidden` in place, and applies the activation.
void activate(const void* bias,  // [W] dtype or null
              int64_t count, int64_t units, Activation activation, DType dtype, int threads,
              void* hidden,  // [n, W] dtype
              void* out      // [n, H] dtype
);

// From the gradient u of the units without the gate, in `of_units`, makes of_hidden = gate * u * act'(hidden)
// and of_gate = <u, act(hidden)>, and leaves gate * act(hidden) in `of_units`.
void activate_backward(const void* hidden,  // [n, W] dtype
                       const Pairs& pairs, int64_t units, Activation activation, DType dtype, int threads,
                       void* of_units,   // [n, H] dtype, read and written
                       void* of_hidden,  // [n, W] dtype
                       float* of_gate    // [n]
);

// Adds the sum of gate[i] * rows[i] to out: the gradient of a bias.
void sum_rows(const void* rows,  // [n, D] dtype
              const Pairs& pairs, int64_t columns, DType dtype, int threads,
              float* out  // [D]
);

// Adds <rows[i], bias> to out[i].
void add_dots(const void* rows,  // [n, D] dtype
              const void* bias,  // [D] dtype
              int64_t count, int64_t columns, DType dtype, int threads,
              float* out  // [n]
);

// Asks the system to back fresh memory by huge pages, where it knows such a thing (Linux). Writing 100 MB for
// the first time then took 11 instead of 40 ms. It is not for the gradient of a wide weight: a product that
// passes over its result several times took 1.2 times as long, as the rows share few sets of the cache there.
void prefer_huge_pages(void* memory, int64_t bytes);

}  // namespace switch_moe
