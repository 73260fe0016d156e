// What all CPU kernels share: the types of the elements they take, and functions compiled for several
// instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

// SWITCH_MOE_VECTORISED marks a function so that one binary serves every x86-64 machine: the compiler makes a
// version of the function, and of what is inlined into it, per instruction set, and the loader picks one. A
// template cannot carry it. (<cstdint> defines __GLIBC__.)
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define SWITCH_MOE_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SWITCH_MOE_VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define SWITCH_MOE_VECTORISED
#endif

namespace switch_moe {

enum class DType : int { float32 = 0, bfloat16 = 1 };

struct BFloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float x, float* out) { *out = x; }
// Rounds to nearest, ties to even. NaN stays NaN.
inline void store(float x, BFloat16* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace switch_moe
