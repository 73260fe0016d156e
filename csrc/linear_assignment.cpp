#include "linear_assignment.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

namespace switch_moe {
namespace {

// The duals u (rows) and v (columns) keep cost - u - v >= 0, with equality on assigned pairs. For every row a
// Dijkstra search over reduced costs finds the cheapest path to a free column; then the duals move and the
// path is flipped.
template <typename Cost>
bool solve(const Cost* cost, int64_t n, int64_t* column) {
    using Limits = std::numeric_limits<Cost>;
    const Cost unreached = Limits::has_infinity ? Limits::infinity() : Limits::max();
    std::vector<Cost> u(n, 0), v(n, 0), distance(n);
    std::vector<int64_t> row_of(n, -1), previous_row(n), open(n);
    std::vector<char> seen(n);
    std::fill(column, column + n, -1);

    for (int64_t start = 0; start < n; ++start) {
        std::fill(distance.begin(), distance.end(), unreached);
        std::fill(seen.begin(), seen.end(), 0);
        int64_t open_count = n;
        for (int64_t j = 0; j < n; ++j) open[j] = j;

        Cost shortest = 0;
        int64_t row = start, sink = -1;
        while (sink < 0) {
            Cost best = unreached;
            int64_t best_at = -1;
            for (int64_t o = 0; o < open_count; ++o) {
                const int64_t j = open[o];
                const Cost through = shortest + cost[row * n + j] - u[row] - v[j];
                if (through < distance[j]) {
                    distance[j] = through;
                    previous_row[j] = row;
                }
                // Among equally near columns a free one ends the search at once.
                if (distance[j] < best || (distance[j] == best && best != unreached && row_of[j] < 0)) {
                    best = distance[j];
                    best_at = o;
                }
            }
            if (best_at < 0) return false;
            shortest = best;
            const int64_t j = open[best_at];
            seen[j] = 1;
            open[best_at] = open[--open_count];
            if (row_of[j] < 0) {
                sink = j;
            } else {
                row = row_of[j];
            }
        }

        // A seen column and the row that holds it move together; the sink has no row yet.
        u[start] += shortest;
        for (int64_t j = 0; j < n; ++j) {
            if (!seen[j]) continue;
            v[j] -= shortest - distance[j];
            if (row_of[j] >= 0) u[row_of[j]] += shortest - distance[j];
        }
        for (int64_t j = sink, i = -1; i != start;) {
            i = previous_row[j];
            row_of[j] = i;
            std::swap(column[i], j);
        }
    }
    return true;
}

}  // namespace

bool linear_assignment(const double* cost, int64_t n, int64_t* column) { return solve(cost, n, column); }

bool linear_assignment(const int64_t* cost, int64_t n, int64_t* column) { return solve(cost, n, column); }

}  // namespace switch_moe
