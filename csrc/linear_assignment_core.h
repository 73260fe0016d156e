// The linear assignment algorithm that the CPU runs with a group of one lane and the GPU with a warp.
//
// Every column j has a price v[j], and a row prefers the columns where c[i][j] - v[j] is least. An assignment
// that gives every row a column it prefers is optimal, whatever the prices are, so any prices may start it:
// 1. Rows bid. A row takes the column it prefers and lowers its price until its second choice is as good. A
// row
//    that loses its column bids next. Most rows find their column here.
// 2. For each row that is left, Dijkstra's search finds the cheapest path to a free column. A step from a row
// to
//    column j costs c[i][j] - v[j] less the same for the column that the row has. Then prices move so that
//    rows prefer the columns along the path, and every row on it takes the next column.
//
// A group of lanes solves a problem together. Lane l owns columns l, l + lanes, ... Ties go to a free column,
// then to the lowest, so the result does not depend on the number of lanes. A group type has
//     lanes            the number of its lanes
//     batch            loads that a lane starts together
//     lane()           the index of this lane
//     least(x)         the least x of all lanes
//     all(condition)   whether it holds in all lanes
//     sync()           a barrier that orders memory
//     IndexFor<Value>  the type of a column's index
//     PackedCosts      PackedMatrix<columns>
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#ifdef __CUDACC__
#define SWITCH_MOE_CORE __device__ __forceinline__
#define SWITCH_MOE_UNROLL_ON_GPU _Pragma("unroll")
#define SWITCH_MOE_SIMD(reduction)
#else
#define SWITCH_MOE_CORE inline __attribute__((always_inline))
#define SWITCH_MOE_UNROLL_ON_GPU
#define SWITCH_MOE_PRAGMA(text) _Pragma(#text)
#define SWITCH_MOE_SIMD(reduction) SWITCH_MOE_PRAGMA(omp simd reduction)
#endif

namespace switch_moe {

enum AssignmentStatus : int { kSolved = 0, kNoFiniteTotal = 1, kNotANumber = 2, kTooLarge = 3 };

template <typename T>
struct Range {  // device code may use constants of a class, not call functions of std
    static constexpr bool exact = std::is_integral<T>::value;
    static constexpr T most = std::numeric_limits<T>::max();
    static constexpr T unreached = exact ? most : std::numeric_limits<T>::infinity();
};

// The caller's costs. Like PackedMatrix, it says how many columns a lane owns, and how many of them it reads
// before it writes any, so that the loads overlap.
template <typename Cost>
struct GivenMatrix {
    using Value = Cost;
    static constexpr bool kPacked = false;

    const Cost* cost;  // [n, n]
    int n;

    SWITCH_MOE_CORE int columns() const { return n; }
    template <typename Group>
    SWITCH_MOE_CORE int owned(int lane) const {
        return (n - lane + Group::lanes - 1) / Group::lanes;
    }
    template <typename Group>
    static constexpr int together() {
        return 1;
    }
    SWITCH_MOE_CORE Cost pack(Cost x) const { return x; }
    SWITCH_MOE_CORE Cost unpack(Cost x) const { return x; }
    SWITCH_MOE_CORE const Cost* row(int64_t i) const { return cost + i * n; }
};

// A copy of small integer costs in 31 bits. They are shifted left, and their low bits are room for the
// column's rank in ties, so that one minimum finds the least value and its column. A row has kColumns
// columns, or, where that is 0, as many as fill whole vectors of 16. The columns added are so dear (kFar)
// that no row takes them.
template <int kColumns>
struct PackedMatrix {
    using Value = int32_t;
    static constexpr bool kPacked = true;
    static constexpr Value kFar = 1 << 30;

    Value* cost;  // [n, columns()]
    int n;
    int bits;

    static SWITCH_MOE_CORE int bits_for(int n) {
        int bits = 1;
        while ((1 << bits) < 2 * n) ++bits;
        return bits;
    }
    // The largest cost that may be packed. Sums reach 32 times that, and twice such a sum has to fit (see
    // assign).
    static SWITCH_MOE_CORE int64_t largest(int n) {
        return n > 1 << 20 ? -1 : ((1 << 25) >> bits_for(n)) - 1;
    }

