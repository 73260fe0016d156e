// The kernels of the fused path (expert_linear.h) for one type of elements and one set of vector
// instructions.
//
// The product is cut as in K. Goto, R. A. van de Geijn, "Anatomy of high-performance matrix multiplication",
// ACM TOMS 34, 2008, with one difference: packing the right operand merges the experts of the route.
//
//      experts in memory           panel in the L2 cache              out
//      W_a  [Din, Dout]         sliver  sliver  sliver
//      +-----+--------+        +-------+-------+-------+      +-------+-------+-------+
//      |     |########|  g_a   |       |       |       |      |       |       |       |
//      |     |########| -----+ |   k   |       |       |      +-------+-------+-------+
//      +-----+--------+      | |   |   |       |       |      |       | tile  |       | kRows
//      W_b                   +>|   v   |       |       |      +-------+-------+-------+
//      +-----+--------+      | |       |       |       |      |       |       |       |
//      |     |########| -----+ +-------+-------+-------+      +-------+-------+-------+
//      |     |########|  g_b     kWidth                         kWidth
//      +-----+--------+                                             ^
//             merging happens here, while packing                   |
//      x: kRows rows, packed as one sliver in the L1 cache ---------+  tile = x's sliver * panel's sliver
//
// A tile is the part of a result that is summed in registers: kRows rows of kWidth = 3 vectors. A sliver
// holds what a tile reads of one operand, in the order in which the tile reads it. A panel is the slivers of
// V_r that lie side by side, and it is used for up to kMostRows rows of x before the next one is packed. A
// word is 32 bits of an operand: one float, or two bfloat16 that follow one another in the sum. A sliver of x
// takes 12 KB, for bfloat16 up to 24 KB.
//
// In the backward pass x^T and grad of some samples are packed first, into the workspace. Then every tile of
// P_b = x_b^T grad_b is summed in registers, and from there it is added to the gradients of the experts of
// sample b.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "expert_linear.h"
#include "expert_linear_pack.h"
#include "vectors.h"

#ifdef SWITCH_MOE_AVX512_BF16
#include <immintrin.h>
#endif

namespace switch_moe {

// The most slivers of a panel.
constexpr int64_t kSlivers = 8;
// The most rows of all slivers of a panel together: 8 slivers of 384 rows of words, or 4 of 768. With AVX-512
// they take 590 KB.
constexpr int64_t kPanel = kSlivers * 384;
// The most rows of x that share one packing of a panel.
constexpr int64_t kMostRows = 512;
// The backward pass packs x^T in pieces of this many rows.
constexpr int64_t kPackRows = 128;
// The backward pass sums this many words of tokens at a time. They are a chunk.
constexpr int64_t kGradWords = 384;

// Returns 64-byte aligned room that the thread keeps for its next call.
inline char* scratch(int64_t bytes) {
    static thread_local std::vector<char> kept;
    if (static_cast<int64_t>(kept.size()) < bytes + 64) kept.resize(bytes + 64);
    const auto address = reinterpret_cast<uintptr_t>(kept.data());
    return reinterpret_cast<char*>((address + 63) / 64 * 64);
}

// The part of a result that one task computes: of the rows of a route, or of the gradient of every expert. In
// the backward pass every sample is a route of its own.
struct Block {
    int64_t route, row, rows, column, columns;
};

// The arguments of a fused product (see expert_linear.h).
struct Product {
    const void* x;
    const Experts& experts;
    const Routes& routes;
    const void* bias;
    bool transposed;
    void* out;
    int64_t depth, width;  // terms of a sum, columns of out
};

// What is fixed for the kernels of one type and one set of instructions.
struct Shape {
    int64_t rows, width;  // of a tile
    int64_t pair;         // elements in a word
    int64_t depth;        // the most words that a sliver has along the sum

