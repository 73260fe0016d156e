// SWITCH_MOE_VECTORISED: one binary for every x86-64 machine. The compiler makes a version of the function,
// and of what is inlined into it, per instruction set, and the loader picks. Not for templates.
#pragma once

#include <cstdint>  // defines __GLIBC__

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define SWITCH_MOE_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SWITCH_MOE_VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define SWITCH_MOE_VECTORISED
#endif
