// The CUDA module switch_moe._cuda. Arguments are addresses and sizes; switch_moe checks them before it
// calls.
#include <pybind11/pybind11.h>

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
}
