// Vectors of floats of a given width. Functions of a kernel that is compiled for an instruction set
// (attribute target) inline what works on them; nothing passes them by value, which would depend on the set.
#pragma once

#include <cstdint>
#include <utility>

#define SWITCH_MOE_INLINE inline __attribute__((always_inline))
#define SWITCH_MOE_UNROLL _Pragma("GCC unroll 16")

namespace switch_moe {

// kSize floats; Loose: anywhere in memory. (GCC 12 takes no size that depends on a template's argument.)
template <int kSize>
struct Floats;
#define SWITCH_MOE_FLOATS(size)                                                            \
    template <>                                                                            \
    struct Floats<size> {                                                                  \
        typedef float Vector __attribute__((vector_size(4 * size)));                       \
        typedef float Loose __attribute__((vector_size(4 * size), aligned(4), may_alias)); \
        typedef int32_t Order __attribute__((vector_size(4 * size)));                      \
    };
SWITCH_MOE_FLOATS(2)
SWITCH_MOE_FLOATS(4)
SWITCH_MOE_FLOATS(8)
SWITCH_MOE_FLOATS(16)
#undef SWITCH_MOE_FLOATS

// low and high halves of a and b, element by element in turns.
#ifdef __clang__
template <typename Vector, int... i>
SWITCH_MOE_INLINE void interleave(const Vector& a, const Vector& b, std::integer_sequence<int, i...>,
                                  Vector& low, Vector& high) {
    constexpr int kSize = sizeof...(i);
    low = __builtin_shufflevector(a, b, (i / 2 + i % 2 * kSize)...);
    high = __builtin_shufflevector(a, b, (i / 2 + i % 2 * kSize + kSize / 2)...);
}
#else
template <typename Vector, int... i>
SWITCH_MOE_INLINE void interleave(const Vector& a, const Vector& b, std::integer_sequence<int, i...>,
                                  Vector& low, Vector& high) {
    constexpr int kSize = sizeof...(i);
    using Order = typename Floats<kSize>::Order;
    low = __builtin_shuffle(a, b, Order{(i / 2 + i % 2 * kSize)...});
    high = __builtin_shuffle(a, b, Order{(i / 2 + i % 2 * kSize + kSize / 2)...});
}
#endif

// In log2(kSize) rounds that interleave row i with row i + kSize / 2.
template <int kSize>
SWITCH_MOE_INLINE void transpose(typename Floats<kSize>::Vector (&rows)[kSize]) {
    SWITCH_MOE_UNROLL
    for (int step = 1; step < kSize; step *= 2) {
        typename Floats<kSize>::Vector next[kSize];
        SWITCH_MOE_UNROLL
        for (int i = 0; i < kSize / 2; ++i) {
            interleave(rows[i], rows[i + kSize / 2], std::make_integer_sequence<int, kSize>(), next[2 * i],
                       next[2 * i + 1]);
        }
        SWITCH_MOE_UNROLL
        for (int i = 0; i < kSize; ++i) rows[i] = next[i];
    }
}

}  // namespace switch_moe
