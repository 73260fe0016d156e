// Linear assignment by shortest augmenting paths, O(n^3), on the CPU. linear_assignment_core.h holds the
// algorithm.
//
// R. Jonker, A. Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment
// problems", Computing 38, 1987; prices that persist are D. P. Bertsekas, "The auction algorithm", Annals of
// Operations Research 14, 1988.
#pragma once

#include <cstdint>

namespace switch_moe {

// Writes to column[i] the column of row i at the least total cost. Costs may be +infinity. `prices` may be
// null. If they are not, the solve starts from them, where all zero means from nothing, and they become the
// final prices of the columns: from these the next, similar problem solves faster. Returns an
// AssignmentStatus; unless it is kSolved (0), `column` and `prices` stay as they were.
int linear_assignment(const double* cost,  // [n, n]
                      int64_t n,
                      double* prices,  // [n] or null
                      int64_t* column  // [n]
);

// Does the same in exact integer arithmetic.
int linear_assignment(const int64_t* cost,  // [n, n]
                      int64_t n,
                      int64_t* prices,  // [n] or null
                      int64_t* column   // [n]
);

}  // namespace switch_moe
