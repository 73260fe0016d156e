// Linear assignment on the GPU.
#pragma once

#include <cstdint>

namespace switch_moe {

constexpr int kMaxRows = 1024;

// Like linear_assignment on the CPU (linear_assignment.h), with the same result to the last tie, on `stream`
// (a cudaStream_t). Where that one returns a reason, this one writes -1 to every column, and `prices` stay as
// they were.
void linear_assignment_cuda(const void* cost,  // [n, n] int64 if `integer`, else double
                            bool integer,
                            int64_t n,        // at most kMaxRows
                            void* prices,     // [n] of the type of cost, or null
                            int64_t* column,  // [n]
                            void* stream);

}  // namespace switch_moe