    SWITCH_MOE_CORE int columns() const { return kColumns > 0 ? kColumns : (n + 15) / 16 * 16; }
    template <typename Group>
    SWITCH_MOE_CORE int owned(int) const {
        return columns() / Group::lanes;
    }
    template <typename Group>
    static constexpr int together() {
        return kColumns > 0 ? kColumns / Group::lanes : 1;
    }
    template <typename Cost>
    SWITCH_MOE_CORE Value pack(Cost x) const {
        return static_cast<Value>(static_cast<uint32_t>(x) << bits);
    }
    SWITCH_MOE_CORE Value unpack(Value x) const { return x >> bits; }
    SWITCH_MOE_CORE Value rank_of(Value x) const { return x & ((Value{1} << bits) - 1); }
    SWITCH_MOE_CORE Value* row(int64_t i) const { return cost + i * columns(); }

    template <typename Group, typename Cost>
    SWITCH_MOE_CORE void fill(Group group, const Cost* from) {
        for (int first = 0; first < n; first += Group::batch) {
            SWITCH_MOE_SIMD()
            for (int j = group.lane(); j < n; j += Group::lanes) {
                Value batch[Group::batch];
                SWITCH_MOE_UNROLL_ON_GPU
                for (int b = 0; b < Group::batch; ++b) {
                    const int64_t i = first + b < n ? first + b : n - 1;
                    batch[b] = pack(from[i * n + j]);
                }
                SWITCH_MOE_UNROLL_ON_GPU
                for (int b = 0; b < Group::batch; ++b) row(first + b < n ? first + b : n - 1)[j] = batch[b];
            }
        }
        for (int i = 0; i < n; ++i) {
            for (int j = n + group.lane(); j < columns(); j += Group::lanes) row(i)[j] = kFar;
        }
    }
};

// The memory that a solve needs. Every array has as many entries as there are columns.
template <typename Value, typename Index>
struct AssignmentState {
    static constexpr int64_t kBytes = 2 * sizeof(Value) + 5 * sizeof(Index);

    Value* price;         // by column
    Value* distance;      // by column: from the row at which a search starts
    Index* row_of;        // by column: the row that has it, -1 if it is free
    Index* previous_row;  // by column: the row before it on the path from that start
    Index* seen;          // by column: 1 if the distance is final
    Index* column_of;     // by row
    Index* waiting;       // the rows without a column

    SWITCH_MOE_CORE AssignmentState(char* memory, int columns)
        : price(reinterpret_cast<Value*>(memory)),
          distance(price + columns),
          row_of(reinterpret_cast<Index*>(distance + columns)),
          previous_row(row_of + columns),
          seen(previous_row + columns),
          column_of(seen + columns),
          waiting(column_of + columns) {}
};

template <typename Group, typename Matrix>
class Assignment {
  public:
    using Value = typename Matrix::Value;
    using Index = typename Group::template IndexFor<Value>;

    SWITCH_MOE_CORE Assignment(Group group, Matrix costs, char* memory)
        : group_(group), costs_(costs), n_(costs.n), s_(memory, costs.columns()) {}

    // Writes the final prices to `prices` [n], unless it is null, shifted so that the largest is 0. Where
    // `warm`, the solve starts from what `prices` holds.
    template <typename Cost>
    SWITCH_MOE_CORE int solve(Cost* prices, bool warm, int64_t* column) {
        for (Index k = 0; k < owned(); ++k) {
            const Index j = own(k);
            s_.row_of[j] = -1;
            s_.waiting[j] = j;
            s_.price[j] = 0;
            if (warm && j < n_) s_.price[j] = costs_.pack(prices[j]);
        }
        if (!warm && !take_lowest_costs()) return kNoFiniteTotal;
        group_.sync();
        const Index waiting = bid(warm);
        if (waiting < 0) return kNoFiniteTotal;
        for (Index w = 0; w < waiting; ++w) {
            if (!augment(s_.waiting[w])) return kNoFiniteTotal;
        }
        for (Index j = group_.lane(); j < n_; j += Group::lanes) column[j] = s_.column_of[j];
        if (prices != nullptr) write(prices);
        return kSolved;
    }