    int64_t words(int64_t elements) const { return ceil_div(elements, pair); }
    int64_t slivers(int64_t elements) const {
        return std::min(kSlivers, kPanel / std::min(depth, words(elements)));
    }
};

// Where the packed x and grad of a sample lie. Its tokens are cut into chunks; a chunk has the slivers of x
// and then those of grad.
struct PackedSample {
    int64_t tokens, chunk_tokens, x_size, grad_size;

    PackedSample(int64_t tokens, const Experts& experts, const Shape& shape)
        : tokens(tokens), chunk_tokens(kGradWords * shape.pair) {
        const int64_t depth = shape.words(depth_of(0));
        x_size = ceil_div(ceil_div(experts.inputs, shape.rows) * sliver_stride(depth, shape.rows), 16) * 16;
        grad_size = ceil_div(experts.outputs, shape.width) * sliver_stride(depth, shape.width);
    }
    int64_t chunks() const { return ceil_div(tokens, chunk_tokens); }
    int64_t depth_of(int64_t chunk) const { return std::min(chunk_tokens, tokens - chunk * chunk_tokens); }
    int64_t size() const { return chunks() * (x_size + grad_size); }
    int64_t x_at(int64_t chunk) const { return chunk * (x_size + grad_size); }
    int64_t grad_at(int64_t chunk) const { return x_at(chunk) + x_size; }
};

// The arguments of a round of the backward pass, which covers the samples [begin, end).
struct Gradient {
    const void *x, *grad;
    const PackedSample& packed;
    void* workspace;  // the packed samples [begin, end)
    int64_t begin, end;
    const Experts& experts;
    const Routes& routes;
    const char* fresh;       // [B, k] whether the choice is the first with its expert
    const char* used;        // [M] whether any choice has the expert
    int64_t rows, granules;  // rows of a gradient that a block has; number of blocks that cover all rows
    float* carry;  // [M, Din, Dout] sums of bfloat16 experts between rounds; null where there is one round
    void* grad_weight;
    float* partial;  // [slivers across, granules down, B * k] parts of the gates' gradients
};

#ifdef SWITCH_MOE_AVX512_BF16
// Kernel::multiply for pairs of bfloat16. It is not inlined, because GCC 12 then kept the tile in memory, at
// half the speed.
template <int kTileRows>
__attribute__((target("avx512f,avx512bf16"), noinline)) void multiply_pairs(const uint32_t* a,
                                                                            const uint32_t* b, int64_t depth,
                                                                            float* out) {
    __m512 tile[kTileRows][3] = {};
    for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += 48) {
        __m512i columns[3];
        for (int v = 0; v < 3; ++v) columns[v] = _mm512_load_si512(b + 16 * v);
        SWITCH_MOE_UNROLL
        for (int i = 0; i < kTileRows; ++i) {
            const __m512i row = _mm512_set1_epi32(a[i]);
            for (int v = 0; v < 3; ++v) {
                tile[i][v] = _mm512_dpbf16_ps(tile[i][v], (__m512bh)row, (__m512bh)columns[v]);
            }
        }
    }
    for (int i = 0; i < kTileRows; ++i) {
        for (int v = 0; v < 3; ++v) _mm512_storeu_ps(out + 48 * i + 16 * v, tile[i][v]);
    }
}
#else
template <int kTileRows>
void multiply_pairs(const uint32_t* a, const uint32_t* b, int64_t depth, float* out);
#endif

// The kernels with vectors of kVectorWidth floats and tiles of kRows rows of three vectors.
template <typename Element, int kVectorWidth, int kRows>
struct Kernel : Packing<Element, kVectorWidth> {
    using Pack = Packing<Element, kVectorWidth>;
    using Pack::kPair;
    using Pack::kPairs;
    using Pack::kWidth;
    using typename Pack::Vector;
    using typename Pack::Word;

    static constexpr Shape kShape{kRows, kWidth, kPair, kPairs ? 768 : 384};

