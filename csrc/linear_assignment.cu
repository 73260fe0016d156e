// Linear assignment on the GPU: one warp, shortest augmenting paths (see linear_assignment.h).
//
// The state of a problem of up to 1,024 rows is 38 KiB and stays in shared memory; costs are read from global
// memory once for every row that a search visits. Lane i owns columns i, i + 32, ... A search step relaxes
// one row of costs, then the warp agrees on the nearest unseen column. Nothing waits for the host.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "linear_assignment_cuda.h"

namespace switch_moe {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAll = 0xffffffffu;

template <typename Cost>
struct Range;
template <>
struct Range<double> {
    static __device__ double unreached() { return __longlong_as_double(0x7ff0000000000000LL); }
    static __device__ bool usable(double c, int) { return c > -unreached(); }  // false for NaN and -inf
};
template <>
struct Range<long long> {
    static __device__ long long unreached() { return 0x7fffffffffffffffLL; }
    static __device__ bool usable(long long c, int n) {  // sums must not overflow
        const long long limit = unreached() / (4LL * n);
        return c <= limit && c >= -limit;
    }
};

// The nearest column over the warp; among equally near ones a free column, then the lowest.
template <typename Cost>
__device__ void nearest(Cost& distance, int& taken, int& column) {
    for (int step = kLanes / 2; step > 0; step /= 2) {
        const Cost other = __shfl_xor_sync(kAll, distance, step);
        const int other_taken = __shfl_xor_sync(kAll, taken, step);
        const int other_column = __shfl_xor_sync(kAll, column, step);
        const bool tie = other == distance;
        if (other < distance || (tie && other_taken < taken) ||
            (tie && other_taken == taken && other_column < column)) {
            distance = other;
            taken = other_taken;
            column = other_column;
        }
    }
}

template <typename Cost>
__global__ void solve(const Cost* __restrict__ cost,  // [n, n]
                      int n,
                      int64_t* __restrict__ column  // [n]
) {
    __shared__ Cost u[kMaxRows], v[kMaxRows], distance[kMaxRows];
    __shared__ int row_of[kMaxRows], column_of[kMaxRows], previous_row[kMaxRows];
    __shared__ bool seen[kMaxRows];
    const int lane = threadIdx.x;
    const Cost unreached = Range<Cost>::unreached();

    bool usable = true;
    for (int64_t i = lane; i < static_cast<int64_t>(n) * n; i += kLanes) {
        usable = usable && Range<Cost>::usable(cost[i], n);
    }
    bool solvable = __all_sync(kAll, usable);
    for (int j = lane; j < n; j += kLanes) {
        u[j] = v[j] = 0;
        row_of[j] = column_of[j] = -1;
    }
    __syncwarp();

    for (int start = 0; start < n && solvable; ++start) {
        for (int j = lane; j < n; j += kLanes) {
            distance[j] = unreached;
            seen[j] = false;
        }
        __syncwarp();
        Cost shortest = 0;
        int row = start, sink = -1;
        while (sink < 0 && solvable) {
            Cost best = unreached;
            int best_taken = 1, best_column = n;
            for (int j = lane; j < n; j += kLanes) {
                if (seen[j]) continue;
                const Cost entry = cost[static_cast<int64_t>(row) * n + j];
                const Cost through = shortest + entry - u[row] - v[j];
                if (through < distance[j]) {
                    distance[j] = through;
                    previous_row[j] = row;
                }
                const int taken = row_of[j] >= 0;
                if (distance[j] < best || (distance[j] == best && taken < best_taken)) {
                    best = distance[j];
                    best_taken = taken;
                    best_column = j;
                }
            }
            nearest(best, best_taken, best_column);
            if (best == unreached) {
                solvable = false;
                break;
            }
            shortest = best;
            if (best_taken) {
                row = row_of[best_column];
            } else {
                sink = best_column;
            }
            __syncwarp();
            if (lane == 0) seen[best_column] = true;
            __syncwarp();
        }
        if (!solvable) break;

        // Duals: a seen column and the row that holds it move together; the sink has no row yet.
        for (int j = lane; j < n; j += kLanes) {
            if (!seen[j]) continue;
            v[j] -= shortest - distance[j];
            if (row_of[j] >= 0) u[row_of[j]] += shortest - distance[j];
        }
        __syncwarp();
        if (lane == 0) {
            u[start] += shortest;
            for (int j = sink, i = -1; i != start;) {
                i = previous_row[j];
                row_of[j] = i;
                const int next = column_of[i];
                column_of[i] = j;
                j = next;
            }
        }
        __syncwarp();
    }
    for (int i = lane; i < n; i += kLanes) column[i] = solvable ? column_of[i] : -1;
}

}  // namespace

void linear_assignment_cuda(const void* cost, bool integer, int64_t n, int64_t* column, void* stream) {
    if (n == 0) return;
    auto* on = static_cast<cudaStream_t>(stream);
    if (integer) {
        solve<<<1, kLanes, 0, on>>>(static_cast<const long long*>(cost), static_cast<int>(n), column);
    } else {
        solve<<<1, kLanes, 0, on>>>(static_cast<const double*>(cost), static_cast<int>(n), column);
    }
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("linear_assignment kernel: ") + cudaGetErrorString(error));
    }
}

}  // namespace switch_moe
