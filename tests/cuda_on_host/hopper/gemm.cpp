// Runs a kernel of kernels.inc, which the test writes: gemm.h as it is, and with planted bugs.
#include "../schedule.h"

namespace {

struct Problem {
    int batch, rows, columns, depth;
};
struct Kernel {
    int element_bytes;
    bool transposed_a, transposed_c;
    uint32_t shared_bytes;
    void (*run)(hopper::TensorMap, hopper::TensorMap, hopper::TensorMap, Problem);
};

#include "kernels.inc"

using hopper::Swizzle;

void run(const Kernel& kernel, uint16_t* a, uint16_t* b, uint16_t* c, const Problem& problem, int grid,
         const hopper::Schedule& schedule) {
    const auto [batch, rows, columns, depth] = problem;
    auto matrices = [&](void* address, int64_t row, int64_t high) {  // `batch` of `high` rows
        return hopper::tensor_map(address, {row, high, batch}, {row * 2, row * high * 2}, {64, 64, 1},
                                  Swizzle::k128);
    };
    const int64_t wide = kernel.transposed_a ? rows : depth, high = kernel.transposed_a ? depth : rows;
    const hopper::TensorMap a_map =
        hopper::tensor_map(a, {wide, high * batch}, {wide * 2}, {64, 64}, Swizzle::k128);
    const hopper::TensorMap b_map = matrices(b, columns, depth);
    const hopper::TensorMap c_map =
        kernel.transposed_c ? matrices(c, rows, columns) : matrices(c, columns, rows);
    hopper::launch({grid, 2, 384, kernel.shared_bytes}, schedule,
                   [&] { kernel.run(a_map, b_map, c_map, problem); });
}

}  // namespace

extern "C" const char* run_gemm(int kernel, uint16_t* a, uint16_t* b, uint16_t* c, int batch, int rows,
                                int columns, int depth, int grid, const int* schedule) {
    return fault_of(
        [&] { run(kernels[kernel], a, b, c, {batch, rows, columns, depth}, grid, schedule_of(schedule)); });
}

// Why a tensor map or a launch is refused.
extern "C" const char* refusal(int address, int stride, int box, int rows, int grid, int threads,
                               int registers, int bytes) {
    alignas(16) static char memory[16];
    return fault_of([&] {
        hopper::tensor_map(memory + address, {64, 64}, {stride}, {box, rows}, Swizzle::k128);
        hopper::launch({grid, 2, threads, static_cast<uint32_t>(bytes)}, {}, [] {}, registers);
    });
}