  private:
    static constexpr bool kPacked = Matrix::kPacked;
    static constexpr bool kExact = Range<Value>::exact;
    static constexpr Value kUnreached = Range<Value>::unreached;
    static constexpr int kTogether = Matrix::template together<Group>();

    struct Nearest {
        Value value;
        Index column;
        bool free;
    };

    // How many columns this lane owns, and which is the k-th of them.
    SWITCH_MOE_CORE Index owned() const { return costs_.template owned<Group>(group_.lane()); }
    SWITCH_MOE_CORE Index own(Index k) const { return group_.lane() + k * Group::lanes; }

    // Orders columns at the same value: free ones are first.
    SWITCH_MOE_CORE Index rank(Index j) const { return s_.row_of[j] < 0 ? j : j + n_; }

    SWITCH_MOE_CORE Nearest at_rank(Value value, Index rank) const {
        return {value, rank < n_ ? rank : rank - n_, rank < n_};
    }

    // Returns the column of the lowest rank among those at the least value.
    template <typename IsLeast>
    SWITCH_MOE_CORE Nearest first_of(Value least, IsLeast is_least) const {
        Index found = 2 * n_;
        SWITCH_MOE_SIMD(reduction(min : found))
        for (Index k = 0; k < owned(); ++k) {
            const Index j = own(k);
            const Index at = is_least(j) ? rank(j) : 2 * n_;
            found = at < found ? at : found;
        }
        return at_rank(least, group_.least(found));
    }

    // Prices every column at its least cost. Returns false where a column has no finite cost.
    SWITCH_MOE_CORE bool take_lowest_costs() {
        SWITCH_MOE_SIMD()
        for (Index j = group_.lane(); j < n_; j += Group::lanes) s_.price[j] = costs_.row(0)[j];
        for (Index first = 1; first < n_; first += Group::batch) {
            SWITCH_MOE_SIMD()
            for (Index j = group_.lane(); j < n_; j += Group::lanes) {
                Value low = s_.price[j];
                SWITCH_MOE_UNROLL_ON_GPU
                for (int b = 0; b < Group::batch; ++b) {
                    const Value c = costs_.row(first + b < n_ ? first + b : n_ - 1)[j];
                    low = c < low ? c : low;
                }
                s_.price[j] = low;
            }
        }
        bool finite = true;
        for (Index j = group_.lane(); j < n_; j += Group::lanes) {
            finite = finite & (s_.price[j] < kUnreached);
        }
        return group_.all(finite);
    }

    // The column that a row prefers.
    SWITCH_MOE_CORE Nearest preferred(const Value* c) const {
        Value least = kUnreached;
        SWITCH_MOE_SIMD(reduction(min : least))
        for (Index k = 0; k < owned(); ++k) {
            const Index j = own(k);
            Value x = c[j] - s_.price[j];
            if (kPacked) x += rank(j);
            least = x < least ? x : least;
        }
        least = group_.least(least);
        if constexpr (kPacked) return unpack(least);
        return first_of(least, [&](Index j) { return c[j] - s_.price[j] == least; });
    }

    SWITCH_MOE_CORE Nearest unpack(Value packed) const {
        const Value rank = costs_.rank_of(packed);
        return at_rank(packed - rank, rank);
    }

    // The value of a row's second choice.
    SWITCH_MOE_CORE Value second_choice(const Value* c, Index first) const {
        Value least = kUnreached;
        SWITCH_MOE_SIMD(reduction(min : least))
        for (Index k = 0; k < owned(); ++k) {
            const Index j = own(k);
            const Value x = j == first ? kUnreached : c[j] - s_.price[j];
            least = x < least ? x : least;
        }
        return group_.least(least);
    }

