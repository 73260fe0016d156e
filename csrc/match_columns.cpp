#include "match_columns.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu.h"
#include "linear_assignment.h"

namespace switch_moe {
namespace {

constexpr int64_t kLanes = 16;  // columns of a vector

// Ors bits first, first + 1, ... of each lane with whether its column is not zero in kCount rows.
template <int kCount>
inline __attribute__((always_inline)) void pack_lanes(const float* row, int64_t slots, int first,
                                                      int64_t count, uint32_t* lanes) {
    for (int64_t j = 0; j < count; ++j) {
        uint32_t bits = 0;
        for (int i = 0; i < kCount; ++i) bits |= uint32_t{row[i * slots + j] != 0} << i;
        lanes[j] |= bits << first;
    }
}

// Whole vectors; the last overlaps the one before it, which changes nothing.
template <int kCount>
inline __attribute__((always_inline)) void pack_rows(const float* row, int64_t slots, int first,
                                                     uint32_t* lanes) {
    if (slots < kLanes) return pack_lanes<kCount>(row, slots, first, slots, lanes);
    for (int64_t j = 0; j < slots; j += kLanes) {
        const int64_t at = std::min(j, slots - kLanes);
        pack_lanes<kCount>(row + at, slots, first, kLanes, lanes + at);
    }
}

// bits[j], `words` of 64 rows, holds column order[j]; it comes zeroed. Rows are packed 32 at a time, in lanes
// as wide as their floats; `lanes` is room for one of each column.
SWITCH_MOE_VECTORISED
void pack_columns(const float* table, int64_t timesteps, int64_t slots, const int64_t* order, int64_t words,
                  uint32_t* lanes, uint64_t* bits) {
    for (int64_t first = 0; first < timesteps; first += 32) {
        std::fill(lanes, lanes + slots, 0);
        const int count = static_cast<int>(std::min<int64_t>(32, timesteps - first));
        int i = 0;
        for (; i + 4 <= count; i += 4) pack_rows<4>(table + (first + i) * slots, slots, i, lanes);
        for (; i < count; ++i) pack_rows<1>(table + (first + i) * slots, slots, i, lanes);
        for (int64_t j = 0; j < slots; ++j) {
            bits[j * words + first / 64] |= uint64_t{lanes[order[j]]} << first % 64;
        }
    }
}

SWITCH_MOE_VECTORISED
void count_differences(const uint64_t* a, const uint64_t* b, int64_t slots, int64_t words, int64_t* cost) {
    for (int64_t i = 0; i < slots; ++i) {
        for (int64_t j = 0; j < slots; ++j) {
            int64_t count = 0;
            for (int64_t word = 0; word < words; ++word) {
                count += __builtin_popcountll(a[i * words + word] ^ b[j * words + word]);
            }
            cost[i * slots + j] = count;
        }
    }
}

bool is_permutation(const int64_t* order, int64_t slots) {
    std::vector<char> seen(slots);
    return std::all_of(order, order + slots,
                       [&](int64_t j) { return j >= 0 && j < slots && !std::exchange(seen[j], 1); });
}

}  // namespace

bool match_columns(int64_t timesteps, int64_t slots, const float* selected, const float* table,
                   const int64_t* rows, const int64_t* columns, int64_t* prices, int64_t* match) {
    if (!is_permutation(rows, slots) || !is_permutation(columns, slots)) return false;
    const int64_t words = (timesteps + 63) / 64;
    std::vector<uint64_t> bits(2 * words * slots);
    std::vector<uint32_t> lanes(slots);
    std::vector<int64_t> cost(slots * slots), found(slots), permuted;
    uint64_t *first = bits.data(), *second = first + words * slots;
    pack_columns(selected, timesteps, slots, rows, words, lanes.data(), first);
    pack_columns(table, timesteps, slots, columns, words, lanes.data(), second);
    count_differences(first, second, slots, words, cost.data());
    for (int64_t b = 0; prices != nullptr && b < slots; ++b) permuted.push_back(prices[columns[b]]);
    // Costs of at most `timesteps`: neither infinite nor too large.
    linear_assignment(cost.data(), slots, prices == nullptr ? nullptr : permuted.data(), found.data());
    for (int64_t a = 0; a < slots; ++a) match[rows[a]] = columns[found[a]];
    for (int64_t b = 0; prices != nullptr && b < slots; ++b) prices[columns[b]] = permuted[b];
    return true;
}

}  // namespace switch_moe
