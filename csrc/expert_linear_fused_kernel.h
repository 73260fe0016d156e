// The blocks of the fused products, for a type of elements and a set of vector instructions.
//
// A thread computes one block of out at a time. Packing is where the experts merge:
//
//      W_1   W_2                      slivers, kWidth columns each
//      +---+ +---+   g_1 W_1 + g_2 W_2   +---+---+---+
//      |   | |   |  ------------------>  |   |   |   |  packed panel of V_r   (second-level cache)
//      +---+ +---+                       +---+---+---+
//                                          v
//      x  [rows, Din]  --pack-->  kRows x depth words  (first-level cache)
//                                          v
//                              tile [kRows, kWidth] of out, in registers
//
// A word is 32 bits: a float, or two bfloat16 that follow one another in a sum. The structure is that of K.
// Goto and R. A. van de Geijn, "Anatomy of high-performance matrix multiplication", ACM TOMS 34, 2008.
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

// A panel has up to kSlivers slivers of kPanel / kSlivers rows of words, or fewer slivers of more rows, so
// that it stays in the second-level cache (590 KB with AVX-512). A packed sliver of x stays in the first (12
// KB of float32, up to 24 KB of bfloat16).
constexpr int64_t kSlivers = 8;
constexpr int64_t kPanel = kSlivers * 384;
constexpr int64_t kMostRows = 512;   // so many rows of x share one packing of a panel
constexpr int64_t kPackRows = 128;   // a block packs so many rows of x^T
constexpr int64_t kGradWords = 384;  // so many words of tokens are summed at a time

// Returns 64-byte aligned room, which the thread keeps.
inline char* scratch(int64_t bytes) {
    static thread_local std::vector<char> kept;
    if (static_cast<int64_t>(kept.size()) < bytes + 64) kept.resize(bytes + 64);
    const auto address = reinterpret_cast<uintptr_t>(kept.data());
    return reinterpret_cast<char*>((address + 63) / 64 * 64);
}

// What a task computes: a part of the rows of a route, or of an expert's gradient.
// `route` names a sample in the gradients, where each sample is a route of its own.
struct Block {
    int64_t route, row, rows, column, columns;
};

struct Product {
    const void* x;
    const Experts& experts;
    const Routes& routes;
    const void* bias;
    bool transposed;
    void* out;
    int64_t depth, width;  // terms of a sum; columns of out
};

// What is fixed for a type of elements and a set of instructions.
struct Shape {
    int64_t rows, width;  // size of a tile
    int64_t pair;         // elements of a word
    int64_t depth;        // most words of a sum at a time

    int64_t words(int64_t elements) const { return ceil_div(elements, pair); }
    int64_t slivers(int64_t elements) const {
        return std::min(kSlivers, kPanel / std::min(depth, words(elements)));
    }
};

// Where the packed x and grad of a sample lie: chunk after chunk of its tokens, each the slivers of both.
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

struct Gradient {
    const void *x, *grad;
    const PackedSample& packed;
    void* workspace;  // holds the samples [begin, end)
    int64_t begin, end;
    const Experts& experts;
    const Routes& routes;
    const char* fresh;       // [B, k] whether the choice is the first with its expert
    const char* used;        // [M] whether any choice has the expert
    int64_t rows, granules;  // rows of an expert's gradient in a block; blocks down the gradient
    float* carry;  // [M, Din, Dout] of bfloat16 experts from round to round; null where there is one
    void* grad_weight;
    float* partial;  // [granules across, granules down, B * k]
};

#ifdef SWITCH_MOE_AVX512_BF16
// Kernel::multiply for pairs of bfloat16. It is not inlined, because there GCC 12 kept the tile in memory, at
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

// kVectorWidth floats a vector, three of them a row of a tile, kRows rows.
template <typename Element, int kVectorWidth, int kRows>
struct Kernel : Packing<Element, kVectorWidth> {
    using Pack = Packing<Element, kVectorWidth>;
    using Pack::kPair;
    using Pack::kPairs;
    using Pack::kWidth;
    using typename Pack::Vector;
    using typename Pack::Word;

    static constexpr Shape kShape{kRows, kWidth, kPair, kPairs ? 768 : 384};

    // tile[i] = sum_k a[k][i] b[k]: a [depth, rows], b [depth, kWidth], both packed.
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

    // The rows from `first` on of the panel that `block` needs.
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

    // Calls visit.vector(part, i, j, v) for the full vectors of a tile's valid [rows, columns], v one of
    // three, and visit.element(value, i, j) for what is left.
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

    // A sum of more terms than a panel has rows goes on from memory.
    struct Sums {
        float* at;
        int64_t stride;
        bool first, last;
    };

    // Stores a tile of out, or of the sums where they are to be continued.
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

    // Packs the rows or the columns, whichever `block` has, of sample `block.route`.
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

    // sums = or += gate * tile and dots += tile * weight.
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

    // The sums of the experts' gradients, in float32: grad_weight itself where it is that.
    struct Totals {
        float* at;  // address of the block's first element
        int64_t expert, stride;
    };

    // What a chunk of sample b adds to a tile, `row` and `column` from the block's corner; `dots` has an
    // entry for each of its experts.
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

    // Writes what the tiles did not: zeros for experts that nobody chose and, in the last round of bfloat16,
    // the rounded sums of all other experts.
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

    static SWITCH_MOE_INLINE void gradient_block(const Gradient& g, const Block& block) {
        const int64_t inputs = g.experts.inputs, outputs = g.experts.outputs, top_k = g.routes.top_k;
        const int64_t dots_size = kSlivers * top_k * kVectorWidth,
                      corner = block.row * outputs + block.column;
        Totals totals{nullptr, inputs * outputs, outputs};
        const bool apart = kPairs && g.carry == nullptr;
        if (apart) totals.stride = block.columns, totals.expert = block.rows * block.columns;
        // dots [slivers, k]
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
            for (int64_t j = 0; j < block.columns; j += kWidth) {
                const int64_t granule = (block.column + j) / kWidth * g.granules + block.row / g.rows;
                float* to = g.partial + (granule * g.routes.num_routes + b) * top_k;
                for (int64_t choice = 0; choice < top_k; ++choice) {
                    for (int i = 0; i < kVectorWidth; ++i) to[choice] += dots[j / kWidth * top_k + choice][i];
                }
            }
        }
        finish(g, block, totals);
    }
};

}  // namespace switch_moe
