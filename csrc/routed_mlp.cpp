#include "routed_mlp.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "parallel.h"

#define SWITCH_MOE_INLINED inline __attribute__((always_inline))

namespace switch_moe {
namespace {

// The pairs and the columns that a task has. Both are small, so that many threads find work in a few hundred
// pairs; 64 columns of float32 are four lines of the cache.
constexpr int64_t kPairsOfTask = 16;
constexpr int64_t kColumnsOfTask = 64;

// e^x, to 2 units in the last place between its bounds, and constant past them. The polynomial is Taylor's,
// at most ln(2) / 2 from zero. Nothing in it branches, so loops over it become vector instructions. NaN stays
// NaN.
SWITCH_MOE_INLINED float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    // Adding 1.5 * 2^23 rounds to an integer, and leaves it in the lowest bits.
    const float shifted = x * 1.44269504f + 12582912.0f, power = shifted - 12582912.0f;
    const float r = (x - power * 0.693359375f) + power * 2.12194440e-4f;
    float sum = 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    uint32_t bits, exponent;
    std::memcpy(&bits, &sum, sizeof bits);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;
    std::memcpy(&sum, &bits, sizeof bits);
    return sum;
}

SWITCH_MOE_INLINED float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Computes a = act(x) and slope = act'(x); for SwiGLU act is SiLU.
template <Activation activation>
SWITCH_MOE_INLINED void apply(float x, float& a, float& slope) {
    if constexpr (activation == Activation::relu) {
        slope = x > 0 ? 1.0f : 0.0f;
        a = x < 0 ? 0.0f : x;
    } else if constexpr (activation == Activation::gelu) {
        // x (1 + tanh(z)) / 2 = x sigmoid(2z) with 2z = x (c + d x^2), which cancels nothing.
        constexpr float c = 1.59576912f, d = 0.0713548163f;
        const float square = x * x, s = sigmoid(x * (c + d * square));
        a = x * s;
        slope = s + a * (1 - s) * (c + 3 * d * square);
    } else if constexpr (activation == Activation::gelu_erf) {
        // M. Abramowitz, I. A. Stegun, "Handbook of Mathematical Functions", 7.1.26: erfc to 1.5e-7.
        const float z = std::abs(x) * 0.707106781f, t = 1.0f / (1.0f + 0.3275911f * z);
        const float bell = exponential(-z * z);
        float tail = 1.061405429f;
        tail = tail * t - 1.453152027f;
        tail = tail * t + 1.421413741f;
        tail = tail * t - 0.284496736f;
        tail = tail * t + 0.254829592f;
        tail *= 0.5f * t * bell;
        const float below = x < 0 ? tail : 1 - tail;
        a = x * below;
        slope = below + x * 0.398942280f * bell;
    } else {
        const float s = sigmoid(x);
        a = x * s;
        slope = s + a * (1 - s);
    }
}

template <Activation activation, typename T>
SWITCH_MOE_INLINED void activate_row(const T* bias, int64_t units, T* hidden, T* out) {
    constexpr bool gated = is_gated(activation);
    if (bias != nullptr) {
        for (int64_t j = 0; j < (gated ? 2 : 1) * units; ++j) {
            store(to_float(hidden[j]) + to_float(bias[j]), hidden + j);
        }
    }
    const T* inner = activation == Activation::swiglu_second ? hidden + units : hidden;
    const T* factor = activation == Activation::swiglu_second ? hidden : hidden + units;
#pragma omp simd
    for (int64_t j = 0; j < units; ++j) {
        float a, slope;
        apply<activation>(to_float(inner[j]), a, slope);
        if constexpr (gated) a *= to_float(factor[j]);
        store(a, out + j);
    }
}

template <Activation activation, typename T>
SWITCH_MOE_INLINED float activate_row_backward(const T* hidden, float gate, int64_t units, T* of_units,
                                               T* of_hidden) {
    constexpr bool gated = is_gated(activation), second = activation == Activation::swiglu_second;
    const int64_t inner = second ? units : 0, factor = second ? 0 : units;
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < units; ++j) {
        float a, slope;
        apply<activation>(to_float(hidden[inner + j]), a, slope);
        const float u = to_float(of_units[j]), gated_u = gate * u;
        if constexpr (gated) {
            const float b = to_float(hidden[factor + j]);
            store(gated_u * a, of_hidden + factor + j);
            store(gated_u * slope * b, of_hidden + inner + j);
            a *= b;
        } else {
            store(gated_u * slope, of_hidden + j);
        }
        dot += u * a;
        store(gate * a, of_units + j);
    }
    return dot;
}