    // Returns how many rows it leaves in state.waiting, or -1 where a row has no finite cost. A row that
    // loses its column to one of the first n bids bids again at once. Later losers wait for the second pass,
    // where they bid once: more bids cost more than the searches they save. Warm prices are lowered only to
    // win a column, for they are near their final values already.
    SWITCH_MOE_CORE Index bid(bool warm) {
        Index waiting = n_, bids = 0;
        for (int pass = 0; pass < 2; ++pass) {
            Index left = 0;
            for (Index w = 0; w < waiting; ++w) {
                for (Index row = s_.waiting[w]; row >= 0; ++bids) {
                    const Value* c = costs_.row(row);
                    const Nearest best = preferred(c);
                    if (best.value == kUnreached) return -1;
                    const Value second = warm && best.free ? best.value : second_choice(c, best.column);
                    const bool lower = best.value < second && second < kUnreached;
                    const bool wins = best.free || lower;
                    const Index loser = !wins ? row : best.free ? -1 : s_.row_of[best.column];
                    const bool again = wins && loser >= 0 && bids < n_;
                    const bool waits = loser >= 0 && !again;
                    group_.sync();
                    if (group_.lane() == 0) {
                        if (lower) s_.price[best.column] -= second - best.value;
                        if (wins) {
                            s_.row_of[best.column] = row;
                            s_.column_of[row] = best.column;
                        }
                        if (waits) s_.waiting[left] = loser;
                    }
                    group_.sync();
                    left += waits;
                    row = again ? loser : -1;
                }
            }
            waiting = left;
        }
        return waiting;
    }

    // Takes one step of the search: it shortens distances by way of `row`, whose own column is at distance
    // `shortest`, and returns the nearest column whose distance is not final.
    SWITCH_MOE_CORE Nearest relax(Index row, Value shortest, Value shift) {
        const Value* c = costs_.row(row);
        Value least = kUnreached;
        SWITCH_MOE_SIMD(reduction(min : least))
        for (Index k = 0; k < owned(); k += kTogether) {
            Value nearest[kTogether];
            Index previous[kTogether];
            SWITCH_MOE_UNROLL_ON_GPU
            for (int t = 0; t < kTogether; ++t) {
                const Index j = own(k + t);
                const bool open = s_.seen[j] == 0;
                const Value distance = s_.distance[j];
                Value through = c[j] - s_.price[j] + shift;
                if (!kExact) through = through > shortest ? through : shortest;  // rounding may undercut it
                const bool nearer = (through < distance) & open;
                nearest[t] = nearer ? through : distance;
                previous[t] = nearer ? row : s_.previous_row[j];
                Value ranked = nearest[t];
                if (kPacked) ranked += rank(j);
                ranked = open ? ranked : kUnreached;
                least = ranked < least ? ranked : least;
            }
            SWITCH_MOE_UNROLL_ON_GPU
            for (int t = 0; t < kTogether; ++t) {
                s_.distance[own(k + t)] = nearest[t];
                s_.previous_row[own(k + t)] = previous[t];
            }
        }
        least = group_.least(least);
        if constexpr (kPacked) return unpack(least);
        return first_of(least, [&](Index j) { return s_.distance[j] == least && s_.seen[j] == 0; });
    }

    // Gives the row `start` a column by the cheapest path to a free one. Returns false where it reaches none.
    SWITCH_MOE_CORE bool augment(Index start) {
        const Value* c = costs_.row(start);
        SWITCH_MOE_SIMD()
        for (Index k = 0; k < owned(); ++k) {
            const Index j = own(k);
            s_.distance[j] = c[j] - s_.price[j];
            s_.previous_row[j] = start;
            s_.seen[j] = 0;
        }
        Nearest near = preferred(c);
        while (!near.free) {
            if (near.value == kUnreached) return false;
            const Index row = s_.row_of[near.column];
            const Value held = costs_.row(row)[near.column] - s_.price[near.column];
            if (group_.lane() == near.column % Group::lanes) s_.seen[near.column] = 1;
            near = relax(row, near.value, near.value - held);
        }
        if (near.value == kUnreached) return false;
        for (Index k = 0; k < owned(); ++k) {
            const Index j = own(k);
            if (s_.seen[j] != 0) s_.price[j] -= near.value - s_.distance[j];
        }
        group_.sync();
        if (group_.lane() == 0) {
            Index row = -1;
            for (Index j = near.column; row != start;) {
                row = s_.previous_row[j];
                s_.row_of[j] = row;
                const Index next = s_.column_of[row];
                s_.column_of[row] = j;
                j = next;
            }
        }
        group_.sync();
        return true;
    }

