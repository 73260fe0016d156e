// Linear assignment by shortest augmenting paths, O(n^3).
//
// R. Jonker, A. Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment
// problems", Computing 38, 1987; the form without initialisation of D. F. Crouse, "On implementing 2D
// rectangular assignment algorithms", IEEE T-AES 52(4), 2016.
#pragma once

#include <cstdint>

namespace switch_moe {

// Writes to column[i] the column of row i at the least total cost. Returns false, and leaves `column`
// undefined, where every assignment has an infinite cost. Costs are not NaN and not -infinity.
bool linear_assignment(const double* cost,  // [n, n]
                       int64_t n,
                       int64_t* column  // [n]
);

// The same in exact integer arithmetic; the caller makes sure that 4 * n * max|cost| fits in an int64.
bool linear_assignment(const int64_t* cost,  // [n, n]
                       int64_t n,
                       int64_t* column  // [n]
);

}  // namespace switch_moe
