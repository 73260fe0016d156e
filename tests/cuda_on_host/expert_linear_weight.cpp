// What test_expert_linear_hopper.py calls: the gradients of expert_linear_weight.cu on a CPU.
#include <cstring>
#include <vector>

#include "expert_linear_cuda.h"
#include "schedule.h"

// Null, or what went wrong.
extern "C" const char* weight_gradient(const int64_t* sizes, const bool* flags, void* const* tensors,
                                       const int* schedule, int multiprocessors) {
    hopper::current_schedule = schedule_of(schedule);
    hopper::current_multiprocessors = multiprocessors;
    switch_moe::WeightGradient gradient{
        {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], tensors[1] != nullptr},
        flags[0],
        flags[1],
        tensors[0],
        tensors[1],
        static_cast<const int32_t*>(tensors[2]),
        static_cast<const int32_t*>(tensors[3]),
        static_cast<const float*>(tensors[4]),
        tensors[5],
        tensors[6],
        nullptr,
        tensors[7],
        tensors[8],
        static_cast<float*>(tensors[9])};
    return fault_of([&] {
        std::vector<float> workspace(switch_moe::weight_gradient_workspace(gradient.problem) / 4);
        std::memset(workspace.data(), 0xff, workspace.size() * 4);  // NaN
        gradient.workspace = workspace.data();
        switch_moe::weight_gradient_cuda(gradient, nullptr);
    });
}
