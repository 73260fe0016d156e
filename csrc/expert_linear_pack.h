// Packing for the fused path, for one type of elements and one width of vectors. The drawing at the head of
// expert_linear_fused_kernel.h shows slivers and panels. What is packed are words of 32 bits: one float, or
// two bfloat16 that follow one another in a sum.
#pragma once

#include <type_traits>
#include <vector>

#include "expert_linear.h"
#include "vectors.h"

namespace switch_moe {

// The words from one sliver to the next. That is one cache line more than a sliver holds, because slivers at
// multiples of 4 KiB would fight for the same few lines of the first-level cache.
constexpr int64_t sliver_stride(int64_t depth, int64_t width) { return depth * width + 16; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The experts of one route and their gates. Each weight pointer starts at the element `corner` of its expert.
// There are kExperts experts, or, where that is 0, a number known only at run time.
template <typename Element, int kExperts>
struct Mixture {
    static constexpr bool kAny = kExperts == 0;

    int64_t stride;  // from a row of an expert to the next
    int64_t top_k;
    std::conditional_t<kAny, std::vector<const Element*>, const Element * [kAny ? 1 : kExperts]> weight;
    std::conditional_t<kAny, std::vector<float>, float[kAny ? 1 : kExperts]> gate;

    Mixture(const Experts& experts, const Routes& routes, int64_t route, int64_t corner)
        : stride(experts.outputs), top_k(routes.top_k) {
        if constexpr (kAny) {
            weight.resize(top_k);
            gate.resize(top_k);
        }
        for (int64_t e = 0; e < size(); ++e) {
            const int64_t choice = route * routes.top_k + e;
            weight[e] = static_cast<const Element*>(experts.weight) +
                        routes.index[choice] * experts.inputs * stride + corner;
            gate[e] = routes.gate[choice];
        }
    }

    SWITCH_MOE_INLINE int64_t size() const { return kAny ? top_k : kExperts; }

    float at(int64_t offset) const {
        float sum = 0;
        for (int64_t e = 0; e < size(); ++e) sum += gate[e] * to_float(weight[e][offset]);
        return sum;
    }
};

// A sliver of V_r or of grad is kWidth = 3 kVectorWidth words wide, a sliver of x as wide as a tile has rows.
template <typename Element, int kVectorWidth>
struct Packing {
    static constexpr bool kPairs = sizeof(Element) == 2;
    static constexpr int kPair = kPairs ? 2 : 1;
    static constexpr int kWidth = 3 * kVectorWidth;

    using Vector = Floats<kVectorWidth>;
    using Word = std::conditional_t<kPairs, uint32_t, float>;
    using WordVector = typename VectorOf<Word, kVectorWidth>::Vector;

    static int64_t words(int64_t elements) { return ceil_div(elements, kPair); }

    static Word word(float first, float second) {
        if constexpr (kPairs) {
            BFloat16 low, high;
            store(first, &low);
            store(second, &high);
            return low.bits | static_cast<uint32_t>(high.bits) << 16;
        } else {
            return first;
        }
    }

    static float value(const Element* x, int64_t offset) { return to_float(x[offset]); }
    template <int kExperts>
    static float value(const Mixture<Element, kExperts>& mix, int64_t offset) {
        return mix.at(offset);
    }

    // Writes `count` words, one element at a time, for the edges that no whole vector covers. Word i holds
    // the element at offset + i * step. The second element of a pair lies `next` after the first; where next
    // is 0, the sum has no such element and it is zero. The words from `valid` on are zero too.
    template <typename Source>
    static void edge(const Source& source, int64_t offset, int64_t step, int64_t next, int64_t valid,
                     int64_t count, Word* to) {
        for (int64_t i = 0; i < count; ++i, offset += step) {
            to[i] = word(i < valid ? value(source, offset) : 0,
                         kPairs && next > 0 && i < valid ? value(source, offset + next) : 0);
        }
    }

    // Merges a vector of elements.
    template <typename Mix>
    static SWITCH_MOE_INLINE void merge(const Mix& mix, int64_t offset, Vector& sum) {
        Vector part;
        load<kVectorWidth>(mix.weight[0] + offset, part);
        sum = mix.gate[0] * part;
        for (int64_t e = 1; e < mix.size(); ++e) {
            load<kVectorWidth>(mix.weight[e] + offset, part);
            sum += mix.gate[e] * part;
        }
    }

    // Merges a vector of words down the rows: a pair holds an element and the one below it.
    template <typename Mix>
    static SWITCH_MOE_INLINE void merge_down(const Mix& mix, int64_t offset, WordVector& to) {
        if constexpr (kPairs) {
            Vector first, second;
            merge(mix, offset, first);
            merge(mix, offset + mix.stride, second);
            join(first, second, to);
        } else {
            merge(mix, offset, to);
        }
    }

    // Merges a vector of words along a row: a pair holds an element and the one after it.
    template <typename Mix>
    static SWITCH_MOE_INLINE void merge_along(const Mix& mix, int64_t offset, WordVector& to) {
        if constexpr (kPairs) {
            Vector first{}, second{};
            for (int64_t e = 0; e < mix.size(); ++e) {
                const WordVector both =
                    *reinterpret_cast<const typename VectorOf<Word, kVectorWidth>::Loose*>(mix.weight[e] +
                                                                                           offset);
                first += mix.gate[e] * reinterpret_cast<Vector>(both << 16);
                second += mix.gate[e] * reinterpret_cast<Vector>(both & 0xffff0000u);
            }
            join(first, second, to);
        } else {
            merge(mix, offset, to);
        }
    }

    // Packs [depth, columns] of the merged weight: panel[sliver][k][kWidth] = V[k][...]. It goes row by row;
    // going sliver by sliver took 1.5 times as long.
    template <typename Mix>
    static SWITCH_MOE_INLINE void pack_merged(const Mix& mix, int64_t depth, int64_t columns, Word* panel) {
        const int64_t words = Packing::words(depth);
        for (int64_t k = 0; k < words; ++k) {
            const int64_t row = k * kPair * mix.stride;
            const bool whole = (k + 1) * kPair <= depth;
            Word* to = panel + k * kWidth;
            for (int64_t j = 0; j < columns; j += kWidth, to += sliver_stride(words, kWidth)) {
                SWITCH_MOE_UNROLL
                for (int v = 0; v < 3; ++v) {
                    const int64_t column = j + v * kVectorWidth;
                    if (whole && column + kVectorWidth <= columns) {
                        WordVector sum;
                        merge_down(mix, row + column, sum);
                        reinterpret_cast<WordVector*>(to)[v] = sum;
                    } else {
                        edge(mix, row + column, 1, whole ? mix.stride : 0, columns - column, kVectorWidth,
                             to + v * kVectorWidth);
                    }
                }
            }
        }
    }

    // Packs the transpose of the merged weight: panel[sliver][k][kWidth] = V[...][k].
    template <typename Mix>
    static SWITCH_MOE_INLINE void pack_merged_transposed(const Mix& mix, int64_t depth, int64_t columns,
                                                         Word* panel) {
        const int64_t words = Packing::words(depth);
        for (int64_t j = 0; j < ceil_div(columns, kWidth) * kWidth; j += kVectorWidth) {
            Word* to = panel + j / kWidth * sliver_stride(words, kWidth) + j % kWidth;
            int64_t k = 0;
            for (; j + kVectorWidth <= columns && (k + kVectorWidth) * kPair <= depth; k += kVectorWidth) {
                WordVector rows[kVectorWidth];
                SWITCH_MOE_UNROLL
                for (int i = 0; i < kVectorWidth; ++i)
                    merge_along(mix, (j + i) * mix.stride + k * kPair, rows[i]);
                transpose(rows);
                SWITCH_MOE_UNROLL
                for (int i = 0; i < kVectorWidth; ++i) {
                    *reinterpret_cast<WordVector*>(to + (k + i) * kWidth) = rows[i];
                }
            }
            for (; k < words; ++k) {
                edge(mix, j * mix.stride + k * kPair, mix.stride, (k + 1) * kPair <= depth, columns - j,
                     kVectorWidth, to + k * kWidth);
            }
        }
    }

    // Packs rows of x into one sliver: packed[k][i] = x[i][k] for i < kTileRows, zero where i >= rows.
    template <int kTileRows>
    static SWITCH_MOE_INLINE void pack_rows(const Element* x, int64_t stride, int64_t rows, int64_t depth,
                                            Word* packed) {
        using Part = VectorOf<Word, kTileRows>;
        int64_t k = 0;
        for (; rows >= kTileRows && (k + kTileRows) * kPair <= depth; k += kTileRows) {
            typename Part::Vector block[kTileRows];
            SWITCH_MOE_UNROLL
            for (int i = 0; i < kTileRows; ++i) {
                block[i] = *reinterpret_cast<const typename Part::Loose*>(x + i * stride + k * kPair);
            }
            transpose(block);
            SWITCH_MOE_UNROLL
            for (int i = 0; i < kTileRows; ++i) {
                *reinterpret_cast<typename Part::Vector*>(packed + (k + i) * kTileRows) = block[i];
            }
        }
        for (; k * kPair < depth; ++k) {
            edge(x, k * kPair, stride, (k + 1) * kPair <= depth, rows, kTileRows, packed + k * kTileRows);
        }
    }

    // Packs `columns` columns of x, or of grad: packed[sliver][k][kSliver] = x[k][...].
    template <int kSliver>
    static SWITCH_MOE_INLINE void pack_columns(const Element* x, int64_t stride, int64_t depth,
                                               int64_t columns, Word* packed) {
        constexpr int kPart = kSliver < kVectorWidth ? kSliver : kVectorWidth;
        using Part = VectorOf<Word, kPart>;
        const int64_t words = Packing::words(depth);
        for (int64_t k = 0; k < words; ++k, x += kPair * stride, packed += kSliver) {
            const bool whole = (k + 1) * kPair <= depth;
            Word* to = packed;
            for (int64_t j = 0; j < columns; j += kSliver, to += sliver_stride(words, kSliver)) {
                SWITCH_MOE_UNROLL
                for (int i = 0; i < kSliver; i += kPart) {
                    const Element* at = x + j + i;
                    if (!whole || j + i + kPart > columns) {
                        edge(at, 0, 1, whole ? stride : 0, columns - j - i, kPart, to + i);
                        continue;
                    }
                    typename Part::Vector row;
                    if constexpr (kPairs) {
                        typename Part::Vector next;
                        load_words<kPart>(at, row);
                        load_words<kPart>(at + stride, next);
                        row |= next << 16;
                    } else {
                        row = *reinterpret_cast<const typename Part::Loose*>(at);
                    }
                    *reinterpret_cast<typename Part::Vector*>(to + i) = row;
                }
            }
        }
    }
};

}  // namespace switch_moe
