// Chooses and starts the kernels of expert_linear_weight_hopper.h.
#include <algorithm>
#include <stdexcept>

#include "expert_linear_cuda.h"
#include "expert_linear_weight_hopper.h"

namespace switch_moe {
namespace {

using hopper::BFloat16;
using hopper::Float16;
using hopper::tensor_map;

constexpr int64_t kMostBytes = int64_t{256} << 20;  // of the sums of weights, where there is more than one part

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

int clusters_of_device() { return std::max(hopper::multiprocessors() / kMergedCluster, 1); }

// Into how many parts the samples are split, by sizes and the device alone. A part more fills the last round
// of tiles better, and costs two passes over its sums. Times are cycles of a multiprocessor, by the model of
// docs/hopper.md.
int splits_of(const WeightGradient& gradient, const GradientTiles& tiles) {
    const int64_t clusters = clusters_of_device();
    const int64_t bytes =
        int64_t{16} * kTileQuads * tiles.rows * tiles.columns * gradient.num_experts;  // of a part's sums
    auto cycles = [&](int64_t splits) {
        const int64_t rounds = blocks_of(tiles.count * splits, clusters);
        const int64_t of_sample = 640 * blocks_of(gradient.tokens, 64) + 512;
        return rounds * blocks_of(gradient.batch, splits) * of_sample + 2 * splits * bytes / 2900;
    };
    const int64_t most = std::min({gradient.batch, int64_t{64}, std::max(kMostBytes / bytes, int64_t{1})});
    int64_t best = 1;
    for (int64_t splits = 2; splits <= most; ++splits) {
        if (cycles(splits) < cycles(best)) best = splits;
    }
    return static_cast<int>(best);
}

WeightGradientSizes sizes_of(const WeightGradient& gradient) {
    GradientTiles tiles{static_cast<int>(blocks_of(gradient.inputs, kGradientTile)),
                        static_cast<int>(blocks_of(gradient.outputs, kGradientTile)), 0, 0};
    tiles.wide = tiles.columns / 2;
    tiles.count = tiles.rows * tiles.wide + tiles.columns % 2 * ((tiles.rows + 1) / 2);
    return {static_cast<int>(gradient.batch),
            static_cast<int>(gradient.tokens),
            static_cast<int>(gradient.inputs),
            static_cast<int>(gradient.outputs),
            static_cast<int>(gradient.num_experts),
            splits_of(gradient, tiles),
            tiles};
}

// Where the parts lie in the workspace, and how many bytes they take.
WeightGradientParts parts_of(const WeightGradient& gradient, const WeightGradientSizes& sizes,
                             int64_t* bytes) {
    const int64_t tiles = int64_t{sizes.tiles.rows} * sizes.tiles.columns;
    const int64_t quads = sizes.splits * tiles * sizes.experts * kTileQuads;
    const int64_t biases =
        gradient.bias ? int64_t{sizes.splits} * sizes.tiles.rows * sizes.experts * sizes.outputs : 0;
    *bytes = 16 * quads + 4 * (biases + tiles * sizes.batch * gradient.top_k);
    auto* weight = static_cast<Quad*>(gradient.workspace);
    auto* bias = reinterpret_cast<float*>(weight + quads);
    return {weight, gradient.bias ? bias : nullptr, bias + biases};
}

template <typename T, int kTopK>
void start(const WeightGradient& gradient, void* stream) {
    using Layout = WeightGradientLayout<kTopK>;
    const int64_t batch = gradient.batch, tokens = gradient.tokens, row = gradient.outputs * 2;
    auto tokens_of = [&](const void* address, int64_t width) {
        return tensor_map(address, {width, tokens, batch}, {width * 2, tokens * width * 2},
                          {64, Layout::kDeep, 1}, Swizzle::k128);
    };
    const WeightGradientMaps maps{
        tokens_of(gradient.x, gradient.inputs), tokens_of(gradient.grad, gradient.outputs),
        tensor_map(gradient.weight, {gradient.outputs, gradient.inputs, gradient.num_experts},
                   {row, gradient.inputs * row}, {64, kGradientTile, 1}, Swizzle::k128)};
    const WeightGradientSizes sizes = sizes_of(gradient);
    int64_t bytes;
    const WeightGradientParts parts = parts_of(gradient, sizes, &bytes);
    const Routing routing{gradient.order, gradient.index, gradient.gate, sizes.experts};
    const int clusters = std::min(sizes.tiles.count * sizes.splits, clusters_of_device());
    hopper::launch_kernel<WeightGradientMaps, Routing, const T*, WeightGradientSizes, WeightGradientParts>(
        weight_gradient<T, kTopK>,
        {clusters * kMergedCluster, kMergedCluster, Layout::kThreads, Layout::kBytes}, stream, maps, routing,
        static_cast<const T*>(gradient.bias), sizes, parts);
    const WeightGradientResults results{gradient.weight_grad, gradient.bias_grad, gradient.gate_grad,
                                        gradient.single};
    const GradientBlocks blocks{
        sizes.tiles.rows * sizes.tiles.columns * sizes.experts * 4,
        gradient.bias ? static_cast<int>(blocks_of(int64_t{sizes.experts} * sizes.outputs, 256)) : 0,
        static_cast<int>(blocks_of(batch * kTopK, 256))};
    hopper::launch_kernel<WeightGradientParts, WeightGradientResults, WeightGradientSizes, int, GradientBlocks>(
        add_gradient_parts<T>, {blocks.weight + blocks.bias + blocks.gate, 1, 256, 0}, stream, parts, results,
        sizes, kTopK, blocks);
}

}  // namespace

bool weight_gradient_runs(const WeightGradient& gradient) {
    const int64_t most = int64_t{1} << 30;
    for (const int64_t size : {gradient.batch, gradient.tokens, gradient.inputs, gradient.outputs}) {
        if (size < 1 || size > most) return false;
    }
    const int64_t tiles =
        blocks_of(gradient.inputs, kGradientTile) * blocks_of(gradient.outputs, kGradientTile);
    return gradient.top_k >= 1 && gradient.top_k <= 2 && gradient.num_experts >= 1 &&
           gradient.num_experts <= kMostGradientExperts && gradient.inputs % 8 == 0 &&
           gradient.outputs % 8 == 0 && gradient.batch <= most / gradient.top_k && tiles <= most / 4096;
}

int64_t weight_gradient_workspace(const WeightGradient& gradient) {
    if (!weight_gradient_runs(gradient))
        throw std::invalid_argument("weight_gradient_workspace: sizes that no kernel takes");
    int64_t bytes;
    parts_of(gradient, sizes_of(gradient), &bytes);
    return bytes;
}

void weight_gradient_cuda(const WeightGradient& gradient, void* stream) {
    if (!weight_gradient_runs(gradient))
        throw std::invalid_argument("weight_gradient_cuda: sizes that no kernel takes");
    auto starts = gradient.is_bfloat16 ? (gradient.top_k == 1 ? start<BFloat16, 1> : start<BFloat16, 2>)
                                       : (gradient.top_k == 1 ? start<Float16, 1> : start<Float16, 2>);
    starts(gradient, stream);
}

}  // namespace switch_moe
