// Hopper on a CPU, as a kernel sees it: the functions of hopper.h, which says what each does, and `launch`.
// README.md says what is emulated and what is checked.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <stdexcept>

#include "../keywords.h"

// A kernel's shared memory is what its launch gives it: a variable would be one for all blocks and unchecked.
#undef __shared__

namespace hopper {

// What a kernel did that it must not do.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// When asynchronous work is done: at the call; at the latest, which is when a thread waits for it or nothing
// else can run; or in between.
enum class When { kEarly, kLate, kRandom };

struct Schedule {
    When loads = When::kEarly, stores = When::kEarly, products = When::kEarly;
    int lagging = -1;           // a warpgroup of every cluster, counted over its blocks, that runs last
    bool reversed = false;      // the order of clusters, warps and lanes
    bool random_warps = false;  // clusters and warps run in a random order, warps sometimes not at all
    uint32_t seed = 1;
    int lagging_lanes = 0;  // of the warpgroup that lags, only the lanes from this one on do
};

// Runs the kernel on every thread of the grid, one cluster after another. Threads start with `registers`, by
// default what a block of that size leaves each. Throws a Fault.
void launch(const Shape& shape, const Schedule& schedule, const std::function<void()>& kernel,
            int registers = 0);

// What launch_kernel runs with, and how many multiprocessors the device has.
inline Schedule current_schedule;
inline int current_multiprocessors = 4;

inline int multiprocessors() { return current_multiprocessors; }

template <typename... Parameters>
void launch_kernel(void (*kernel)(Parameters...), const Shape& shape, void*, Parameters... parameters) {
    launch(shape, current_schedule, [&] { kernel(parameters...); });
}

struct TensorMap {
    uint8_t* address;
    int rank;
    int64_t size[3];    // elements of 16 bits
    int64_t stride[3];  // bytes
    int box[3];
    Swizzle swizzle;
};

// Dimensions are given fastest first, strides in bytes and without that of the first. Throws a Fault where
// the driver would refuse, and where the box's rows do not fill the swizzle.
TensorMap tensor_map(const void* address, std::initializer_list<int64_t> size,
                     std::initializer_list<int64_t> stride, std::initializer_list<int> box, Swizzle swizzle);

// ---- Shared memory, threads

uint32_t shared_memory();
void read_shared(uint32_t address, void* to, int bytes);
void write_shared(uint32_t address, const void* from, int bytes);

template <typename T>
T load_shared(uint32_t address) {
    T value;
    read_shared(address, &value, sizeof value);
    return value;
}
template <typename T>
void store_shared(uint32_t address, T value) {
    write_shared(address, &value, sizeof value);
}

uint32_t cluster_rank();
void cluster_arrive();
void cluster_wait();
inline void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
void named_sync(int id, int threads);
void change_registers(int registers, bool more);
template <int kRegisters>
void take_registers() {
    change_registers(kRegisters, true);
}
template <int kRegisters>
void give_registers() {
    change_registers(kRegisters, false);
}

// ---- Barriers, copies

void barrier_init(uint32_t barrier, int arrivals);
void fence_barrier_init();
void barrier_arrive(uint32_t barrier);
void barrier_arrive_at(uint32_t barrier, uint32_t rank);
void barrier_expect(uint32_t barrier, uint32_t bytes);
void barrier_wait(uint32_t barrier, uint32_t parity);

void load_box(uint32_t to, const TensorMap* map, At2 at, uint32_t barrier);
void load_box(uint32_t to, const TensorMap* map, At3 at, uint32_t barrier);
void load_box(uint32_t to, const TensorMap* map, At2 at, uint32_t barrier, uint16_t blocks);
void load_box(uint32_t to, const TensorMap* map, At3 at, uint32_t barrier, uint16_t blocks);
void store_box(const TensorMap* map, At2 at, uint32_t from);
void store_box(const TensorMap* map, At3 at, uint32_t from);
void store_commit();
void wait_for_stores(int pending, bool only_read);
template <int kPending>
void store_wait_read() {
    wait_for_stores(kPending, true);
}
template <int kPending>
void store_wait() {
    wait_for_stores(kPending, false);
}
void fence_async();

// ---- Matrices

void load_matrices(uint32_t (&to)[4], uint32_t address);
void load_matrices_transposed(uint32_t (&to)[4], uint32_t address);
void store_matrices(uint32_t address, const uint32_t (&from)[4]);
void store_matrices_transposed(uint32_t address, const uint32_t (&from)[4]);

float to_float(BFloat16 value);
float to_float(Float16 value);
BFloat16 to_bfloat16(float value);
Float16 to_float16(float value);

template <typename T>
T from_float(float value) {
    if constexpr (kIsBFloat16<T>) {
        return to_bfloat16(value);
    } else {
        return to_float16(value);
    }
}
template <typename T>
uint32_t pack(float first, float second) {
    return from_float<T>(first).bits | uint32_t{from_float<T>(second).bits} << 16;
}
template <typename T>
float first_of(uint32_t packed) {
    return to_float(T{static_cast<uint16_t>(packed)});
}
template <typename T>
float second_of(uint32_t packed) {
    return to_float(T{static_cast<uint16_t>(packed >> 16)});
}

// ---- Products

struct Operands {
    bool is_bfloat16, transposed_a, transposed_b, add;
    int columns;
    float* d;
    const uint32_t* registers;  // of a, or null
    uint64_t a, b;
};
void multiply(const Operands& operands);

template <int kColumns>
constexpr bool kHasProduct = kColumns == 64 || kColumns == 128 || kColumns == 256;  // what hopper.h has

template <typename T, int kColumns, bool kTransposedA = false, bool kTransposedB = false>
void product(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add) {
    static_assert(kHasProduct<kColumns>);
    multiply({kIsBFloat16<T>, kTransposedA, kTransposedB, add, kColumns, d, nullptr, a, b});
}
template <typename T, int kColumns, bool kTransposedB = false>
void product(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    static_assert(kHasProduct<kColumns>);
    multiply({kIsBFloat16<T>, false, kTransposedB, add, kColumns, d, a, 0, b});
}
void product_fence();
void product_commit();
void wait_for_products(int pending);
template <int kPending, int... kSizes>
void product_wait(float (&... accumulators)[kSizes]) {
    ((void)accumulators, ...);
    wait_for_products(kPending);
}

// What the lanes of a warp give one another.
uint32_t exchange(uint32_t value, int from_lane);

}  // namespace hopper

// ---- Of CUDA itself

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return std::bit_cast<T>(hopper::exchange(std::bit_cast<uint32_t>(value), lane % 32));
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
    return std::bit_cast<T>(hopper::exchange(std::bit_cast<uint32_t>(value), (threadIdx.x % 32) ^ lanes));
}
