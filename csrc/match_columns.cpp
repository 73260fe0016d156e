#include "match_columns.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu.h"
#include "linear_assignment.h"

namespace switch_moe {
namespace {

constexpr int64_t kVectorWidth = 16;  // columns that a vector holds

// Looks at kCount rows of some columns, and sets the bits first, first + 1, ... in packed[j] where column j
// is not zero in them; others[j] becomes nonzero where it holds another number than 0 and 1.
template <int kCount>
inline __attribute__((always_inline)) void pack_vector(const float* row, int64_t num_columns, int first,
                                                       int64_t width, uint32_t* packed, float* others) {
    for (int64_t j = 0; j < width; ++j) {
        uint32_t bits = 0;
        float other = 0;
        for (int i = 0; i < kCount; ++i) {
            const float value = row[i * num_columns + j];
            bits |= uint32_t{value != 0} << i;
            other += std::fabs(value * value - value);  // zero for 0 and 1 only; NaN stays
        }
        packed[j] |= bits << first;
        others[j] += other;
    }
}

// Does the same for all columns, a vector at a time. The last vector overlaps the one before it, which
// changes nothing.
template <int kCount>
inline __attribute__((always_inline)) void pack_rows(const float* row, int64_t num_columns, int first,
                                                     uint32_t* packed, float* others) {
    if (num_columns < kVectorWidth) {
        return pack_vector<kCount>(row, num_columns, first, num_columns, packed, others);
    }
    for (int64_t j = 0; j < num_columns; j += kVectorWidth) {
        const int64_t at = std::min(j, num_columns - kVectorWidth);
        pack_vector<kCount>(row + at, num_columns, first, kVectorWidth, packed + at, others + at);
    }
}

// Packs column order[j] of `table` into bits[j], which has `words` words of 64 rows each and is zero before.
// Rows are packed 32 at a time into `packed`, a word of 32 bits for each column: it is as wide as a float of
// the table. `others`, likewise, tells the columns that hold other numbers than 0 and 1.
SWITCH_MOE_VECTORISED
void pack_columns(const float* table, int64_t timesteps, int64_t num_columns, const int64_t* order,
                  int64_t words, uint32_t* packed, float* others, uint64_t* bits) {
    for (int64_t first = 0; first < timesteps; first += 32) {
        std::fill(packed, packed + num_columns, 0);
        const int count = static_cast<int>(std::min<int64_t>(32, timesteps - first));
        int i = 0;
        for (; i + 4 <= count; i += 4) {
            pack_rows<4>(table + (first + i) * num_columns, num_columns, i, packed, others);
        }
        for (; i < count; ++i) {
            pack_rows<1>(table + (first + i) * num_columns, num_columns, i, packed, others);
        }
        for (int64_t j = 0; j < num_columns; ++j) {
            bits[j * words + first / 64] |= uint64_t{packed[order[j]]} << first % 64;
        }
    }
}

SWITCH_MOE_VECTORISED
void count_differences(const uint64_t* a, const uint64_t* b, int64_t num_columns, int64_t words,
                       int64_t* cost) {
    for (int64_t i = 0; i < num_columns; ++i) {
        for (int64_t j = 0; j < num_columns; ++j) {
            int64_t differences = 0;
            for (int64_t word = 0; word < words; ++word) {
                differences += __builtin_popcountll(a[i * words + word] ^ b[j * words + word]);
            }
            cost[i * num_columns + j] = differences;
        }
    }
}

bool is_permutation(const int64_t* order, int64_t num_columns) {
    std::vector<char> seen(num_columns);
    return std::all_of(order, order + num_columns,
                       [&](int64_t j) { return j >= 0 && j < num_columns && !std::exchange(seen[j], 1); });
}

}  // namespace

bool match_columns(int64_t timesteps, int64_t num_columns, const float* selected, const float* table,
                   const int64_t* rows, const int64_t* columns, int64_t* prices, int64_t* match) {
    if (!is_permutation(rows, num_columns) || !is_permutation(columns, num_columns)) return false;
    const int64_t words = (timesteps + 63) / 64;
    std::vector<uint64_t> bits(2 * words * num_columns);
    std::vector<uint32_t> packed(num_columns);
    std::vector<float> others(num_columns);
    std::vector<int64_t> cost(num_columns * num_columns), assigned(num_columns), permuted;
    uint64_t *first = bits.data(), *second = first + words * num_columns;
    pack_columns(selected, timesteps, num_columns, rows, words, packed.data(), others.data(), first);
    pack_columns(table, timesteps, num_columns, columns, words, packed.data(), others.data(), second);
    if (std::any_of(others.begin(), others.end(), [](float other) { return other != 0; })) return false;
    count_differences(first, second, num_columns, words, cost.data());
    for (int64_t b = 0; prices != nullptr && b < num_columns; ++b) permuted.push_back(prices[columns[b]]);
    // This always succeeds: costs of at most `timesteps` are neither infinite nor too large.
    linear_assignment(cost.data(), num_columns, prices == nullptr ? nullptr : permuted.data(),
                      assigned.data());
    for (int64_t a = 0; a < num_columns; ++a) match[rows[a]] = columns[assigned[a]];
    for (int64_t b = 0; prices != nullptr && b < num_columns; ++b) prices[columns[b]] = permuted[b];
    return true;
}

}  // namespace switch_moe
