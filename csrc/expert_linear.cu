// Chooses and starts the kernels of expert_linear_hopper.h.
#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "expert_linear_cuda.h"
#include "expert_linear_hopper.h"

namespace switch_moe {
namespace {

using hopper::BFloat16;
using hopper::Float16;
using hopper::tensor_map;

template <typename T, int kGroups, int kTopK, bool kGradient, bool kModulate>
void start(const MergedProduct& product, void* stream) {
    using Layout = MergedProductLayout<kGroups, kTopK, kModulate>;
    const int64_t batch = product.batch, tokens = product.tokens;
    const int64_t summed = kGradient ? product.outputs : product.inputs;
    const int64_t outputs = kGradient ? product.inputs : product.outputs;
    auto tokens_of = [&](const void* address, int64_t width, std::initializer_list<int> box,
                         Swizzle swizzle) {
        return tensor_map(address, {width, tokens, batch}, {width * 2, tokens * width * 2}, box, swizzle);
    };
    auto piece_of = [&](const void* address) {
        return tokens_of(address, outputs, {64, Layout::kPiece, 1}, Swizzle::k128);
    };
    MergedProductMaps<T> maps;
    maps.tokens = tokens_of(product.input, summed, {Layout::kDeep, Layout::kTokens / 2, 1}, Swizzle::k64);
    const int64_t row = product.outputs * 2;
    const std::initializer_list<int64_t> weight{product.outputs, product.inputs, product.num_experts};
    maps.weight = kGradient ? tensor_map(product.weight, weight, {row, product.inputs * row},
                                         {Layout::kDeep, 64 * kGroups, 1}, Swizzle::k64)
                            : tensor_map(product.weight, weight, {row, product.inputs * row},
                                         {64, Layout::kDeep, 1}, Swizzle::k128);
    maps.out = piece_of(product.output);
    // Where there is no such tensor, nothing reads its map.
    maps.factor = kModulate ? piece_of(kGradient ? product.grad : product.input) : maps.out;
    maps.mixture = kModulate && product.mixture != nullptr ? piece_of(product.mixture) : maps.out;
    const MergedProductSizes sizes{static_cast<int>(batch),
                                   static_cast<int>(tokens),
                                   static_cast<int>(summed),
                                   static_cast<int>(outputs),
                                   static_cast<int>(product.num_experts),
                                   !kGradient && product.mixture != nullptr};
    const int clusters =
        std::min(MergedTiles<kGroups>(sizes).count, std::max(hopper::multiprocessors() / kMergedCluster, 1));
    const T* bias = kGradient ? nullptr : static_cast<const T*>(product.bias);
    hopper::launch_kernel<MergedProductMaps<T>, const int32_t*, const float*, const T*, MergedProductSizes>(
        merged_product<T, kGroups, kTopK, kGradient, kModulate>,
        {clusters * kMergedCluster, kMergedCluster, Layout::kThreads, Layout::kBytes}, stream, maps,
        product.index, product.gate, bias, sizes);
}

template <typename T, int kGroups, int kTopK>
void start(const MergedProduct& product, void* stream) {
    if (product.gradient) {
        (product.modulate ? start<T, kGroups, kTopK, true, true>
                          : start<T, kGroups, kTopK, true, false>)(product, stream);
    } else {
        (product.modulate ? start<T, kGroups, kTopK, false, true>
                          : start<T, kGroups, kTopK, false, false>)(product, stream);
    }
}

// Outputs that the blocks of clusters cover, with 64 * groups in each block.
int64_t covered(int64_t outputs, int groups) {
    const int64_t of_cluster = 64 * groups * kMergedCluster;
    return (outputs + of_cluster - 1) / of_cluster * of_cluster;
}

template <typename T, int kTopK>
void start(const MergedProduct& product, void* stream) {
    // Blocks of 192 outputs read tokens less often; those of 128 are for outputs that they cover with less
    // waste.
    const int64_t outputs = product.gradient ? product.inputs : product.outputs;
    const bool wide = covered(outputs, 3) <= covered(outputs, 2);
    (wide ? start<T, 3, kTopK> : start<T, 2, kTopK>)(product, stream);
}

template <typename T>
void start(const MergedProduct& product, void* stream) {
    void (*const starts[])(const MergedProduct&, void*) = {start<T, 1>, start<T, 2>, start<T, 3>,
                                                           start<T, 4>};
    starts[product.top_k - 1](product, stream);
}

}  // namespace

bool merged_product_runs(const MergedProduct& product) {
    const int64_t most = int64_t{1} << 30;
    for (const int64_t size :
         {product.batch, product.tokens, product.inputs, product.outputs, product.num_experts}) {
        if (size < 1 || size > most) return false;
    }
    const int64_t tiles =
        (product.tokens + 255) / 256 * product.batch * (std::max(product.inputs, product.outputs) / 128 + 1);
    return product.top_k >= 1 && product.top_k <= 4 && product.inputs % 8 == 0 && product.outputs % 8 == 0 &&
           tiles <= most;
}

void merged_product_cuda(const MergedProduct& product, void* stream) {
    if (!merged_product_runs(product))
        throw std::invalid_argument("merged_product_cuda: sizes that no kernel takes");
    product.is_bfloat16 ? start<BFloat16>(product, stream) : start<Float16>(product, stream);
}

}  // namespace switch_moe
