// Reads problems (integer? prices? n, then n*n costs, then n prices if any, of 8 bytes) from stdin; for each
// writes n columns, then n prices if any. An argument runs the lanes in the opposite order.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "cuda_runtime.h"
#include "linear_assignment_cuda.h"

int main(int argc, char**) {
    last_lane_first = argc > 1;
    int64_t header[3];
    while (std::fread(header, sizeof(int64_t), 3, stdin) == 3) {
        const int64_t n = header[2];
        std::vector<uint64_t> cost(n * n), prices(header[1] != 0 ? n : 0);
        std::vector<int64_t> column(n, -7);
        if (std::fread(cost.data(), 8, cost.size(), stdin) != cost.size()) return 1;
        if (std::fread(prices.data(), 8, prices.size(), stdin) != prices.size()) return 1;
        switch_moe::linear_assignment_cuda(cost.data(), header[0] != 0, n,
                                           prices.empty() ? nullptr : prices.data(), column.data(), nullptr);
        std::fwrite(column.data(), 8, column.size(), stdout);
        std::fwrite(prices.data(), 8, prices.size(), stdout);
    }
    return 0;
}
