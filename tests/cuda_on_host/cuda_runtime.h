// Enough of CUDA to run a one-warp kernel on a CPU: 32 threads in lockstep at every warp instruction.
// A test double: it proves a kernel's logic (and its barriers, under a race detector), not its machine code.
#pragma once

#include <barrier>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static

struct Dim {
    int x;
};
inline thread_local Dim threadIdx{0};

namespace warp {
inline std::barrier<> barrier(32);
inline uint64_t slots[32];
}  // namespace warp

inline void __syncwarp() { warp::barrier.arrive_and_wait(); }

template <typename T>
T exchange(T value, int from) {
    std::memcpy(&warp::slots[threadIdx.x], &value, sizeof value);
    __syncwarp();
    T result;
    std::memcpy(&result, &warp::slots[from], sizeof result);
    __syncwarp();
    return result;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return exchange(value, threadIdx.x ^ mask);
}

inline bool __all_sync(unsigned, bool value) {
    bool all = true;
    for (int lane = 0; lane < 32; ++lane) all = exchange(value, lane) && all;
    return all;
}

inline double __longlong_as_double(long long bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A launch `kernel<<<1, lanes, 0, stream>>>(arguments)` becomes launch(lanes, [&] { kernel(arguments); }).
inline void launch(int lanes, const std::function<void()>& kernel) {
    std::vector<std::thread> threads;
    for (int lane = 0; lane < lanes; ++lane) {
        threads.emplace_back([&kernel, lane] {
            threadIdx.x = lane;
            kernel();
        });
    }
    for (auto& thread : threads) thread.join();
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
