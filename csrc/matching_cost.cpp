#include "matching_cost.h"

#include <algorithm>
#include <vector>

#include "vectorised.h"

namespace switch_moe {
namespace {

// Ors bits first, first + 1, ... of lanes[j] with whether count rows of column j are not zero.
template <int kCount>
inline __attribute__((always_inline)) void pack_rows(const float* row, int64_t slots, int first,
                                                     uint32_t* lanes) {
    for (int64_t j = 0; j < slots; ++j) {
        uint32_t bits = 0;
        for (int i = 0; i < kCount; ++i) bits |= uint32_t{row[i * slots + j] != 0} << i;
        lanes[j] |= bits << first;
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

}  // namespace

bool matching_cost(int64_t timesteps, int64_t slots, const float* selected, const float* table,
                   const int64_t* rows, const int64_t* columns, int64_t* cost) {
    const auto inside = [slots](int64_t j) { return j >= 0 && j < slots; };
    if (!std::all_of(rows, rows + slots, inside) || !std::all_of(columns, columns + slots, inside)) {
        return false;
    }
    const int64_t words = (timesteps + 63) / 64;
    std::vector<uint64_t> bits(2 * words * slots);
    std::vector<uint32_t> lanes(slots);
    uint64_t *first = bits.data(), *second = first + words * slots;
    pack_columns(selected, timesteps, slots, rows, words, lanes.data(), first);
    pack_columns(table, timesteps, slots, columns, words, lanes.data(), second);
    count_differences(first, second, slots, words, cost);
    return true;
}

}  // namespace switch_moe
