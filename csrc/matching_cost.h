// The cost of matching the columns of one 0/1 table to those of another, on the CPU.
#pragma once

#include <cstdint>

namespace switch_moe {

// cost[a][b] = sum over t of |selected[t][rows[a]] - table[t][columns[b]]|. What is not zero counts as one.
// Columns are packed into bits; a pair takes an exclusive or and a count. False, and nothing written, where
// an entry of rows or columns is not in [0, slots).
bool matching_cost(int64_t timesteps, int64_t slots,
                   const float* selected,   // [timesteps, slots]
                   const float* table,      // [timesteps, slots]
                   const int64_t* rows,     // [slots]
                   const int64_t* columns,  // [slots]
                   int64_t* cost            // [slots, slots]
);

}  // namespace switch_moe
