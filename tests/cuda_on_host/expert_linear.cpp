// What test_expert_linear_hopper.py calls: the products of expert_linear.cu on a CPU.
#include "expert_linear_cuda.h"
#include "schedule.h"

// Null, or what went wrong.
extern "C" const char* merged_product(const int64_t* sizes, const bool* flags, void* const* tensors,
                                      const int* schedule, int multiprocessors) {
    hopper::current_schedule = schedule_of(schedule);
    hopper::current_multiprocessors = multiprocessors;
    const switch_moe::MergedProduct product{flags[0],
                                            flags[1],
                                            flags[2],
                                            sizes[0],
                                            sizes[1],
                                            sizes[2],
                                            sizes[3],
                                            sizes[4],
                                            sizes[5],
                                            tensors[0],
                                            tensors[1],
                                            static_cast<const int32_t*>(tensors[2]),
                                            static_cast<const float*>(tensors[3]),
                                            tensors[4],
                                            tensors[5],
                                            tensors[6],
                                            tensors[7]};
    return fault_of([&] { switch_moe::merged_product_cuda(product, nullptr); });
}