template <Activation activation, typename T>
struct Rows {
    static SWITCH_MOE_INLINED void forward(const T* bias, int64_t begin, int64_t end, int64_t units,
                                           T* hidden, T* out) {
        const int64_t width = is_gated(activation) ? 2 * units : units;
        for (int64_t i = begin; i < end; ++i) {
            activate_row<activation>(bias, units, hidden + i * width, out + i * units);
        }
    }
    static SWITCH_MOE_INLINED void backward(const T* hidden, const Pairs& pairs, int64_t begin, int64_t end,
                                            int64_t units, T* of_units, T* of_hidden, float* of_gate) {
        const int64_t width = is_gated(activation) ? 2 * units : units;
        for (int64_t i = begin; i < end; ++i) {
            of_gate[i] = activate_row_backward<activation>(hidden + i * width, pairs.gate[i], units,
                                                           of_units + i * units, of_hidden + i * width);
        }
    }
};

// Calls f with Rows<activation, T>{}.
template <typename T, typename Function>
SWITCH_MOE_INLINED void with_rows(Activation activation, const Function& f) {
    switch (activation) {
        case Activation::gelu:
            return f(Rows<Activation::gelu, T>{});
        case Activation::gelu_erf:
            return f(Rows<Activation::gelu_erf, T>{});
        case Activation::relu:
            return f(Rows<Activation::relu, T>{});
        case Activation::swiglu:
            return f(Rows<Activation::swiglu, T>{});
        case Activation::swiglu_second:
            return f(Rows<Activation::swiglu_second, T>{});
    }
}

// Adds gate[i] * (y[i] + bias) to out[row[i]] for the columns [begin, begin + n).
template <typename T>
SWITCH_MOE_INLINED void add_columns(const T* y, const T* bias, const Pairs& pairs, int64_t columns,
                                    int64_t begin, int64_t n, float* out) {
    float shift[kColumnsOfTask] = {};
    for (int64_t j = 0; bias != nullptr && j < n; ++j) shift[j] = to_float(bias[begin + j]);
    for (int64_t i = 0; i < pairs.count; ++i) {
        const T* from = y + i * columns + begin;
        float* to = out + pairs.row[i] * columns + begin;
        const float gate = pairs.gate != nullptr ? pairs.gate[i] : 1.0f;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] += gate * (to_float(from[j]) + shift[j]);
    }
}

// Adds the sum of gate[i] * rows[i] to out for the columns [begin, begin + n).
template <typename T>
SWITCH_MOE_INLINED void sum_columns(const T* rows, const Pairs& pairs, int64_t columns, int64_t begin,
                                    int64_t n, float* out) {
    float sum[kColumnsOfTask] = {};
    for (int64_t i = 0; i < pairs.count; ++i) {
        const T* from = rows + i * columns + begin;
        const float gate = pairs.gate != nullptr ? pairs.gate[i] : 1.0f;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) sum[j] += gate * to_float(from[j]);
    }
    for (int64_t j = 0; j < n; ++j) out[begin + j] += sum[j];
}

template <typename T>
SWITCH_MOE_INLINED float dot(const T* a, const T* b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += to_float(a[j]) * to_float(b[j]);
    return sum;
}

// target_clones takes no templates, so there is a plain function for each type.
#define SWITCH_MOE_PASSES(T)                                                                                \
    SWITCH_MOE_VECTORISED void forward_of(Activation activation, const T* bias, int64_t begin, int64_t end, \
                                          int64_t units, T* hidden, T* out) {                               \
        with_rows<T>(activation, [&](auto rows) __attribute__((always_inline)) {                            \
            rows.forward(bias, begin, end, units, hidden, out);                                             \
        });                                                                                                 \
    }                                                                                                       \
    SWITCH_MOE_VECTORISED void backward_of(Activation activation, const T* hidden, const Pairs& pairs,      \
                                           int64_t begin, int64_t end, int64_t units, T* of_units,          \
                                           T* of_hidden, float* of_gate) {                                  \
        with_rows<T>(activation, [&](auto rows) __attribute__((always_inline)) {                            \
            rows.backward(hidden, pairs, begin, end, units, of_units, of_hidden, of_gate);                  \
        });                                                                                                 \
    }                                                                                                       \
    SWITCH_MOE_VECTORISED void add_columns_of(const T* y, const T* bias, const Pairs& pairs,                \
                                              int64_t columns, int64_t begin, int64_t n, float* out) {      \
        add_columns(y, bias, pairs, columns, begin, n, out);                                                \
    }                                                                                                       \
    SWITCH_MOE_VECTORISED void sum_columns_of(const T* grad, const Pairs& pairs, int64_t columns,           \
                                              int64_t begin, int64_t n, float* out) {                       \
        sum_columns(grad, pairs, columns, begin, n, out);                                                   \
    }                                                                                                       \
    SWITCH_MOE_VECTORISED void add_dots_of(const T* grad, const T* bias, int64_t begin, int64_t end,        \
                                           int64_t columns, float* of_gate) {                               \
        for (int64_t i = begin; i < end; ++i) of_gate[i] += dot(grad + i * columns, bias, columns);         \
    }
