// The CPU module switch_moe._cpu. Arguments are addresses and sizes; switch_moe checks them before it calls.
#include <pybind11/pybind11.h>

#include "expert_linear.h"
#include "linear_assignment.h"
#include "match_columns.h"
#include "routed_mlp.h"

namespace py = pybind11;
using namespace switch_moe;

namespace {

using WithoutGil = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Experts experts_at(uintptr_t weight, int64_t num_experts, int64_t inputs, int64_t outputs) {
    return {num_experts, inputs, outputs, at<void>(weight)};
}

Routes routes_at(uintptr_t index, uintptr_t gate, int64_t num_routes, int64_t top_k) {
    return {num_routes, top_k, at<int32_t>(index), at<float>(gate)};
}

Pairs pairs_at(int64_t count, uintptr_t row, uintptr_t gate) {
    return {count, at<int32_t>(row), at<float>(gate)};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Compiled CPU kernels of switch_moe; call them through switch_moe.ops.";
    m.attr("compiler") = __VERSION__;
    m.attr("sources") = SWITCH_MOE_SOURCES;  // compared with the sources beside the package
    m.def(
        "merge_experts",
        [](uintptr_t weight, int64_t num_experts, int64_t elements, uintptr_t index, uintptr_t gate,
           int64_t num_routes, int64_t top_k, int dtype, int threads, uintptr_t merged) {
            merge_experts(experts_at(weight, num_experts, 1, elements),
                          routes_at(index, gate, num_routes, top_k), static_cast<DType>(dtype), threads,
                          at<void>(merged));
        },
        WithoutGil());
    m.def(
        "merge_experts_backward",
        [](uintptr_t grad_merged, uintptr_t weight, int64_t num_experts, int64_t elements, uintptr_t index,
           uintptr_t gate, int64_t num_routes, int64_t top_k, bool first, bool last, int dtype, int threads,
           uintptr_t carry, uintptr_t grad_weight, uintptr_t grad_gate) {
            merge_experts_backward(at<void>(grad_merged), experts_at(weight, num_experts, 1, elements),
                                   routes_at(index, gate, num_routes, top_k), {first, last},
                                   static_cast<DType>(dtype), threads, at<float>(carry),
                                   at<void>(grad_weight), at<float>(grad_gate));
        },
        WithoutGil());
    m.def("fused_product_takes", [](int dtype, int vector_width) {
        return fused_product_takes(static_cast<DType>(dtype), vector_width);
    });
    m.def("fused_product_flops", fused_product_flops);
    m.def(
        "fused_product",
        [](uintptr_t x, int64_t num_experts, int64_t inputs, int64_t outputs, uintptr_t weight,
           int64_t num_routes, int64_t top_k, uintptr_t index, uintptr_t gate, uintptr_t starts,
           uintptr_t bias, bool transposed, int dtype, int vector_width, int threads, uintptr_t out) {
            fused_product(at<void>(x), experts_at(weight, num_experts, inputs, outputs),
                          routes_at(index, gate, num_routes, top_k), at<int64_t>(starts), at<void>(bias),
                          transposed, static_cast<DType>(dtype), vector_width, threads, at<void>(out));
        },
        WithoutGil());
    m.def("fused_product_workspace", [](int64_t tokens, int64_t num_experts, int64_t inputs, int64_t outputs,
                                        int dtype, int vector_width) {
        return fused_product_workspace(tokens, experts_at(0, num_experts, inputs, outputs),
                                       static_cast<DType>(dtype), vector_width);
    });
    m.def(
        "fused_product_backward",
        [](uintptr_t x, uintptr_t grad, int64_t tokens, int64_t num_experts, int64_t inputs, int64_t outputs,
           uintptr_t weight, int64_t num_routes, int64_t top_k, uintptr_t index, uintptr_t gate, int dtype,
           int vector_width, int threads, int64_t samples, uintptr_t workspace, uintptr_t carry,
           uintptr_t grad_weight, uintptr_t grad_gate) {
            fused_product_backward(
                at<void>(x), at<void>(grad), tokens, experts_at(weight, num_experts, inputs, outputs),
                routes_at(index, gate, num_routes, top_k), static_cast<DType>(dtype), vector_width, threads,
                samples, at<void>(workspace), at<float>(carry), at<void>(grad_weight), at<float>(grad_gate));
        },
        WithoutGil());
    m.def(
        "linear_assignment",
        [](uintptr_t cost, bool integer, int64_t n, uintptr_t prices, uintptr_t column) {
            return integer ? linear_assignment(at<int64_t>(cost), n, at<int64_t>(prices), at<int64_t>(column))
                           : linear_assignment(at<double>(cost), n, at<double>(prices), at<int64_t>(column));
        },
        WithoutGil());
    m.def(
        "match_columns",
        [](int64_t timesteps, int64_t num_columns, uintptr_t selected, uintptr_t table, uintptr_t rows,
           uintptr_t columns, uintptr_t prices, uintptr_t match) {
            return match_columns(timesteps, num_columns, at<float>(selected), at<float>(table),
                                 at<int64_t>(rows), at<int64_t>(columns), at<int64_t>(prices),
                                 at<int64_t>(match));
        },
        WithoutGil());
    m.def(
        "gather_rows",
        [](uintptr_t x, int64_t pairs, uintptr_t row, int64_t columns, int dtype, int threads,
           uintptr_t out) {
            gather_rows(at<void>(x), pairs_at(pairs, row, 0), columns, static_cast<DType>(dtype), threads,
                        at<void>(out));
        },
        WithoutGil());
    m.def(
        "add_rows",
        [](uintptr_t y, uintptr_t bias, int64_t pairs, uintptr_t row, uintptr_t gate, int64_t columns,
           int dtype, int threads, uintptr_t out) {
            add_rows(at<void>(y), at<void>(bias), pairs_at(pairs, row, gate), columns,
                     static_cast<DType>(dtype), threads, at<float>(out));
        },
        WithoutGil());
    m.def(
        "activate",
        [](uintptr_t bias, int64_t count, int64_t units, int activation, int dtype, int threads,
           uintptr_t hidden, uintptr_t out) {
            activate(at<void>(bias), count, units, static_cast<Activation>(activation),
                     static_cast<DType>(dtype), threads, at<void>(hidden), at<void>(out));
        },
        WithoutGil());
    m.def(
        "activate_backward",
        [](uintptr_t hidden, int64_t pairs, uintptr_t gate, int64_t units, int activation, int dtype,
           int threads, uintptr_t of_units, uintptr_t of_hidden, uintptr_t of_gate) {
            activate_backward(at<void>(hidden), pairs_at(pairs, 0, gate), units,
                              static_cast<Activation>(activation), static_cast<DType>(dtype), threads,
                              at<void>(of_units), at<void>(of_hidden), at<float>(of_gate));
        },
        WithoutGil());
    m.def(
        "sum_rows",
        [](uintptr_t rows, int64_t pairs, uintptr_t gate, int64_t columns, int dtype, int threads,
           uintptr_t out) {
            sum_rows(at<void>(rows), pairs_at(pairs, 0, gate), columns, static_cast<DType>(dtype), threads,
                     at<float>(out));
        },
        WithoutGil());
    m.def(
        "add_dots",
        [](uintptr_t rows, uintptr_t bias, int64_t count, int64_t columns, int dtype, int threads,
           uintptr_t out) {
            add_dots(at<void>(rows), at<void>(bias), count, columns, static_cast<DType>(dtype), threads,
                     at<float>(out));
        },
        WithoutGil());
    m.def("prefer_huge_pages",
          [](uintptr_t memory, int64_t bytes) { prefer_huge_pages(at<void>(memory), bytes); });
}
