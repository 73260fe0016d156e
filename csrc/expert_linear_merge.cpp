// The merge path of expert_linear.h. The E elements of an expert are cut into tiles, and a task owns one tile
// of every matrix: it reads that tile of all experts and writes that tile of all results.
#include <algorithm>
#include <vector>

#include "expert_linear.h"
#include "parallel.h"

namespace switch_moe {
namespace {

// The elements of a tile. Memory bandwidth decides: 512 to 4,096 took the same time within 4% at D =
// 384, 768 and 1152. At 2,048 the fewest tiles (72 at D = 384) still spread over many cores.
constexpr int64_t kTile = 2048;
constexpr int64_t kVectorWidth = 16;  // floats of an AVX-512 register, summed independently of each other

// Computes acc = scale * source, or acc += scale * source where `add`.
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
    float sums[kVectorWidth] = {};
    int64_t i = 0;
    for (; i + kVectorWidth <= n; i += kVectorWidth) {
        for (int64_t v = 0; v < kVectorWidth; ++v) sums[v] += a[i + v] * to_float(b[i + v]);
    }
    for (; i < n; ++i) sums[i % kVectorWidth] += a[i] * to_float(b[i]);
    float total = 0;
    for (float sum : sums) total += sum;
    return total;
}

template <typename T>
inline __attribute__((always_inline)) void merge_tile(const Experts& experts, const Routes& routes,
                                                      int64_t begin, int64_t n, T* merged) {
    const T* weight = static_cast<const T*>(experts.weight) + begin;
    const int64_t elements = experts.elements();
    float acc[kTile];
    for (int64_t r = 0; r < routes.num_routes; ++r) {
        for (int64_t j = 0; j < routes.top_k; ++j) {
            const int64_t choice = r * routes.top_k + j;
            scale_into(weight + routes.index[choice] * elements, routes.gate[choice], j > 0, n, acc);
        }
        T* out = merged + r * elements + begin;
        for (int64_t i = 0; i < n; ++i) store(acc[i], out + i);
    }
}

// Sums the tile of every expert's gradient over the routes in `sum` [M, n] and then writes it once. `partial`
// [R, k] gets what the tile adds to the gates' gradients.
template <typename T>
inline __attribute__((always_inline)) void backward_tile(const T* grad_merged, const Experts& experts,
                                                         const Routes& routes, Round round, int64_t begin,
                                                         int64_t n, float* sum, float* carry, T* grad_weight,
                                                         float* partial) {
    const T* weight = static_cast<const T*>(experts.weight) + begin;
    const int64_t elements = experts.elements();
    float p[kTile];
    std::fill(sum, sum + experts.num_experts * n, 0.0f);
    for (int64_t r = 0; r < routes.num_routes; ++r) {
        scale_into(grad_merged + r * elements + begin, 1.0f, false, n, p);
        for (int64_t j = 0; j < routes.top_k; ++j) {
            const int64_t choice = r * routes.top_k + j;
            scale_into(p, routes.gate[choice], true, n, sum + routes.index[choice] * n);
            partial[choice] = dot(p, weight + routes.index[choice] * elements, n);
        }
    }
    for (int64_t e = 0; e < experts.num_experts; ++e) {
        const int64_t at = e * elements + begin;
        if (!round.first) scale_into(carry + at, 1.0f, true, n, sum + e * n);
        if (!round.last) {
            std::copy(sum + e * n, sum + (e + 1) * n, carry + at);
            continue;
        }
        for (int64_t i = 0; i < n; ++i) store(sum[e * n + i], grad_weight + at + i);
    }
}

// target_clones takes no templates, so there is a plain function per type and direction.
#define SWITCH_MOE_TILES(T)                                                                                  \
    SWITCH_MOE_VECTORISED void merge_tile_of(const Experts& experts, const Routes& routes, int64_t begin,    \
                                             int64_t n, T* merged) {                                         \
        merge_tile(experts, routes, begin, n, merged);                                                       \
    }                                                                                                        \
    SWITCH_MOE_VECTORISED void backward_tile_of(const T* grad_merged, const Experts& experts,                \
                                                const Routes& routes, Round round, int64_t begin, int64_t n, \
                                                float* sum, float* carry, T* grad_weight, float* partial) {  \
        backward_tile(grad_merged, experts, routes, round, begin, n, sum, carry, grad_weight, partial);      \
    }
SWITCH_MOE_TILES(float)
SWITCH_MOE_TILES(BFloat16)
#undef SWITCH_MOE_TILES

int64_t tile_count(int64_t elements) { return (elements + kTile - 1) / kTile; }

template <typename T>
void merge(const Experts& experts, const Routes& routes, int threads, void* merged) {
    parallel_for(tile_count(experts.elements()), threads, [&](int64_t tile) {
        const int64_t begin = tile * kTile;
        const int64_t n = std::min(kTile, experts.elements() - begin);
        merge_tile_of(experts, routes, begin, n, static_cast<T*>(merged));
    });
}

template <typename T>
void backward(const void* grad_merged, const Experts& experts, const Routes& routes, Round round, int threads,
              float* carry, void* grad_weight, float* grad_gate) {
    const int64_t tiles = tile_count(experts.elements());
    const int64_t num_choices = routes.num_routes * routes.top_k;
    std::vector<float> partial(tiles * num_choices);
    parallel_for(tiles, threads, [&](int64_t tile) {
        static thread_local std::vector<float> sum;
        if (static_cast<int64_t>(sum.size()) < experts.num_experts * kTile)
            sum.resize(experts.num_experts * kTile);
        const int64_t begin = tile * kTile;
        const int64_t n = std::min(kTile, experts.elements() - begin);
        backward_tile_of(static_cast<const T*>(grad_merged), experts, routes, round, begin, n, sum.data(),
                         carry, static_cast<T*>(grad_weight), partial.data() + tile * num_choices);
    });
    std::vector<double> total(num_choices, 0.0);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t c = 0; c < num_choices; ++c) total[c] += partial[tile * num_choices + c];
    }
    std::copy(total.begin(), total.end(), grad_gate);
}

}  // namespace

void merge_experts(const Experts& experts, const Routes& routes, DType dtype, int threads, void* merged) {
    if (dtype == DType::bfloat16) return merge<BFloat16>(experts, routes, threads, merged);
    return merge<float>(experts, routes, threads, merged);
}

void merge_experts_backward(const void* grad_merged, const Experts& experts, const Routes& routes,
                            Round round, DType dtype, int threads, float* carry, void* grad_weight,
                            float* grad_gate) {
    if (dtype == DType::bfloat16) {
        return backward<BFloat16>(grad_merged, experts, routes, round, threads, carry, grad_weight,
                                  grad_gate);
    }
    return backward<float>(grad_merged, experts, routes, round, threads, carry, grad_weight, grad_gate);
}

}  // namespace switch_moe
