// Chooses and starts the kernels of expert_linear_weight_hopper.h and expert_linear_weight_sum.h.
#include <algorithm>
#include <stdexcept>

#include "expert_linear_cuda.h"
#include "expert_linear_weight_hopper.h"
#include "expert_linear_weight_sum.h"

namespace switch_moe {
namespace {

using hopper::BFloat16;
using hopper::Float16;
using hopper::tensor_map;

// The sums of weights take at most so many bytes, where there is more than one part.
constexpr int64_t kMostBytes = int64_t{256} << 20;

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

int clusters_of_device() { return std::max(hopper::multiprocessors() / kMergedCluster, 1); }

// Into how many parts the samples are split, by sizes and the device alone. A part more fills the last round
// of tiles better, and costs two passes over its sums. Times are cycles of a multiprocessor, by the model of
// docs/hopper.md.
int splits_of(const WeightGradientProblem& problem, const GradientTiles& tiles) {
    const int64_t clusters = clusters_of_device();
    const int64_t bytes =
        int64_t{16} * kTileQuads * tiles.rows * tiles.columns * problem.num_experts;  // of a part's sums
    auto cycles = [&](int64_t splits) {
        const int64_t rounds = blocks_of(tiles.count * splits, clusters);
        const int64_t of_sample = 640 * blocks_of(problem.tokens, 64) + 512;
        return rounds * blocks_of(problem.batch, splits) * of_sample + 2 * splits * bytes / 2900;
    };
    const int64_t most = std::min({problem.batch, int64_t{64}, std::max(kMostBytes / bytes, int64_t{1})});
    int64_t best = 1;
    for (int64_t splits = 2; splits <= most; ++splits) {
        if (cycles(splits) < cycles(best)) best = splits;
    }
    return static_cast<int>(best);
}

WeightGradientSizes sizes_of(const WeightGradientProblem& problem) {
    GradientTiles tiles{static_cast<int>(blocks_of(problem.inputs, kGradientTile)),
                        static_cast<int>(blocks_of(problem.outputs, kGradientTile)), 0, 0};
    tiles.wide = tiles.columns / 2;
    tiles.count = tiles.rows * tiles.wide + tiles.columns % 2 * ((tiles.rows + 1) / 2);
    return {static_cast<int>(problem.batch),
            static_cast<int>(problem.tokens),
            static_cast<int>(problem.inputs),
            static_cast<int>(problem.outputs),
            static_cast<int>(problem.num_experts),
            splits_of(problem, tiles),
            tiles};
}

// Where the parts lie in a workspace, and how many bytes they take.
WeightGradientParts parts_of(const WeightGradientProblem& problem, const WeightGradientSizes& sizes,
                             void* workspace, int64_t* bytes) {
    const int64_t tiles = int64_t{sizes.tiles.rows} * sizes.tiles.columns;
    const int64_t quads = sizes.splits * tiles * sizes.experts * kTileQuads;
    const int64_t biases =
        problem.has_bias ? int64_t{sizes.splits} * sizes.tiles.rows * sizes.experts * sizes.outputs : 0;
    *bytes = 16 * quads + 4 * (biases + tiles * sizes.batch * problem.top_k);
    auto* weight = static_cast<Quad*>(workspace);
    auto* bias = reinterpret_cast<float*>(weight + quads);
    return {weight, problem.has_bias ? bias : nullptr, bias + biases};
}

template <typename T, int kTopK>
void start(const WeightGradient& gradient, void* stream) {
    using Layout = WeightGradientLayout<kTopK>;
    const WeightGradientProblem& problem = gradient.problem;
    const int64_t batch = problem.batch, tokens = problem.tokens, row = problem.outputs * 2;
    auto tokens_of = [&](const void* address, int64_t width) {
        return tensor_map(address, {width, tokens, batch}, {width * 2, tokens * width * 2},
                          {64, Layout::kDeep, 1}, Swizzle::k128);
    };
    const WeightGradientMaps maps{
        tokens_of(gradient.x, problem.inputs), tokens_of(gradient.grad, problem.outputs),
        tensor_map(gradient.weight, {problem.outputs, problem.inputs, problem.num_experts},
                   {row, problem.inputs * row}, {64, kGradientTile, 1}, Swizzle::k128)};
    const WeightGradientSizes sizes = sizes_of(problem);
    int64_t bytes;
    const WeightGradientParts parts = parts_of(problem, sizes, gradient.workspace, &bytes);
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
        problem.has_bias ? static_cast<int>(blocks_of(int64_t{sizes.experts} * sizes.outputs, 256)) : 0,
        static_cast<int>(blocks_of(batch * kTopK, 256))};
    hopper::launch_kernel<WeightGradientParts, WeightGradientResults, WeightGradientSizes, int,
                          GradientBlocks>(add_gradient_parts<T>,
                                          {blocks.weight + blocks.bias + blocks.gate, 1, 256, 0}, stream,
                                          parts, results, sizes, kTopK, blocks);
}

void check(const WeightGradientProblem& problem) {
    const int64_t most = int64_t{1} << 30;
    const auto [batch, tokens, inputs, outputs, num_experts, top_k, has_bias] = problem;
    bool fits = top_k >= 1 && top_k <= kMaxGradientTopK && num_experts >= 1 &&
                num_experts <= kMaxGradientExperts && inputs % 8 == 0 && outputs % 8 == 0;
    for (const int64_t size : {batch, tokens, inputs, outputs}) fits = fits && size >= 1 && size <= most;
    // Units of work, and blocks of the second kernel.
    fits = fits && blocks_of(inputs, kGradientTile) * blocks_of(outputs, kGradientTile) <= most / 4096 &&
           batch <= most / kMaxGradientTopK;
    if (!fits) throw std::invalid_argument("weight_gradient: sizes that no kernel takes");
}

}  // namespace

int64_t weight_gradient_workspace(const WeightGradientProblem& problem) {
    check(problem);
    int64_t bytes;
    parts_of(problem, sizes_of(problem), nullptr, &bytes);
    return bytes;
}

void weight_gradient_cuda(const WeightGradient& gradient, void* stream) {
    check(gradient.problem);
    const int64_t top_k = gradient.problem.top_k;
    auto starts = gradient.is_bfloat16 ? (top_k == 1 ? start<BFloat16, 1> : start<BFloat16, 2>)
                                       : (top_k == 1 ? start<Float16, 1> : start<Float16, 2>);
    starts(gradient, stream);
}

}  // namespace switch_moe
