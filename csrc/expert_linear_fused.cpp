#include <algorithm>
#include <atomic>
#include <vector>

#include "expert_linear.h"
#include "expert_linear_fused_kernel.h"
#include "parallel.h"

namespace switch_moe {
namespace {

std::atomic<int64_t> flops{0};

struct Kernels {
    Shape shape;
    void (*product)(const Product&, const Block&);
    void (*pack)(const Gradient&, const Block&);
    void (*gradient)(const Gradient&, const Block&);
};

#ifdef __x86_64__
#define SWITCH_MOE_KERNELS(name, features, Element, vector_width, rows)                              \
    __attribute__((target(features))) void product_##name(const Product& p, const Block& block) {    \
        Kernel<Element, vector_width, rows>::product_block(p, block);                                \
    }                                                                                                \
    __attribute__((target(features))) void pack_##name(const Gradient& g, const Block& block) {      \
        Kernel<Element, vector_width, rows>::pack_block(g, block);                                   \
    }                                                                                                \
    __attribute__((target(features))) void gradient_##name(const Gradient& g, const Block& block) {  \
        Kernel<Element, vector_width, rows>::gradient_block(g, block);                               \
    }                                                                                                \
    constexpr Kernels name{Kernel<Element, vector_width, rows>::kShape, product_##name, pack_##name, \
                           gradient_##name};
#define SWITCH_MOE_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
SWITCH_MOE_KERNELS(avx2, "avx2,fma", float, 8, 4)
SWITCH_MOE_KERNELS(avx512, SWITCH_MOE_AVX512, float, 16, 8)
#ifdef SWITCH_MOE_AVX512_BF16
SWITCH_MOE_KERNELS(avx512_bf16, SWITCH_MOE_AVX512 ",avx512bf16", BFloat16, 16, 8)
#endif
#undef SWITCH_MOE_AVX512
#undef SWITCH_MOE_KERNELS

const Kernels* kernels(DType dtype, int vector_width) {
#ifdef SWITCH_MOE_AVX512_BF16
    if (dtype == DType::bfloat16 && vector_width == 16) return &avx512_bf16;
#endif
    if (dtype != DType::float32) return nullptr;
    return vector_width == 16 ? &avx512 : vector_width == 8 ? &avx2 : nullptr;
}
#else
const Kernels* kernels(DType, int) { return nullptr; }
#endif

// The columns of a block: up to `tiles` tiles, and fewer where all threads need work.
int64_t block_columns(int64_t width, int64_t tile, int64_t tiles, int64_t others, int threads) {
    while (tiles > 1 && ceil_div(width, tiles * tile) * others < 2 * threads) tiles /= 2;
    return tiles * tile;
}

// The rows of an expert's gradient that a block has. Small experts need small blocks, so that there are
// enough of them for the threads. The number of threads must not decide how sums are cut, so it has no say
// here.
int64_t gradient_rows(const Experts& experts) {
    return experts.inputs * experts.outputs <= 1 << 17 ? 32 : 128;
}

}  // namespace

bool fused_product_takes(DType dtype, int vector_width) { return kernels(dtype, vector_width) != nullptr; }

int64_t fused_product_flops() { return flops.load(); }

void fused_product(const void* x, const Experts& experts, const Routes& routes, const int64_t* starts,
                   const void* bias, bool transposed, DType dtype, int vector_width, int threads, void* out) {
    const Kernels& use = *kernels(dtype, vector_width);
    Product p{x, experts, routes, bias, transposed, out, experts.inputs, experts.outputs};
    if (transposed) std::swap(p.depth, p.width);
    std::vector<Block> blocks;
    const int64_t bands = ceil_div(starts[routes.num_routes], kMostRows);
    const int64_t step = block_columns(p.width, use.shape.width, use.shape.slivers(p.depth),
                                       std::max(routes.num_routes, bands), threads);
    for (int64_t column = 0; column < p.width; column += step) {
        const int64_t columns = std::min(step, p.width - column);
        for (int64_t r = 0; r < routes.num_routes; ++r) {
            for (int64_t row = starts[r]; row < starts[r + 1]; row += kMostRows) {
                blocks.push_back({r, row, std::min(kMostRows, starts[r + 1] - row), column, columns});
            }
        }
    }
    parallel_for(blocks.size(), threads, [&](int64_t i) {
        use.product(p, blocks[i]);
        flops.fetch_add(2 * blocks[i].rows * blocks[i].columns * p.depth, std::memory_order_relaxed);
    });
}

int64_t fused_product_workspace(int64_t tokens, const Experts& experts, DType dtype, int vector_width) {
    return 4 * PackedSample(tokens, experts, kernels(dtype, vector_width)->shape).size();
}

void fused_product_backward(const void* x, const void* grad, int64_t tokens, const Experts& experts,
                            const Routes& routes, DType dtype, int vector_width, int threads, int64_t samples,
                            void* workspace, float* carry, void* grad_weight, float* grad_gate) {
    const Kernels& use = *kernels(dtype, vector_width);
    const int64_t num_choices = routes.num_routes * routes.top_k;
    std::vector<char> fresh(num_choices), used(experts.num_experts);
    for (int64_t choice = 0; choice < num_choices; ++choice) {
        fresh[choice] = !used[routes.index[choice]];
        used[routes.index[choice]] = 1;
    }
    const int64_t height = gradient_rows(experts), down = ceil_div(experts.inputs, height),
                  across = ceil_div(experts.outputs, use.shape.width);
    std::vector<float> partial(down * across * num_choices);
    const PackedSample packed(tokens, experts, use.shape);
    const int64_t step = block_columns(experts.outputs, use.shape.width, kSlivers, down, threads);
    for (int64_t begin = 0; begin < routes.num_routes; begin += samples) {
        const int64_t end = std::min(begin + samples, routes.num_routes);
        const Gradient g{x,      grad,    packed, workspace,    begin,
                         end,    experts, routes, fresh.data(), used.data(),
                         height, down,    carry,  grad_weight,  partial.data()};
        std::vector<Block> packs, blocks;
        for (int64_t row = 0; row < experts.inputs; row += kPackRows) {
            const int64_t rows = std::min(kPackRows, experts.inputs - row);
            for (int64_t b = begin; b < end; ++b) packs.push_back({b, row, rows, 0, 0});
        }
        for (int64_t column = 0; column < experts.outputs; column += step) {
            const int64_t columns = std::min(step, experts.outputs - column);
            for (int64_t b = begin; b < end; ++b) packs.push_back({b, 0, 0, column, columns});
            for (int64_t row = 0; row < experts.inputs; row += height) {
                blocks.push_back({0, row, std::min(height, experts.inputs - row), column, columns});
            }
        }
        parallel_for(packs.size(), threads, [&](int64_t i) { use.pack(g, packs[i]); });
        parallel_for(blocks.size(), threads, [&](int64_t i) {
            use.gradient(g, blocks[i]);
            flops.fetch_add(2 * blocks[i].rows * blocks[i].columns * tokens * (end - begin),
                            std::memory_order_relaxed);
        });
    }
    std::vector<double> total(num_choices);
    for (int64_t granule = 0; granule < down * across; ++granule) {
        for (int64_t choice = 0; choice < num_choices; ++choice)
            total[choice] += partial[granule * num_choices + choice];
    }
    std::copy(total.begin(), total.end(), grad_gate);
}

}  // namespace switch_moe