    // Computes tile[i] = sum_k a[k][i] b[k] from packed slivers a [depth, kTileRows] and b [depth, kWidth].
    template <int kTileRows>
    static SWITCH_MOE_INLINE void multiply(const Word* a, const Word* b, int64_t depth,
                                           Vector (&tile)[kTileRows][3]) {
        if constexpr (kPairs) {
            multiply_pairs<kTileRows>(a, b, depth, reinterpret_cast<float*>(tile));
        } else {
            SWITCH_MOE_UNROLL
            for (int i = 0; i < kTileRows; ++i) {
                SWITCH_MOE_UNROLL
                for (int v = 0; v < 3; ++v) tile[i][v] = Vector{};
            }
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
    }

    // Packs the panel that `block` needs for the `depth` terms of the sum from `first` on. This merges
    // experts.
    template <int kExperts>
    static SWITCH_MOE_INLINE void pack_experts(const Product& p, const Block& block, int64_t first,
                                               int64_t depth, Word* panel) {
        const int64_t stride = p.experts.outputs;
        const int64_t corner = p.transposed ? block.column * stride + first : first * stride + block.column;
        const Mixture<Element, kExperts> mix(p.experts, p.routes, block.route, corner);
        if (p.transposed) {
            Pack::pack_merged_transposed(mix, depth, block.columns, panel);
        } else {
            Pack::pack_merged(mix, depth, block.columns, panel);
        }
    }

    static SWITCH_MOE_INLINE void pack_panel(const Product& p, const Block& block, int64_t first,
                                             int64_t depth, Word* panel) {
        if (p.routes.top_k == 1) return pack_experts<1>(p, block, first, depth, panel);
        if (p.routes.top_k == 2) return pack_experts<2>(p, block, first, depth, panel);
        if (p.routes.top_k == 3) return pack_experts<3>(p, block, first, depth, panel);
        if (p.routes.top_k == 4) return pack_experts<4>(p, block, first, depth, panel);
        pack_experts<0>(p, block, first, depth, panel);
    }

    // Calls visit.vector(part, i, j, v) for the whole vectors of the tile's first [rows, columns], where v <
    // 3 numbers the vectors of a row, and visit.element(value, i, j) for the elements that are left.
    template <int kTileRows, typename Visit>
    static SWITCH_MOE_INLINE void visit_tile(const Vector (&tile)[kTileRows][3], int64_t rows,
                                             int64_t columns, Visit& visit) {
        if (rows >= kTileRows && (columns >= kWidth || columns % kVectorWidth == 0)) {
            SWITCH_MOE_UNROLL
            for (int i = 0; i < kTileRows; ++i) {
                SWITCH_MOE_UNROLL
                for (int v = 0; v < 3; ++v) {
                    if (v * kVectorWidth >= columns) break;
                    visit.vector(tile[i][v], i, v * kVectorWidth, v);
                }
            }
            return;
        }
        float values[kTileRows][kWidth];
        std::memcpy(values, tile, sizeof tile);
        for (int64_t i = 0; i < std::min<int64_t>(rows, kTileRows); ++i) {
            const int64_t end = std::min<int64_t>(columns, kWidth);
            int64_t j = 0;
            for (; j + kVectorWidth <= end; j += kVectorWidth) {
                Vector part;
                load<kVectorWidth>(values[i] + j, part);
                visit.vector(part, i, j, 0);
            }
            for (; j < end; ++j) visit.element(values[i][j], i, j);
        }
    }

    // A sum with more terms than a panel has rows waits in memory while the next panel is packed.
    struct Sums {
        float* at;
        int64_t stride;
        bool first, last;
    };

    // Stores a tile in out, or in the sums where more terms follow.
    struct Store {
        const Element* bias;
        const Sums& sums;
        int64_t stride;
        Element* out;

        SWITCH_MOE_INLINE void vector(const Vector& part, int64_t i, int64_t j, int) const {
            float* continued = sums.at + i * sums.stride + j;
            Vector sum = part, other;
            if (!sums.first) {
                load<kVectorWidth>(continued, other);
                sum += other;
            }
            if (!sums.last) return save<kVectorWidth>(sum, continued);
            if (bias != nullptr) {
                load<kVectorWidth>(bias + j, other);
                sum += other;
            }
            save<kVectorWidth>(sum, out + i * stride + j);
        }
        SWITCH_MOE_INLINE void element(float value, int64_t i, int64_t j) const {
            float& continued = sums.at[i * sums.stride + j];
            const float sum = value + (sums.first ? 0 : continued);
            if (sums.last) {
                store(sum + (bias != nullptr ? to_float(bias[j]) : 0), out + i * stride + j);
            } else {
                continued = sum;
            }
        }
    };

    // Computes the tiles of kTileRows rows with all slivers of a panel.
    template <int kTileRows>
    static SWITCH_MOE_INLINE void product_rows(const Product& p, const Element* x, int64_t rows,
                                               const Word* panel, int64_t depth, int64_t columns,
                                               const Element* bias, Sums sums, Word* packed, Element* out) {
        Pack::template pack_rows<kTileRows>(x, p.depth, rows, depth, packed);
        const int64_t words = Pack::words(depth);
        for (int64_t j = 0; j < columns; j += kWidth) {
            Vector tile[kTileRows][3];
            multiply<kTileRows>(packed, panel + j / kWidth * sliver_stride(words, kWidth), words, tile);
            const Store visit{bias == nullptr ? nullptr : bias + j, sums, p.width, out + j};
            visit_tile(tile, rows, columns - j, visit);
            sums.at += kWidth;
        }
    }

    // Computes a block of out, panel after panel.
    static SWITCH_MOE_INLINE void product_block(const Product& p, const Block& block) {
        const int64_t most = kShape.depth * kPair, columns = ceil_div(block.columns, kWidth) * kWidth;
        const int64_t panel_size =
            columns / kWidth * sliver_stride(Pack::words(std::min(most, p.depth)), kWidth);
        const int64_t sums_size = kPairs && p.depth > most ? block.rows * columns : 0;
        Word* panel = reinterpret_cast<Word*>(scratch(4 * (panel_size + kShape.depth * kRows + sums_size)));
        Word* packed = panel + panel_size;
        float* sums = reinterpret_cast<float*>(packed + kShape.depth * kRows);
        const Element* bias =
            p.bias == nullptr ? nullptr
                              : static_cast<const Element*>(p.bias) + block.route * p.width + block.column;
        for (int64_t first = 0; first < p.depth; first += most) {
            const int64_t depth = std::min(most, p.depth - first);
            pack_panel(p, block, first, depth, panel);
            for (int64_t i = 0; i < block.rows;) {
                const int64_t row = block.row + i, left = block.rows - i;
                const Element* x = static_cast<const Element*>(p.x) + row * p.depth + first;
                Element* out = static_cast<Element*>(p.out) + row * p.width + block.column;
                Sums part{sums + i * columns, columns, first == 0, first + depth == p.depth};
                if constexpr (!kPairs) part.at = out, part.stride = p.width;
                if (2 * left > kRows) {
                    product_rows<kRows>(p, x, left, panel, depth, block.columns, bias, part, packed, out);
                    i += kRows;
                } else {
                    product_rows<kRows / 2>(p, x, left, panel, depth, block.columns, bias, part, packed, out);
                    i += kRows / 2;
                }
            }
        }
    }

    // Packs a part of sample `block.route`: columns of x if `block` has rows, else columns of grad.
    static SWITCH_MOE_INLINE void pack_block(const Gradient& g, const Block& block) {
        const int64_t inputs = g.experts.inputs, outputs = g.experts.outputs;
        Word* sample = static_cast<Word*>(g.workspace) + (block.route - g.begin) * g.packed.size();
        for (int64_t chunk = 0; chunk < g.packed.chunks(); ++chunk) {
            const int64_t token = block.route * g.packed.tokens + chunk * g.packed.chunk_tokens,
                          depth = g.packed.depth_of(chunk), words = Pack::words(depth);
            if (block.rows > 0) {
                Pack::template pack_columns<kRows>(
                    static_cast<const Element*>(g.x) + token * inputs + block.row, inputs, depth, block.rows,
                    sample + g.packed.x_at(chunk) + block.row / kRows * sliver_stride(words, kRows));
            } else {
                Pack::template pack_columns<kWidth>(
                    static_cast<const Element*>(g.grad) + token * outputs + block.column, outputs, depth,
                    block.columns,
                    sample + g.packed.grad_at(chunk) + block.column / kWidth * sliver_stride(words, kWidth));
            }
        }
    }

    // Stores gate * tile in the sums, or adds it to them where kAdd, and adds tile * weight to the dots.
    template <bool kAdd>
    struct Add {
        const Element* weight;
        int64_t stride;
        float gate;
        float* sums;
        int64_t sums_stride;
        Vector dots[3];

        SWITCH_MOE_INLINE void vector(const Vector& part, int64_t i, int64_t j, int v) {
            float* to = sums + i * sums_stride + j;
            Vector other, sum = gate * part;
            load<kVectorWidth>(weight + i * stride + j, other);
            dots[v] += part * other;
            if (kAdd) {
                load<kVectorWidth>(to, other);
                sum += other;
            }
            save<kVectorWidth>(sum, to);
        }
        SWITCH_MOE_INLINE void element(float value, int64_t i, int64_t j) {
            float& to = sums[i * sums_stride + j];
            dots[0][j % kVectorWidth] += value * to_float(weight[i * stride + j]);
            to = gate * value + (kAdd ? to : 0);
        }
    };

    template <bool kAdd>
    static SWITCH_MOE_INLINE void gradient_tile(const Vector (&tile)[kRows][3], const Element* weight,
                                                int64_t stride, float gate, int64_t rows, int64_t columns,
                                                float* sums, int64_t sums_stride, Vector& dot) {
        Add<kAdd> visit{weight, stride, gate, sums, sums_stride, {}};
        visit_tile(tile, rows, columns, visit);
        dot += visit.dots[0] + visit.dots[1] + visit.dots[2];
    }

    // Where the experts' gradients are summed in float32. For float32 experts that is grad_weight itself.
    struct Totals {
        float* at;               // the sum of the block's first element
        int64_t expert, stride;  // from an expert to the next, from a row to the next
    };

    // Adds what a chunk of sample b contributes to the tile at [row, column] of the block, for each expert of
    // the sample. `dots` has an entry for each of them.
    static SWITCH_MOE_INLINE void gradient_tiles(const Gradient& g, const Block& block, const Totals& totals,
                                                 int64_t b, bool first, const Word* x, const Word* grad,
                                                 int64_t words, int64_t row, int64_t column, Vector* dots) {
        Vector tile[kRows][3];
        multiply<kRows>(x, grad, words, tile);
        const int64_t inputs = g.experts.inputs, outputs = g.experts.outputs;
        const int64_t corner = (block.row + row) * outputs + block.column + column;
        for (int64_t j = 0; j < g.routes.top_k; ++j) {
            const int64_t choice = b * g.routes.top_k + j, expert = g.routes.index[choice];
            const Element* weight =
                static_cast<const Element*>(g.experts.weight) + expert * inputs * outputs + corner;
            float* sums = totals.at + expert * totals.expert + row * totals.stride + column;
            const float gate = g.routes.gate[choice];
            if (first && g.fresh[choice]) {
                gradient_tile<false>(tile, weight, outputs, gate, block.rows - row, block.columns - column,
                                     sums, totals.stride, dots[j]);
            } else {
                gradient_tile<true>(tile, weight, outputs, gate, block.rows - row, block.columns - column,
                                    sums, totals.stride, dots[j]);
            }
        }
    }

    // Runs after the last round. It clears the gradients of the experts that no route chose, and rounds those
    // of bfloat16 experts to grad_weight.
    static SWITCH_MOE_INLINE void finish(const Gradient& g, const Block& block, const Totals& totals) {
        const int64_t inputs = g.experts.inputs, outputs = g.experts.outputs;
        if (g.end < g.routes.num_routes) return;
        for (int64_t e = 0; e < g.experts.num_experts; ++e) {
            if (!kPairs && g.used[e]) continue;
            for (int64_t i = 0; i < block.rows; ++i) {
                Element* to = static_cast<Element*>(g.grad_weight) + (e * inputs + block.row + i) * outputs +
                              block.column;
                if (!g.used[e]) {
                    std::fill(to, to + block.columns, Element{});
                    continue;
                }
                const float* sums = totals.at + e * totals.expert + i * totals.stride;
                int64_t j = 0;
                for (; j + kVectorWidth <= block.columns; j += kVectorWidth) {
                    Vector sum;
                    load<kVectorWidth>(sums + j, sum);
                    save<kVectorWidth>(sum, to + j);
                }
                for (; j < block.columns; ++j) store(sums[j], to + j);
            }
        }
    }

    // Adds what the samples of a round contribute to a block of every expert's gradient, and to the gates'.
    static SWITCH_MOE_INLINE void gradient_block(const Gradient& g, const Block& block) {
        const int64_t inputs = g.experts.inputs, outputs = g.experts.outputs, top_k = g.routes.top_k;
        const int64_t dots_size = kSlivers * top_k * kVectorWidth,
                      corner = block.row * outputs + block.column;
        Totals totals{nullptr, inputs * outputs, outputs};
        const bool apart = kPairs && g.carry == nullptr;
        if (apart) totals.stride = block.columns, totals.expert = block.rows * block.columns;
        // The dots are [slivers, k].
        Vector* dots = reinterpret_cast<Vector*>(
            scratch(4 * (dots_size + (apart ? g.experts.num_experts * totals.expert : 0))));
        if (apart) {
            totals.at = reinterpret_cast<float*>(dots) + dots_size;
        } else {
            totals.at = (kPairs ? g.carry : static_cast<float*>(g.grad_weight)) + corner;
        }
        for (int64_t b = g.begin; b < g.end; ++b) {
            const Word* sample = static_cast<const Word*>(g.workspace) + (b - g.begin) * g.packed.size();
            std::fill(dots, dots + kSlivers * top_k, Vector{});
            for (int64_t chunk = 0; chunk < g.packed.chunks(); ++chunk) {
                const int64_t words = Pack::words(g.packed.depth_of(chunk));
                const Word* x =
                    sample + g.packed.x_at(chunk) + block.row / kRows * sliver_stride(words, kRows);
                const Word* grad =
                    sample + g.packed.grad_at(chunk) + block.column / kWidth * sliver_stride(words, kWidth);
                for (int64_t row = 0; row < block.rows; row += kRows) {
                    for (int64_t j = 0; j < block.columns; j += kWidth) {
                        gradient_tiles(g, block, totals, b, chunk == 0,
                                       x + row / kRows * sliver_stride(words, kRows),
                                       grad + j / kWidth * sliver_stride(words, kWidth), words, row, j,
                                       dots + j / kWidth * top_k);
                    }
                }
            }
            for (int64_t column = 0; column < block.columns; column += kWidth) {
                const int64_t granule = (block.column + column) / kWidth * g.granules + block.row / g.rows;
                float* to = g.partial + (granule * g.routes.num_routes + b) * top_k;
                for (int64_t j = 0; j < top_k; ++j) {
                    for (int i = 0; i < kVectorWidth; ++i) to[j] += dots[column / kWidth * top_k + j][i];
                }
            }
        }
        finish(g, block, totals);
    }
};

}  // namespace switch_moe
