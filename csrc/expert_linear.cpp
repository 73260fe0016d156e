#include "expert_linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

// One binary for every x86-64 machine: the compiler makes a version per instruction set and the loader picks.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define SWITCH_MOE_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SWITCH_MOE_VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define SWITCH_MOE_VECTORISED
#endif

namespace switch_moe {
namespace {

// Elements that one task owns. 2,048 floats are 8 KiB: the tiles of P, W and dW of three experts (56 KiB)
// stay in the second-level cache over all routes, and the fewest tiles (72 at D=384) still spread over many
// cores.
constexpr int64_t kTile = 2048;
constexpr int64_t kLanes = 16;  // independent float sums, one AVX-512 register

struct BFloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float x, float* out) { *out = x; }
inline void store(float x, BFloat16* out) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// acc = scale * source, or acc += scale * source.
template <typename T>
inline __attribute__((always_inline)) void scale_into(const T* source, float scale, bool add, int64_t n,
                                                      float* acc) {
    if (add) {
        for (int64_t i = 0; i < n; ++i) acc[i] += scale * to_float(source[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) acc[i] = scale * to_float(source[i]);
    }
}

template <typename T>
inline __attribute__((always_inline)) float dot(const float* a, const T* b, int64_t n) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += a[i + lane] * to_float(b[i + lane]);
    }
    for (; i < n; ++i) lanes[i % kLanes] += a[i] * to_float(b[i]);
    float sum = 0;
    for (float lane : lanes) sum += lane;
    return sum;
}

template <typename T>
inline __attribute__((always_inline)) void merge_tile(const T* weight, const int32_t* index,
                                                      const float* gate, int64_t elements, int64_t routes,
                                                      int64_t top_k, int64_t begin, int64_t n, T* merged) {
    float acc[kTile];
    for (int64_t r = 0; r < routes; ++r) {
        for (int64_t j = 0; j < top_k; ++j) {
            const int64_t slot = r * top_k + j;
            scale_into(weight + index[slot] * elements + begin, gate[slot], j > 0, n, acc);
        }
        T* out = merged + r * elements + begin;
        for (int64_t i = 0; i < n; ++i) store(acc[i], out + i);
    }
}

template <typename T>
inline __attribute__((always_inline)) void backward_tile(const T* grad_merged, const T* weight,
                                                         const int32_t* index, const float* gate,
                                                         int64_t elements, int64_t routes, int64_t top_k,
                                                         int64_t begin, int64_t n, float* grad_weight,
                                                         float* partial) {
    float p[kTile];
    for (int64_t r = 0; r < routes; ++r) {
        scale_into(grad_merged + r * elements + begin, 1.0f, false, n, p);
        for (int64_t j = 0; j < top_k; ++j) {
            const int64_t slot = r * top_k + j;
            const int64_t expert = index[slot] * elements + begin;
            scale_into(p, gate[slot], true, n, grad_weight + expert);
            partial[slot] = dot(p, weight + expert, n);
        }
    }
}

// target_clones needs plain functions, so there is one per type and direction.
#define SWITCH_MOE_TILES(T)                                                                               \
    SWITCH_MOE_VECTORISED void merge_tile_##T(const T* weight, const int32_t* index, const float* gate,   \
                                              int64_t elements, int64_t routes, int64_t top_k,            \
                                              int64_t begin, int64_t n, T* merged) {                      \
        merge_tile(weight, index, gate, elements, routes, top_k, begin, n, merged);                       \
    }                                                                                                     \
    SWITCH_MOE_VECTORISED void backward_tile_##T(                                                         \
        const T* grad_merged, const T* weight, const int32_t* index, const float* gate, int64_t elements, \
        int64_t routes, int64_t top_k, int64_t begin, int64_t n, float* grad_weight, float* partial) {    \
        backward_tile(grad_merged, weight, index, gate, elements, routes, top_k, begin, n, grad_weight,   \
                      partial);                                                                           \
    }
using Float32 = float;
SWITCH_MOE_TILES(Float32)
SWITCH_MOE_TILES(BFloat16)
#undef SWITCH_MOE_TILES

int64_t tile_count(int64_t elements) { return (elements + kTile - 1) / kTile; }

template <typename T, typename Tile>
void merge(Tile tile, const void* weight, const int32_t* index, const float* gate, int64_t elements,
           int64_t routes, int64_t top_k, int threads, void* merged) {
    parallel_for(tile_count(elements), threads, [&](int64_t t) {
        const int64_t begin = t * kTile;
        tile(static_cast<const T*>(weight), index, gate, elements, routes, top_k, begin,
             std::min(kTile, elements - begin), static_cast<T*>(merged));
    });
}

template <typename T, typename Tile>
void backward(Tile tile, const void* grad_merged, const void* weight, const int32_t* index, const float* gate,
              int64_t elements, int64_t routes, int64_t top_k, int threads, float* grad_weight,
              float* grad_gate) {
    const int64_t tiles = tile_count(elements);
    const int64_t slots = routes * top_k;
    std::vector<float> partial(tiles * slots);
    parallel_for(tiles, threads, [&](int64_t t) {
        const int64_t begin = t * kTile;
        tile(static_cast<const T*>(grad_merged), static_cast<const T*>(weight), index, gate, elements, routes,
             top_k, begin, std::min(kTile, elements - begin), grad_weight, partial.data() + t * slots);
    });
    std::vector<double> sum(slots, 0.0);
    for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t s = 0; s < slots; ++s) sum[s] += partial[t * slots + s];
    }
    std::copy(sum.begin(), sum.end(), grad_gate);
}

}  // namespace

void merge_experts(const void* weight, const int32_t* index, const float* gate, DType dtype, int64_t elements,
                   int64_t routes, int64_t top_k, int threads, void* merged) {
    switch (dtype) {
        case DType::float32:
            return merge<float>(merge_tile_Float32, weight, index, gate, elements, routes, top_k, threads,
                                merged);
        case DType::bfloat16:
            return merge<BFloat16>(merge_tile_BFloat16, weight, index, gate, elements, routes, top_k, threads,
                                   merged);
    }
}

void merge_experts_backward(const void* grad_merged, const void* weight, const int32_t* index,
                            const float* gate, DType dtype, int64_t elements, int64_t routes, int64_t top_k,
                            int threads, float* grad_weight, float* grad_gate) {
    switch (dtype) {
        case DType::float32:
            return backward<float>(backward_tile_Float32, grad_merged, weight, index, gate, elements, routes,
                                   top_k, threads, grad_weight, grad_gate);
        case DType::bfloat16:
            return backward<BFloat16>(backward_tile_BFloat16, grad_merged, weight, index, gate, elements,
                                      routes, top_k, threads, grad_weight, grad_gate);
    }
}

}  // namespace switch_moe
