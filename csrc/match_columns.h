// Matching the columns of one 0/1 table to those of another, on the CPU.
#pragma once

#include <cstdint>

namespace switch_moe {

// match[rows[a]] = columns[b] for the assignment of every a to a b at the least total cost, where
// cost[a][b] = sum over t of |selected[t][rows[a]] - table[t][columns[b]]|, of tables that hold 0 and 1.
// rows and columns are permutations of [0, num_columns), and their order decides ties. Where they are no
// permutations, or a table holds another number, the function returns false and writes nothing. `prices` may
// be null; else they are as for linear_assignment, in the order of the columns of `table`.
bool match_columns(int64_t timesteps, int64_t num_columns,
                   const float* selected,   // [timesteps, num_columns]
                   const float* table,      // [timesteps, num_columns]
                   const int64_t* rows,     // [num_columns]
                   const int64_t* columns,  // [num_columns]
                   int64_t* prices,         // [num_columns] or null
                   int64_t* match           // [num_columns]
);

}  // namespace switch_moe
