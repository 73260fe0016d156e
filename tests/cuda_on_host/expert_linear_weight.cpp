// What test_expert_weight_hopper.py calls: the kernels of expert_linear_weight.cu on a CPU.
#include <cstring>
#include <string>
#include <vector>

#include "expert_linear_cuda.h"
#include "hopper.h"

// Null, or what went wrong.
extern "C" const char* weight_gradient(const int64_t* sizes, const bool* flags, void* const* tensors,
                                       const int* schedule, int multiprocessors) {
    static std::string fault;
    auto when = [&](int i) { return static_cast<hopper::When>(schedule[i]); };
    hopper::current_schedule = {when(0),
                                when(1),
                                when(2),
                                schedule[3],
                                schedule[4] != 0,
                                schedule[5] != 0,
                                static_cast<uint32_t>(schedule[6])};
    hopper::current_multiprocessors = multiprocessors;
    switch_moe::WeightGradient gradient{flags[0],
                                        flags[1],
                                        sizes[0],
                                        sizes[1],
                                        sizes[2],
                                        sizes[3],
                                        sizes[4],
                                        sizes[5],
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
    try {
        std::vector<float> workspace(switch_moe::weight_gradient_workspace(gradient) / 4);
        std::memset(workspace.data(), 0xff, workspace.size() * 4);  // NaN
        gradient.workspace = workspace.data();
        switch_moe::weight_gradient_cuda(gradient, nullptr);
    } catch (const std::exception& error) {
        fault = error.what();
        return fault.c_str();
    }
    return nullptr;
}
