// The CUDA module switch_moe._cuda. Arguments are addresses and sizes; switch_moe checks them before it
// calls.
#include <pybind11/pybind11.h>

#include "expert_linear_cuda.h"
#include "linear_assignment_cuda.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "Compiled CUDA kernels of switch_moe; call them through switch_moe.ops.";
    m.attr("architectures") = SWITCH_MOE_CUDA_ARCHS;
    m.attr("sources") = SWITCH_MOE_SOURCES;  // compared with the sources beside the package
    m.attr("max_assignment_rows") = switch_moe::kMaxRows;
    m.def(
        "linear_assignment",
        [](uintptr_t cost, bool integer, int64_t n, uintptr_t prices, uintptr_t column, uintptr_t stream) {
            switch_moe::linear_assignment_cuda(
                reinterpret_cast<const void*>(cost), integer, n, reinterpret_cast<void*>(prices),
                reinterpret_cast<int64_t*>(column), reinterpret_cast<void*>(stream));
        },
        py::arg("cost"), py::arg("integer"), py::arg("n"), py::arg("prices"), py::arg("column"),
        py::arg("stream"));
    m.def(
        "merged_product",
        [](bool is_bfloat16, bool gradient, bool modulate, int64_t batch, int64_t tokens, int64_t inputs,
           int64_t outputs, int64_t num_experts, int64_t top_k, uintptr_t weight, uintptr_t bias,
           uintptr_t index, uintptr_t gate, uintptr_t input, uintptr_t grad, uintptr_t mixture,
           uintptr_t output, uintptr_t stream) {
            const switch_moe::MergedProduct product{is_bfloat16,
                                                    gradient,
                                                    modulate,
                                                    batch,
                                                    tokens,
                                                    inputs,
                                                    outputs,
                                                    num_experts,
                                                    top_k,
                                                    reinterpret_cast<const void*>(weight),
                                                    reinterpret_cast<const void*>(bias),
                                                    reinterpret_cast<const int32_t*>(index),
                                                    reinterpret_cast<const float*>(gate),
                                                    reinterpret_cast<const void*>(input),
                                                    reinterpret_cast<const void*>(grad),
                                                    reinterpret_cast<void*>(mixture),
                                                    reinterpret_cast<void*>(output)};
            switch_moe::merged_product_cuda(product, reinterpret_cast<void*>(stream));
        },
        py::arg("is_bfloat16"), py::arg("gradient"), py::arg("modulate"), py::arg("batch"), py::arg("tokens"),
        py::arg("inputs"), py::arg("outputs"), py::arg("num_experts"), py::arg("top_k"), py::arg("weight"),
        py::arg("bias"), py::arg("index"), py::arg("gate"), py::arg("input"), py::arg("grad"),
        py::arg("mixture"), py::arg("output"), py::arg("stream"));
    m.def(
        "weight_gradient_workspace",
        [](int64_t batch, int64_t tokens, int64_t inputs, int64_t outputs, int64_t num_experts, int64_t top_k,
           bool bias) {
            return switch_moe::weight_gradient_workspace(
                {batch, tokens, inputs, outputs, num_experts, top_k, bias});
        },
        py::arg("batch"), py::arg("tokens"), py::arg("inputs"), py::arg("outputs"), py::arg("num_experts"),
        py::arg("top_k"), py::arg("bias"));
    m.def(
        "weight_gradient",
        [](bool is_bfloat16, bool single, int64_t batch, int64_t tokens, int64_t inputs, int64_t outputs,
           int64_t num_experts, int64_t top_k, uintptr_t weight, uintptr_t bias, uintptr_t order,
           uintptr_t index, uintptr_t gate, uintptr_t x, uintptr_t grad, uintptr_t workspace,
           uintptr_t weight_grad, uintptr_t bias_grad, uintptr_t gate_grad, uintptr_t stream) {
            const switch_moe::WeightGradient gradient{
                {batch, tokens, inputs, outputs, num_experts, top_k, bias != 0},
                is_bfloat16,
                single,
                reinterpret_cast<const void*>(weight),
                reinterpret_cast<const void*>(bias),
                reinterpret_cast<const int32_t*>(order),
                reinterpret_cast<const int32_t*>(index),
                reinterpret_cast<const float*>(gate),
                reinterpret_cast<const void*>(x),
                reinterpret_cast<const void*>(grad),
                reinterpret_cast<void*>(workspace),
                reinterpret_cast<void*>(weight_grad),
                reinterpret_cast<void*>(bias_grad),
                reinterpret_cast<float*>(gate_grad)};
            switch_moe::weight_gradient_cuda(gradient, reinterpret_cast<void*>(stream));
        },
        py::arg("is_bfloat16"), py::arg("single"), py::arg("batch"), py::arg("tokens"), py::arg("inputs"),
        py::arg("outputs"), py::arg("num_experts"), py::arg("top_k"), py::arg("weight"), py::arg("bias"),
        py::arg("order"), py::arg("index"), py::arg("gate"), py::arg("x"), py::arg("grad"),
        py::arg("workspace"), py::arg("weight_grad"), py::arg("bias_grad"), py::arg("gate_grad"),
        py::arg("stream"));
}
