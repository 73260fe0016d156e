// Reads problems (integer? n, then n*n costs of 8 bytes) from stdin, writes n columns of 8 bytes for each.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "linear_assignment_cuda.h"

int main() {
    int64_t header[2];
    while (std::fread(header, sizeof(int64_t), 2, stdin) == 2) {
        const int64_t n = header[1];
        std::vector<uint64_t> cost(n * n);
        std::vector<int64_t> column(n, -7);
        if (std::fread(cost.data(), 8, cost.size(), stdin) != cost.size()) return 1;
        switch_moe::linear_assignment_cuda(cost.data(), header[0] != 0, n, column.data(), nullptr);
        std::fwrite(column.data(), 8, column.size(), stdout);
    }
    return 0;
}
