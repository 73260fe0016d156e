#include "linear_assignment.h"

#include <memory>
#include <type_traits>

#include "cpu.h"
#include "linear_assignment_core.h"

namespace switch_moe {
namespace {

struct OneLane {
    static constexpr int lanes = 1, batch = 1;
    using PackedCosts = PackedMatrix<0>;
    template <typename Value>  // as wide as the values, which lets the compiler vectorise loops over both
    using IndexFor = std::conditional_t<sizeof(Value) == 4, int32_t, int64_t>;

    static constexpr int lane() { return 0; }
    template <typename T>
    static constexpr T least(T x) {
        return x;
    }
    static constexpr bool all(bool condition) { return condition; }
    static constexpr void sync() {}
};

// Allocates the widest state, with 64-bit values and indices, which serves every solve.
std::unique_ptr<char[]> state_for(int64_t columns) {
    return std::unique_ptr<char[]>(new char[AssignmentState<int64_t, int64_t>::kBytes * columns]);
}

}  // namespace

SWITCH_MOE_VECTORISED
int linear_assignment(const double* cost, int64_t n, double* prices, int64_t* column) {
    if (n == 0) return kSolved;
    const int rows = static_cast<int>(n);
    return assign(OneLane(), cost, rows, state_for(n).get(), nullptr, prices, column);
}

SWITCH_MOE_VECTORISED
int linear_assignment(const int64_t* cost, int64_t n, int64_t* prices, int64_t* column) {
    if (n == 0) return kSolved;
    const int rows = static_cast<int>(n);
    const int columns = PackedMatrix<0>{nullptr, rows, 0}.columns();
    const std::unique_ptr<int32_t[]> packed(new int32_t[n * columns]);
    return assign(OneLane(), cost, rows, state_for(columns).get(), packed.get(), prices, column);
}

}  // namespace switch_moe
