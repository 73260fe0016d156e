// Linear assignment on the GPU.
#pragma once

#include <cstdint>

namespace switch_moe {

constexpr int kMaxRows = 1024;

// Writes to column[i] the column of row i at the least total cost, on `stream` (a cudaStream_t). Writes -1
// everywhere where no assignment is finite, a float cost is NaN or -infinity, or an integer sum could
// overflow.
void linear_assignment_cuda(const void* cost,  // [n, n] int64 if `integer`, else double
                            bool integer,
                            int64_t n,        // at most kMaxRows
                            int64_t* column,  // [n]
                            void* stream);

}  // namespace switch_moe
