#include "merged_product.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace switch_moe {
namespace {

// As in K. Goto, R. A. van de Geijn, "Anatomy of high-performance matrix multiplication", ACM TOMS 34, 2008,
// but for what packing does: it merges experts. A packed panel, kSlivers slivers of kDepth rows, stays in the
// second-level cache (590 KB with AVX-512), a packed sliver of x in the first (12 KB). A sum of more than
// kDepth terms is continued from memory.
constexpr int64_t kDepth = 384;
constexpr int64_t kSlivers = 8;
constexpr int64_t kMostRows = 512;  // of x that share one packing of a panel
constexpr int64_t kGradRows = 128;  // of an expert's gradient that a block has

// Floats from one sliver to the next. A line more than they hold: at multiples of 4 KiB the slivers would
// fight for the same few lines of the first-level cache.
constexpr int64_t sliver_stride(int64_t depth, int64_t width) { return depth * width + 16; }

std::atomic<int64_t> flops{0};

void count_product(int64_t rows, int64_t columns, int64_t depth) {
    flops.fetch_add(2 * rows * columns * depth, std::memory_order_relaxed);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 64-byte aligned room that a thread keeps.
float* scratch(int64_t size) {
    static thread_local std::vector<float> kept;
    if (static_cast<int64_t>(kept.size()) < size + 16) kept.resize(size + 16);
    const auto address = reinterpret_cast<uintptr_t>(kept.data());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

// Up to four experts of a route.
struct Mixture {
    static constexpr int kMost = 4;

    int64_t stride;  // of a row
    const float* weight[kMost];
    float gate[kMost];

    template <int kExperts>
    float at(int64_t offset) const {
        float sum = 0;
        for (int e = 0; e < kExperts; ++e) sum += gate[e] * weight[e][offset];
        return sum;
    }
};

// What a task computes: a part of the rows of a route, or of an expert's gradient.
struct Block {
    int64_t route, row, rows, column, columns;
};

struct Product {
    const float* x;
    const Experts& experts;
    const Gates& gates;
    const float* bias;
    bool transposed;
    float* out;
    int64_t depth, width;  // of the sums; of out
};

// Where the packed x and grad of a sample lie: chunk after chunk of its tokens, each the slivers of both.
struct PackedSample {
    int64_t tokens, x_size, grad_size;

    PackedSample(int64_t tokens, const Experts& experts, int64_t rows, int64_t width) : tokens(tokens) {
        const int64_t depth = std::min(kDepth, tokens);
        x_size = ceil_div(ceil_div(experts.inputs, rows) * sliver_stride(depth, rows), 16) * 16;
        grad_size = ceil_div(experts.outputs, width) * sliver_stride(depth, width);
    }
    int64_t chunks() const { return ceil_div(tokens, kDepth); }
    int64_t depth(int64_t chunk) const { return std::min(kDepth, tokens - chunk * kDepth); }
    int64_t size() const { return chunks() * (x_size + grad_size); }
    int64_t x_at(int64_t chunk) const { return chunk * (x_size + grad_size); }
    int64_t grad_at(int64_t chunk) const { return x_at(chunk) + x_size; }
};

struct Gradient {
    const float *x, *grad;
    const PackedSample& packed;
    float* workspace;  // of the samples [begin, end)
    int64_t begin, end;
    const Experts& experts;
    const Gates& gates;
    const char* fresh;  // [B, k] whether the slot is the first with its expert
    const char* used;   // [M] whether any slot has the expert
    int64_t granules;   // down
    float* grad_weight;
    float* partial;  // [granules across, granules down, B * k]
};

// kLanes floats a vector, three of them a row of a tile, kRows rows.
template <int kLanes, int kRows>
struct Kernel {
    static constexpr int kWidth = 3 * kLanes;
    using Vector = typename Floats<kLanes>::Vector;
    using Loose = typename Floats<kLanes>::Loose;

    // tile[i] += sum_k a[k][i] b[k]: a [depth, rows], b [depth, kWidth], both packed.
    template <int kTileRows>
    static SWITCH_MOE_INLINE void multiply(const float* a, const float* b, int64_t depth,
                                           Vector (&tile)[kTileRows][3]) {
        for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += kWidth) {
            const Vector* columns = reinterpret_cast<const Vector*>(b);
            const Vector b0 = columns[0], b1 = columns[1], b2 = columns[2];
            SWITCH_MOE_UNROLL
            for (int i = 0; i < kTileRows; ++i) {
                const Vector row = a[i] - Vector{};
                tile[i][0] += row * b0;
                tile[i][1] += row * b1;
                tile[i][2] += row * b2;
            }
        }
    }

    template <int kExperts>
    static SWITCH_MOE_INLINE void merge(const Mixture& mix, int64_t offset, Vector& sum) {
        sum = mix.gate[0] * *reinterpret_cast<const Loose*>(mix.weight[0] + offset);
        SWITCH_MOE_UNROLL
        for (int e = 1; e < kExperts; ++e) {
            sum += mix.gate[e] * *reinterpret_cast<const Loose*>(mix.weight[e] + offset);
        }
    }

    // panel[sliver][k][kWidth] = V[k][...], [depth, columns] of it, or added to it. A row at a time: by
    // sliver it took 1.5 times as long.
    template <int kExperts>
    static SWITCH_MOE_INLINE void pack_merged(const Mixture& mix, int64_t depth, int64_t columns, bool add,
                                              float* panel) {
        for (int64_t k = 0; k < depth; ++k) {
            const int64_t row = k * mix.stride;
            int64_t j = 0;
            float* to = panel + k * kWidth;
            for (; j + kWidth <= columns; j += kWidth, to += sliver_stride(depth, kWidth)) {
                SWITCH_MOE_UNROLL
                for (int v = 0; v < 3; ++v) {
                    Vector sum;
                    merge<kExperts>(mix, row + j + v * kLanes, sum);
                    Vector* place = reinterpret_cast<Vector*>(to + v * kLanes);
                    if (add) sum += *place;
                    *place = sum;
                }
            }
            for (int64_t i = 0; j < columns && i < kWidth; ++i) {
                const float sum = j + i < columns ? mix.at<kExperts>(row + j + i) : 0;
                to[i] = add ? to[i] + sum : sum;
            }
        }
    }

    // panel[sliver][k][kWidth] = V[...][k], or added to it.
    template <int kExperts>
    static SWITCH_MOE_INLINE void pack_merged_transposed(const Mixture& mix, int64_t depth, int64_t columns,
                                                         bool add, float* panel) {
        for (int64_t j = 0; j < ceil_div(columns, kWidth) * kWidth; j += kLanes) {
            float* to = panel + j / kWidth * sliver_stride(depth, kWidth) + j % kWidth;
            int64_t k = 0;
            for (; j + kLanes <= columns && k + kLanes <= depth; k += kLanes) {
                Vector rows[kLanes];
                SWITCH_MOE_UNROLL
                for (int i = 0; i < kLanes; ++i) merge<kExperts>(mix, (j + i) * mix.stride + k, rows[i]);
                transpose<kLanes>(rows);
                SWITCH_MOE_UNROLL
                for (int i = 0; i < kLanes; ++i) {
                    Vector* place = reinterpret_cast<Vector*>(to + (k + i) * kWidth);
                    if (add) rows[i] += *place;
                    *place = rows[i];
                }
            }
            for (; k < depth; ++k) {
                for (int64_t i = 0; i < kLanes; ++i) {
                    const float sum = j + i < columns ? mix.at<kExperts>((j + i) * mix.stride + k) : 0;
                    to[k * kWidth + i] = add ? to[k * kWidth + i] + sum : sum;
                }
            }
        }
    }

    template <int kExperts>
    static SWITCH_MOE_INLINE void pack_experts(bool transposed, const Mixture& mix, int64_t depth,
                                               int64_t columns, bool add, float* panel) {
        if (transposed) {
            pack_merged_transposed<kExperts>(mix, depth, columns, add, panel);
        } else {
            pack_merged<kExperts>(mix, depth, columns, add, panel);
        }
    }

    // The rows from `first` on of the panel that `block` needs.
    static SWITCH_MOE_INLINE void pack_panel(const Product& p, const Block& block, int64_t first,
                                             int64_t depth, float* panel) {
        const int64_t stride = p.experts.outputs, elements = p.experts.inputs * stride;
        const int64_t corner = p.transposed ? block.column * stride + first : first * stride + block.column;
        for (int64_t e = 0; e < p.gates.top_k; e += Mixture::kMost) {
            Mixture mix{stride, {}, {}};
            const int64_t count = std::min<int64_t>(Mixture::kMost, p.gates.top_k - e);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t slot = block.route * p.gates.top_k + e + i;
                mix.weight[i] = p.experts.weight + p.gates.index[slot] * elements + corner;
                mix.gate[i] = p.gates.gate[slot];
            }
            if (count == 1) pack_experts<1>(p.transposed, mix, depth, block.columns, e > 0, panel);
            if (count == 2) pack_experts<2>(p.transposed, mix, depth, block.columns, e > 0, panel);
            if (count == 3) pack_experts<3>(p.transposed, mix, depth, block.columns, e > 0, panel);
            if (count == 4) pack_experts<4>(p.transposed, mix, depth, block.columns, e > 0, panel);
        }
    }

    // packed[k][kTileRows] = x[i][k], zero where i >= rows.
    template <int kTileRows>
    static SWITCH_MOE_INLINE void pack_rows(const float* x, int64_t stride, int64_t rows, int64_t depth,
                                            float* packed) {
        int64_t k = 0;
        if (rows >= kTileRows) {
            for (; k + kTileRows <= depth; k += kTileRows) {
                typename Floats<kTileRows>::Vector block[kTileRows];
                SWITCH_MOE_UNROLL
                for (int i = 0; i < kTileRows; ++i) {
                    block[i] =
                        *reinterpret_cast<const typename Floats<kTileRows>::Loose*>(x + i * stride + k);
                }
                transpose<kTileRows>(block);
                SWITCH_MOE_UNROLL
                for (int i = 0; i < kTileRows; ++i) {
                    *reinterpret_cast<typename Floats<kTileRows>::Vector*>(packed + (k + i) * kTileRows) =
                        block[i];
                }
            }
        }
        for (; k < depth; ++k) {
            for (int64_t i = 0; i < kTileRows; ++i) {
                packed[k * kTileRows + i] = i < rows ? x[i * stride + k] : 0;
            }
        }
    }

    // packed[sliver][k][kSliver] = x[k][...] for `columns` columns.
    template <int kSliver>
    static SWITCH_MOE_INLINE void pack_columns(const float* x, int64_t stride, int64_t depth, int64_t columns,
                                               float* packed) {
        constexpr int kPart = kSliver < kLanes ? kSliver : kLanes;
        for (int64_t k = 0; k < depth; ++k, x += stride, packed += kSliver) {
            float* to = packed;
            int64_t j = 0;
            for (; j + kSliver <= columns; j += kSliver, to += sliver_stride(depth, kSliver)) {
                SWITCH_MOE_UNROLL
                for (int i = 0; i < kSliver; i += kPart) {
                    *reinterpret_cast<typename Floats<kPart>::Vector*>(to + i) =
                        *reinterpret_cast<const typename Floats<kPart>::Loose*>(x + j + i);
                }
            }
            for (int64_t i = 0; j < columns && i < kSliver; ++i) to[i] = j + i < columns ? x[j + i] : 0;
        }
    }

    // A tile of out, [rows, columns] of it valid: sums from `add` (out itself), or from `bias`, or from zero.
    template <int kTileRows>
    static SWITCH_MOE_INLINE void product_tile(const float* a, const float* b, int64_t depth, int64_t rows,
                                               int64_t columns, const float* bias, bool add, int64_t stride,
                                               float* out) {
        Vector tile[kTileRows][3] = {};
        multiply<kTileRows>(a, b, depth, tile);
        if (rows >= kTileRows && columns >= kWidth) {
            SWITCH_MOE_UNROLL
            for (int i = 0; i < kTileRows; ++i) {
                SWITCH_MOE_UNROLL
                for (int v = 0; v < 3; ++v) {
                    Loose* to = reinterpret_cast<Loose*>(out + i * stride + v * kLanes);
                    Vector sum = tile[i][v];
                    if (add)
                        sum += *to;
                    else if (bias != nullptr)
                        sum += *reinterpret_cast<const Loose*>(bias + v * kLanes);
                    *to = sum;
                }
            }
            return;
        }
        float values[kTileRows][kWidth];
        std::memcpy(values, tile, sizeof tile);
        for (int64_t i = 0; i < std::min<int64_t>(rows, kTileRows); ++i) {
            for (int64_t j = 0; j < std::min<int64_t>(columns, kWidth); ++j) {
                float& to = out[i * stride + j];
                to = values[i][j] + (add ? to : bias != nullptr ? bias[j] : 0);
            }
        }
    }

    template <int kTileRows>
    static SWITCH_MOE_INLINE void product_rows(const Product& p, const float* x, int64_t rows,
                                               const float* panel, int64_t depth, int64_t columns,
                                               const float* bias, bool add, float* packed, float* out) {
        pack_rows<kTileRows>(x, p.depth, rows, depth, packed);
        for (int64_t j = 0; j < columns; j += kWidth) {
            product_tile<kTileRows>(packed, panel + j / kWidth * sliver_stride(depth, kWidth), depth, rows,
                                    columns - j, bias == nullptr ? nullptr : bias + j, add, p.width, out + j);
        }
    }

    static SWITCH_MOE_INLINE void product_block(const Product& p, const Block& block) {
        float* panel = scratch(kSlivers * sliver_stride(kDepth, kWidth) + kDepth * kRows);
        float* packed = panel + kSlivers * sliver_stride(kDepth, kWidth);
        const float* bias = p.bias == nullptr ? nullptr : p.bias + block.route * p.width + block.column;
        for (int64_t first = 0; first < p.depth; first += kDepth) {
            const int64_t depth = std::min(kDepth, p.depth - first);
            pack_panel(p, block, first, depth, panel);
            count_product(block.rows, block.columns, depth);
            for (int64_t i = 0; i < block.rows;) {
                const int64_t row = block.row + i, left = block.rows - i;
                const float* x = p.x + row * p.depth + first;
                float* out = p.out + row * p.width + block.column;
                if (2 * left > kRows) {
                    product_rows<kRows>(p, x, left, panel, depth, block.columns, bias, first > 0, packed,
                                        out);
                    i += kRows;
                } else {
                    product_rows<kRows / 2>(p, x, left, panel, depth, block.columns, bias, first > 0, packed,
                                            out);
                    i += kRows / 2;
                }
            }
        }
    }

    // grad_weight = or += gate * tile and dot += tile * weight, `rows` x `columns` of them.
    template <bool kAdd>
    static SWITCH_MOE_INLINE void gradient_tile(const Vector (&tile)[kRows][3], const float* weight,
                                                float gate, int64_t rows, int64_t columns, int64_t stride,
                                                float* grad_weight, Vector& dot) {
        if (rows >= kRows && columns >= kWidth) {
            Vector dots[3] = {};
            SWITCH_MOE_UNROLL
            for (int i = 0; i < kRows; ++i, weight += stride, grad_weight += stride) {
                SWITCH_MOE_UNROLL
                for (int v = 0; v < 3; ++v) {
                    dots[v] += tile[i][v] * *reinterpret_cast<const Loose*>(weight + v * kLanes);
                    Loose* to = reinterpret_cast<Loose*>(grad_weight + v * kLanes);
                    Vector sum = gate * tile[i][v];
                    if (kAdd) sum += *to;
                    *to = sum;
                }
            }
            dot += dots[0] + dots[1] + dots[2];
            return;
        }
        float values[kRows][kWidth];
        std::memcpy(values, tile, sizeof tile);
        for (int64_t i = 0; i < std::min<int64_t>(rows, kRows); ++i) {
            for (int64_t j = 0; j < std::min<int64_t>(columns, kWidth); ++j) {
                float& to = grad_weight[i * stride + j];
                dot[j % kLanes] += values[i][j] * weight[i * stride + j];
                to = gate * values[i][j] + (kAdd ? to : 0);
            }
        }
    }

    // Packs the rows or the columns, whichever `block` has, of sample `block.route`.
    static SWITCH_MOE_INLINE void pack_block(const Gradient& g, const Block& block) {
        const int64_t inputs = g.experts.inputs, outputs = g.experts.outputs;
        float* sample = g.workspace + (block.route - g.begin) * g.packed.size();
        for (int64_t chunk = 0; chunk < g.packed.chunks(); ++chunk) {
            const int64_t token = block.route * g.packed.tokens + chunk * kDepth,
                          depth = g.packed.depth(chunk);
            if (block.rows > 0) {
                pack_columns<kRows>(
                    g.x + token * inputs + block.row, inputs, depth, block.rows,
                    sample + g.packed.x_at(chunk) + block.row / kRows * sliver_stride(depth, kRows));
            } else {
                pack_columns<kWidth>(
                    g.grad + token * outputs + block.column, outputs, depth, block.columns,
                    sample + g.packed.grad_at(chunk) + block.column / kWidth * sliver_stride(depth, kWidth));
            }
        }
    }

    // What a chunk of sample b adds to a tile of the gradients; `dots` has an entry for each of its experts.
    static SWITCH_MOE_INLINE void gradient_tiles(const Gradient& g, int64_t b, bool first, const float* x,
                                                 const float* grad, int64_t depth, int64_t row,
                                                 int64_t column, Vector* dots) {
        Vector tile[kRows][3] = {};
        multiply<kRows>(x, grad, depth, tile);
        const int64_t inputs = g.experts.inputs, outputs = g.experts.outputs;
        for (int64_t j = 0; j < g.gates.top_k; ++j) {
            const int64_t slot = b * g.gates.top_k + j;
            const int64_t at = g.gates.index[slot] * inputs * outputs + row * outputs + column;
            const float* weight = g.experts.weight + at;
            float* grad_weight = g.grad_weight + at;
            const float gate = g.gates.gate[slot];
            if (first && g.fresh[slot]) {
                gradient_tile<false>(tile, weight, gate, inputs - row, outputs - column, outputs, grad_weight,
                                     dots[j]);
            } else {
                gradient_tile<true>(tile, weight, gate, inputs - row, outputs - column, outputs, grad_weight,
                                    dots[j]);
            }
        }
    }

    static SWITCH_MOE_INLINE void gradient_block(const Gradient& g, const Block& block) {
        const int64_t inputs = g.experts.inputs, outputs = g.experts.outputs, top_k = g.gates.top_k;
        Vector* dots = reinterpret_cast<Vector*>(scratch(kSlivers * top_k * kLanes));  // [slivers, k]
        for (int64_t e = 0; e < g.experts.count; ++e) {
            for (int64_t i = 0; g.begin == 0 && !g.used[e] && i < block.rows; ++i) {
                float* row = g.grad_weight + (e * inputs + block.row + i) * outputs + block.column;
                std::fill(row, row + block.columns, 0.0f);
            }
        }
        for (int64_t b = g.begin; b < g.end; ++b) {
            const float* sample = g.workspace + (b - g.begin) * g.packed.size();
            std::fill(dots, dots + kSlivers * top_k, Vector{});
            for (int64_t chunk = 0; chunk < g.packed.chunks(); ++chunk) {
                const int64_t depth = g.packed.depth(chunk);
                const float* x = sample + g.packed.x_at(chunk);
                const float* grad = sample + g.packed.grad_at(chunk);
                count_product(block.rows, block.columns, depth);
                for (int64_t row = block.row; row < block.row + block.rows; row += kRows) {
                    for (int64_t j = 0; j < block.columns; j += kWidth) {
                        const int64_t column = block.column + j;
                        gradient_tiles(g, b, chunk == 0, x + row / kRows * sliver_stride(depth, kRows),
                                       grad + column / kWidth * sliver_stride(depth, kWidth), depth, row,
                                       column, dots + j / kWidth * top_k);
                    }
                }
            }
            for (int64_t j = 0; j < block.columns; j += kWidth) {
                const int64_t granule = (block.column + j) / kWidth * g.granules + block.row / kGradRows;
                float* to = g.partial + (granule * g.gates.routes + b) * top_k;
                for (int64_t slot = 0; slot < top_k; ++slot) {
                    for (int i = 0; i < kLanes; ++i) to[slot] += dots[j / kWidth * top_k + slot][i];
                }
            }
        }
    }
};

struct Kernels {
    int64_t rows, width;  // of a tile
    void (*product)(const Product&, const Block&);
    void (*pack)(const Gradient&, const Block&);
    void (*gradient)(const Gradient&, const Block&);
};

#ifdef __x86_64__
#define SWITCH_MOE_KERNELS(name, features, lanes, rows)                                             \
    __attribute__((target(features))) void product_##name(const Product& p, const Block& block) {   \
        Kernel<lanes, rows>::product_block(p, block);                                               \
    }                                                                                               \
    __attribute__((target(features))) void pack_##name(const Gradient& g, const Block& block) {     \
        Kernel<lanes, rows>::pack_block(g, block);                                                  \
    }                                                                                               \
    __attribute__((target(features))) void gradient_##name(const Gradient& g, const Block& block) { \
        Kernel<lanes, rows>::gradient_block(g, block);                                              \
    }                                                                                               \
    constexpr Kernels name{rows, Kernel<lanes, rows>::kWidth, product_##name, pack_##name, gradient_##name};
SWITCH_MOE_KERNELS(avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", 16, 8)
SWITCH_MOE_KERNELS(avx2, "avx2,fma", 8, 4)
#undef SWITCH_MOE_KERNELS

const Kernels* kernels(int lanes) { return lanes == 16 ? &avx512 : lanes == 8 ? &avx2 : nullptr; }
#else
const Kernels* kernels(int) { return nullptr; }
#endif

// Columns of a block: up to kSlivers tiles, fewer where that keeps all threads busy.
int64_t block_columns(int64_t width, int64_t tile, int64_t others, int threads) {
    int64_t tiles = kSlivers;
    while (tiles > 1 && ceil_div(width, tiles * tile) * others < 2 * threads) tiles /= 2;
    return tiles * tile;
}

}  // namespace

bool merged_product_takes(int lanes) { return kernels(lanes) != nullptr; }

int64_t merged_product_flops() { return flops.load(); }

void merged_product(const float* x, const Experts& experts, const Gates& gates, const int64_t* starts,
                    const float* bias, bool transposed, int lanes, int threads, float* out) {
    const Kernels& use = *kernels(lanes);
    Product p{x, experts, gates, bias, transposed, out, experts.inputs, experts.outputs};
    if (transposed) std::swap(p.depth, p.width);
    std::vector<Block> blocks;
    const int64_t bands = ceil_div(starts[gates.routes], kMostRows);
    const int64_t step = block_columns(p.width, use.width, std::max(gates.routes, bands), threads);
    for (int64_t column = 0; column < p.width; column += step) {
        const int64_t columns = std::min(step, p.width - column);
        for (int64_t r = 0; r < gates.routes; ++r) {
            for (int64_t row = starts[r]; row < starts[r + 1]; row += kMostRows) {
                blocks.push_back({r, row, std::min(kMostRows, starts[r + 1] - row), column, columns});
            }
        }
    }
    parallel_for(blocks.size(), threads, [&](int64_t i) { use.product(p, blocks[i]); });
}

int64_t merged_product_workspace(int64_t tokens, const Experts& experts, int lanes) {
    return PackedSample(tokens, experts, kernels(lanes)->rows, kernels(lanes)->width).size();
}

void merged_product_backward(const float* x, const float* grad, int64_t tokens, const Experts& experts,
                             const Gates& gates, int lanes, int threads, int64_t samples, float* workspace,
                             float* grad_weight, float* grad_gate) {
    const Kernels& use = *kernels(lanes);
    const int64_t slots = gates.routes * gates.top_k;
    std::vector<char> fresh(slots), used(experts.count);
    for (int64_t slot = 0; slot < slots; ++slot) {
        fresh[slot] = !used[gates.index[slot]];
        used[gates.index[slot]] = 1;
    }
    const int64_t down = ceil_div(experts.inputs, kGradRows), across = ceil_div(experts.outputs, use.width);
    std::vector<float> partial(down * across * slots);
    const PackedSample packed(tokens, experts, use.rows, use.width);
    const int64_t step = block_columns(experts.outputs, use.width, down, threads);
    for (int64_t begin = 0; begin < gates.routes; begin += samples) {
        const int64_t end = std::min(begin + samples, gates.routes);
        const Gradient g{x,     grad,         packed,      workspace, begin,       end,           experts,
                         gates, fresh.data(), used.data(), down,      grad_weight, partial.data()};
        std::vector<Block> packs, blocks;
        for (int64_t row = 0; row < experts.inputs; row += kGradRows) {
            const int64_t rows = std::min(kGradRows, experts.inputs - row);
            for (int64_t b = begin; b < end; ++b) packs.push_back({b, row, rows, 0, 0});
        }
        for (int64_t column = 0; column < experts.outputs; column += step) {
            const int64_t columns = std::min(step, experts.outputs - column);
            for (int64_t b = begin; b < end; ++b) packs.push_back({b, 0, 0, column, columns});
            for (int64_t row = 0; row < experts.inputs; row += kGradRows) {
                blocks.push_back({0, row, std::min(kGradRows, experts.inputs - row), column, columns});
            }
        }
        parallel_for(packs.size(), threads, [&](int64_t i) { use.pack(g, packs[i]); });
        parallel_for(blocks.size(), threads, [&](int64_t i) { use.gradient(g, blocks[i]); });
    }
    std::vector<double> total(slots);
    for (int64_t granule = 0; granule < down * across; ++granule) {
        for (int64_t slot = 0; slot < slots; ++slot) total[slot] += partial[granule * slots + slot];
    }
    std::copy(total.begin(), total.end(), grad_gate);
}

}  // namespace switch_moe