    template <typename Cost>
    SWITCH_MOE_CORE void write(Cost* prices) const {
        Value least = kUnreached;
        for (Index j = group_.lane(); j < n_; j += Group::lanes) {
            least = -s_.price[j] < least ? -s_.price[j] : least;
        }
        least = group_.least(least);
        for (Index j = group_.lane(); j < n_; j += Group::lanes) {
            prices[j] = costs_.unpack(s_.price[j] + least);
        }
    }

    Group group_;
    Matrix costs_;
    Index n_;
    AssignmentState<Value, Index> s_;
};

// Writes the column of each row to column[n] and the final prices to prices[n], if there are any. On failure
// it returns the reason and writes nothing. The solve starts from `prices`, unless all are zero, or one is
// NaN or too far from the costs to be of use. `packed` is room for n rows of Group::PackedCosts and may be
// null.
//
// Nothing overflows: with C = max |cost| and V = max |price| at the start, no value is beyond 8 C + 6 V.
// While a column is free its price stays, so |v| <= 2 C + V and no distance is beyond 5 C + 3 V; the last
// search lowers prices to -4 C - 3 V, and writing the largest as 0 doubles that.
template <typename Group, typename Cost>
SWITCH_MOE_CORE int assign(Group group, const Cost* cost, int n, char* memory, int32_t* packed, Cost* prices,
                           int64_t* column) {
    constexpr bool exact = Range<Cost>::exact;
    constexpr Cost most = Range<Cost>::most;
    Cost low = most, negated = most;  // the least cost and the least -cost
    bool numbers = true;
    const int64_t size = static_cast<int64_t>(n) * n;
    SWITCH_MOE_SIMD(reduction(min : low, negated) reduction(& : numbers))
    for (int64_t first = group.lane(); first < size; first += Group::lanes * Group::batch) {
        Cost batch[Group::batch];
        SWITCH_MOE_UNROLL_ON_GPU
        for (int b = 0; b < Group::batch; ++b) {
            const int64_t i = first + b * Group::lanes;
            batch[b] = cost[i < size ? i : size - 1];
        }
        SWITCH_MOE_UNROLL_ON_GPU
        for (int b = 0; b < Group::batch; ++b) {
            const Cost c = batch[b];
            low = c < low ? c : low;
            if constexpr (exact) {
                negated = ~c < negated ? ~c : negated;  // -c - 1, which cannot overflow
            } else {
                negated = (-c < negated) & (c <= most) ? -c : negated;
                numbers = numbers & (c >= -most);
            }
        }
    }
    if (!group.all(numbers)) return kNotANumber;
    low = group.least(low);
    negated = group.least(negated) + (exact ? 1 : 0);
    if (exact && (low < -(most / 8 / n) || negated < -(most / 8 / n))) return kTooLarge;
    const Cost largest = low < negated ? -low : -negated;

    bool warm = prices != nullptr;
    if (warm) {
        const Cost bound = largest > most / 64 ? most / 16 : 4 * largest;
        bool usable = true, zero = true;
        for (int j = group.lane(); j < n; j += Group::lanes) {
            usable = usable & (prices[j] <= bound) & (prices[j] >= -bound);
            zero = zero & (prices[j] == 0);
        }
        usable = group.all(usable);
        warm = usable && !group.all(zero);
    }
    if constexpr (exact) {
        using Packed = typename Group::PackedCosts;
        if (packed != nullptr && largest <= Packed::largest(n)) {
            Packed costs{packed, n, Packed::bits_for(n)};
            costs.fill(group, cost);
            return Assignment<Group, Packed>(group, costs, memory).solve(prices, warm, column);
        }
    }
    return Assignment<Group, GivenMatrix<Cost>>(group, {cost, n}, memory).solve(prices, warm, column);
}

}  // namespace switch_moe
