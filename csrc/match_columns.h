// Matching the columns of one 0/1 table to those of another, on the CPU.
#pragma once

#include <cstdint>

namespace switch_moe {

// match[rows[a]] = columns[b] for the assignment of every a to a b at the least total cost, where
// cost[a][b] = sum over t of |selected[t][rows[a]] - table[t][columns[b]]|. What is not zero counts as one.
// rows and columns are permutations; their order decides ties. `prices` may be null; else they are as for
// linear_assignment, in the order of the table. False, and nothing written, where rows or columns are not
// permutations of [0, slots).
bool match_columns(int64_t timesteps, int64_t slots,
                   const float* selected,   // [timesteps, slots]
                   const float* table,      // [timesteps, slots]
                   const int64_t* rows,     // [slots]
                   const int64_t* columns,  // [slots]
                   int64_t* prices,         // [slots] or null
                   int64_t* match           // [slots]
);

}  // namespace switch_moe
