// Vectors of a given number of elements, for functions that are compiled for one instruction set (attribute
// target). Whatever works on vectors is inlined into those functions. Nothing passes a vector by value,
// because how that is done depends on the instruction set.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu.h"

#define SWITCH_MOE_INLINE inline __attribute__((always_inline))
#define SWITCH_MOE_UNROLL _Pragma("GCC unroll 16")

// The kernels for bfloat16 are compiled only where the compiler knows AVX512-BF16.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define SWITCH_MOE_AVX512_BF16
#endif

namespace switch_moe {

// VectorOf<T, kSize>::Vector has kSize elements of type T. A Loose one is the same vector at any address,
// without alignment. Each size is spelled out, because GCC 12 takes none that depends on a template's
// argument.
template <typename T, int kSize>
struct VectorOf;
#define SWITCH_MOE_VECTOR(T, size)                                                             \
    template <>                                                                                \
    struct VectorOf<T, size> {                                                                 \
        typedef T Vector __attribute__((vector_size(sizeof(T) * size)));                       \
        typedef T Loose __attribute__((vector_size(sizeof(T) * size), aligned(1), may_alias)); \
    };
#define SWITCH_MOE_VECTOR_OF(T) \
    SWITCH_MOE_VECTOR(T, 2) SWITCH_MOE_VECTOR(T, 4) SWITCH_MOE_VECTOR(T, 8) SWITCH_MOE_VECTOR(T, 16)
SWITCH_MOE_VECTOR_OF(float)
SWITCH_MOE_VECTOR_OF(uint32_t)
SWITCH_MOE_VECTOR_OF(uint16_t)
SWITCH_MOE_VECTOR(uint16_t, 32)
#undef SWITCH_MOE_VECTOR_OF
#undef SWITCH_MOE_VECTOR

template <int kSize>
using Floats = typename VectorOf<float, kSize>::Vector;
template <int kSize>
using Words = typename VectorOf<uint32_t, kSize>::Vector;

template <int kSize>
SWITCH_MOE_INLINE void load(const float* from, Floats<kSize>& to) {
    to = *reinterpret_cast<const typename VectorOf<float, kSize>::Loose*>(from);
}

template <int kSize>
SWITCH_MOE_INLINE void save(const Floats<kSize>& from, float* to) {
    *reinterpret_cast<typename VectorOf<float, kSize>::Loose*>(to) = from;
}

template <int... order, typename Vector>
SWITCH_MOE_INLINE void shuffle(const Vector& a, const Vector& b, Vector& to) {
#ifdef __clang__
    to = __builtin_shufflevector(a, b, order...);
#else
    to = __builtin_shuffle(a, b, decltype(a == b){order...});
#endif
}

// Takes the elements of a and b in turns. `low` gets what comes of their lower halves, `high` of their upper.
template <typename Vector, int... i>
SWITCH_MOE_INLINE void interleave(const Vector& a, const Vector& b, std::integer_sequence<int, i...>,
                                  Vector& low, Vector& high) {
    constexpr int kSize = sizeof...(i);
    shuffle<(i / 2 + i % 2 * kSize)...>(a, b, low);
    shuffle<(i / 2 + i % 2 * kSize + kSize / 2)...>(a, b, high);
}

// Transposes a square in log2(kSize) rounds. Each of them interleaves row i with row i + kSize / 2.
template <typename Vector, int kSize>
SWITCH_MOE_INLINE void transpose(Vector (&rows)[kSize]) {
    SWITCH_MOE_UNROLL
    for (int step = 1; step < kSize; step *= 2) {
        Vector next[kSize];
        SWITCH_MOE_UNROLL
        for (int i = 0; i < kSize / 2; ++i) {
            interleave(rows[i], rows[i + kSize / 2], std::make_integer_sequence<int, kSize>(), next[2 * i],
                       next[2 * i + 1]);
        }
        SWITCH_MOE_UNROLL
        for (int i = 0; i < kSize; ++i) rows[i] = next[i];
    }
}

// Loads bfloat16 into words. Each is the lower half of its word.
template <int kSize>
SWITCH_MOE_INLINE void load_words(const BFloat16* from, Words<kSize>& to);

#ifdef SWITCH_MOE_AVX512_BF16
template <int kSize>
SWITCH_MOE_INLINE void load_words(const BFloat16* from, Words<kSize>& to) {
    using Halves = typename VectorOf<uint16_t, kSize>::Loose;
    const Halves* halves = reinterpret_cast<const Halves*>(from);
    Words<kSize> words;  // GCC 12 would widen 16 elements in two halves
    asm("vpmovzxwd %1, %0" : "=v"(words) : "m"(*halves));
    to = words;
}

template <int kSize>
SWITCH_MOE_INLINE void load(const BFloat16* from, Floats<kSize>& to) {
    Words<kSize> words;
    load_words<kSize>(from, words);
    to = reinterpret_cast<Floats<kSize>>(words << 16);
}

// Rounds to nearest, ties to even, with the instructions of AVX512-BF16, which take denormal numbers for
// zero.
template <int kSize>
SWITCH_MOE_INLINE void save(const Floats<kSize>& from, BFloat16* to) {
    typename VectorOf<uint16_t, kSize>::Vector halves;
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(from));
    *reinterpret_cast<typename VectorOf<uint16_t, kSize>::Loose*>(to) = halves;
}

template <int... i>
SWITCH_MOE_INLINE void join(const Floats<16>& first, const Floats<16>& second,
                            std::integer_sequence<int, i...>, Words<16>& to) {
    typename VectorOf<uint16_t, 32>::Vector halves;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(first), "v"(second));
    shuffle<(i / 2 + i % 2 * 16)...>(halves, halves, halves);
    to = reinterpret_cast<Words<16>>(halves);
}

// Rounds to bfloat16 and joins two of them in each word, a lower and an upper half.
SWITCH_MOE_INLINE void join(const Floats<16>& lower, const Floats<16>& upper, Words<16>& to) {
    join(lower, upper, std::make_integer_sequence<int, 32>(), to);
}
#endif

}  // namespace switch_moe