SWITCH_MOE_PASSES(float)
SWITCH_MOE_PASSES(BFloat16)
#undef SWITCH_MOE_PASSES

// Calls task(begin, end) for pieces of [0, count).
template <typename Task>
void for_pieces(int64_t count, int64_t piece, int threads, const Task& task) {
    parallel_for((count + piece - 1) / piece, threads,
                 [&](int64_t i) { task(i * piece, std::min(count, (i + 1) * piece)); });
}

// Calls f with a null pointer of the type of the elements.
template <typename Function>
void with_type(DType dtype, const Function& f) {
    if (dtype == DType::bfloat16) return f(static_cast<BFloat16*>(nullptr));
    return f(static_cast<float*>(nullptr));
}

}  // namespace

void gather_rows(const void* x, const Pairs& pairs, int64_t columns, DType dtype, int threads, void* out) {
    const int64_t bytes = columns * (dtype == DType::bfloat16 ? 2 : 4);
    for_pieces(pairs.count, kPairsOfTask, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            std::memcpy(static_cast<char*>(out) + i * bytes,
                        static_cast<const char*>(x) + pairs.row[i] * bytes, bytes);
        }
    });
}

void add_rows(const void* y, const void* bias, const Pairs& pairs, int64_t columns, DType dtype, int threads,
              float* out) {
    with_type(dtype, [&](auto* null) {
        using T = std::remove_pointer_t<decltype(null)>;
        for_pieces(columns, kColumnsOfTask, threads, [&](int64_t begin, int64_t end) {
            add_columns_of(static_cast<const T*>(y), static_cast<const T*>(bias), pairs, columns, begin,
                           end - begin, out);
        });
    });
}

void activate(const void* bias, int64_t count, int64_t units, Activation activation, DType dtype, int threads,
              void* hidden, void* out) {
    with_type(dtype, [&](auto* null) {
        using T = std::remove_pointer_t<decltype(null)>;
        for_pieces(count, kPairsOfTask, threads, [&](int64_t begin, int64_t end) {
            forward_of(activation, static_cast<const T*>(bias), begin, end, units, static_cast<T*>(hidden),
                       static_cast<T*>(out));
        });
    });
}

void activate_backward(const void* hidden, const Pairs& pairs, int64_t units, Activation activation,
                       DType dtype, int threads, void* of_units, void* of_hidden, float* of_gate) {
    with_type(dtype, [&](auto* null) {
        using T = std::remove_pointer_t<decltype(null)>;
        for_pieces(pairs.count, kPairsOfTask, threads, [&](int64_t begin, int64_t end) {
            backward_of(activation, static_cast<const T*>(hidden), pairs, begin, end, units,
                        static_cast<T*>(of_units), static_cast<T*>(of_hidden), of_gate);
        });
    });
}

void sum_rows(const void* rows, const Pairs& pairs, int64_t columns, DType dtype, int threads, float* out) {
    with_type(dtype, [&](auto* null) {
        using T = std::remove_pointer_t<decltype(null)>;
        for_pieces(columns, kColumnsOfTask, threads, [&](int64_t begin, int64_t end) {
            sum_columns_of(static_cast<const T*>(rows), pairs, columns, begin, end - begin, out);
        });
    });
}

void add_dots(const void* rows, const void* bias, int64_t count, int64_t columns, DType dtype, int threads,
              float* out) {
    with_type(dtype, [&](auto* null) {
        using T = std::remove_pointer_t<decltype(null)>;
        for_pieces(count, kPairsOfTask, threads, [&](int64_t begin, int64_t end) {
            add_dots_of(static_cast<const T*>(rows), static_cast<const T*>(bias), begin, end, columns, out);
        });
    });
}

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t page =
        1 << 21;  // a smaller one is not huge; a larger page's address is a multiple too
    const auto begin = reinterpret_cast<uintptr_t>(memory), end = begin + static_cast<uintptr_t>(bytes);
    const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // only a wish
#endif
}

}  // namespace switch_moe
