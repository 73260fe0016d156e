// Linear assignment on the GPU: linear_assignment_core.h with the lanes of one warp, in one launch that waits
// for nothing and allocates nothing.
//
// A search is a chain of steps, each of them a row of costs and a minimum over its columns, so latency is all
// that counts: the lanes of one warp agree in two instructions and need no __syncthreads. Up to 96 rows of
// small integers (an XL model has 84) are copied to shared memory, 32 bits each; a step then reads three
// costs per lane and takes one minimum. Larger problems read their costs from global memory.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "linear_assignment_core.h"
#include "linear_assignment_cuda.h"

namespace switch_moe {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kPackedRows = 96;

struct Warp {
    static constexpr int lanes = kLanes, batch = 16;
    using PackedCosts = PackedMatrix<kPackedRows>;
    template <typename Value>
    using IndexFor = int;

    __device__ __forceinline__ int lane() const { return threadIdx.x; }
    __device__ __forceinline__ void sync() const { __syncwarp(); }
    __device__ __forceinline__ bool all(bool condition) const { return __all_sync(kAll, condition); }
    __device__ __forceinline__ int least(int x) const { return __reduce_min_sync(kAll, x); }
    __device__ __forceinline__ int64_t least(int64_t x) const {
        const int high = static_cast<int>(x >> 32);
        const int least_high = least(high);
        const unsigned low = high == least_high ? static_cast<unsigned>(x) : kAll;
        return static_cast<int64_t>(least_high) * (int64_t{1} << 32) + __reduce_min_sync(kAll, low);
    }
    __device__ __forceinline__ double least(double x) const {
        return __longlong_as_double(ordered(least(ordered(__double_as_longlong(x)))));
    }
    // Maps the bits of doubles to integers in the same order, and back.
    static __device__ __forceinline__ int64_t ordered(int64_t bits) {
        return bits ^ (bits >> 63 & 0x7fffffffffffffff);
    }
};

constexpr int kPackedState = kPackedRows * AssignmentState<int32_t, int>::kBytes;
constexpr int kPackedBytes = kPackedState + kPackedRows * kPackedRows * sizeof(int32_t);
constexpr int kGivenBytes = kMaxRows * AssignmentState<int64_t, int>::kBytes;
constexpr int kMemory = kPackedBytes > kGivenBytes ? kPackedBytes : kGivenBytes;

template <typename Cost>
__global__ void __launch_bounds__(kLanes) solve(const Cost* __restrict__ cost,  // [n, n]
                                                int n,
                                                Cost* __restrict__ prices,     // [n] or null
                                                int64_t* __restrict__ column)  // [n]
{
    alignas(8) __shared__ char memory[kMemory];
    auto* packed = n <= kPackedRows ? reinterpret_cast<int32_t*>(memory + kPackedState) : nullptr;
    if (assign(Warp(), cost, n, memory, packed, prices, column) != kSolved) {
        for (int i = Warp().lane(); i < n; i += kLanes) column[i] = -1;
    }
}

}  // namespace

void linear_assignment_cuda(const void* cost, bool integer, int64_t n, void* prices, int64_t* column,
                            void* stream) {
    if (n == 0) return;
    auto* on = static_cast<cudaStream_t>(stream);
    const int rows = static_cast<int>(n);
    if (integer) {
        solve<<<1, kLanes, 0, on>>>(static_cast<const int64_t*>(cost), rows, static_cast<int64_t*>(prices),
                                    column);
    } else {
        solve<<<1, kLanes, 0, on>>>(static_cast<const double*>(cost), rows, static_cast<double*>(prices),
                                    column);
    }
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("linear_assignment kernel: ") + cudaGetErrorString(error));
    }
}

}  // namespace switch_moe
