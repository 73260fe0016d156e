// Enough of CUDA to run a one-warp kernel on a CPU: 32 lanes that wait for one another at every warp
// instruction. A test double: it proves a kernel's logic, not its machine code.
//
// The lanes are fibers of one thread, fast enough for thousands of problems; with CUDA_ON_HOST_THREADS they
// are threads, so that a race detector sees a missing barrier.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#ifdef CUDA_ON_HOST_THREADS
#include <barrier>
#include <thread>
#else
#include "fibers.h"
#endif

#include "keywords.h"

namespace warp {

constexpr int kLanes = 32;
inline uint64_t slots[kLanes];

#ifdef CUDA_ON_HOST_THREADS

inline std::barrier<> barrier(kLanes);

inline void wait() { barrier.arrive_and_wait(); }

inline void run(const std::function<void()>& kernel, bool) {
    std::vector<std::thread> threads;
    for (int lane = 0; lane < kLanes; ++lane) {
        threads.emplace_back([&kernel, lane] {
            threadIdx.x = lane;
            kernel();
        });
    }
    for (auto& thread : threads) thread.join();
}

#else

inline Fiber fibers[kLanes];
inline const std::function<void()>* kernel_of_fibers;

inline void wait() { Fiber::yield(); }

// Every turn runs each lane to its next barrier; the lanes' order within a turn must not matter.
inline void run(const std::function<void()>& kernel, bool last_lane_first) {
    kernel_of_fibers = &kernel;
    for (Fiber& fiber : fibers) fiber.start([] { (*kernel_of_fibers)(); });
    for (int finished = 0; finished < kLanes;) {
        finished = 0;
        for (int turn = 0; turn < kLanes; ++turn) {
            threadIdx.x = last_lane_first ? kLanes - 1 - turn : turn;
            fibers[threadIdx.x].resume();
            finished += fibers[threadIdx.x].finished();
        }
        if (finished != 0 && finished != kLanes) std::abort();  // lanes that took different ways
    }
}

#endif

template <typename T, typename Combine>
T reduce(T value, Combine combine) {
    std::memcpy(&slots[threadIdx.x], &value, sizeof value);
    wait();
    T result;
    std::memcpy(&result, &slots[0], sizeof result);
    for (int lane = 1; lane < kLanes; ++lane) {
        T other;
        std::memcpy(&other, &slots[lane], sizeof other);
        result = combine(result, other);
    }
    wait();
    return result;
}

}  // namespace warp

inline void __syncwarp() { warp::wait(); }

template <typename T>
T __reduce_min_sync(unsigned, T value) {
    return warp::reduce(value, [](T a, T b) { return b < a ? b : a; });
}

inline bool __all_sync(unsigned, bool value) {
    return warp::reduce(value, [](bool a, bool b) { return a && b; });
}

inline double __longlong_as_double(long long bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline long long __double_as_longlong(double value) {
    long long bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// A launch `kernel<<<1, 32, 0, stream>>>(arguments)` becomes launch(32, [&] { kernel(arguments); }).
inline bool last_lane_first = false;

inline void launch(int lanes, const std::function<void()>& kernel) {
    if (lanes != warp::kLanes) std::abort();
    warp::run(kernel, last_lane_first);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
