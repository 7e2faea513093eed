// What depends on the compiler and the processor: inlining, exports, and versions for several instruction sets.
#pragma once

#define SSM_INLINE static inline __attribute__((always_inline))
#define SSM_EXPORT __attribute__((visibility("default")))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SSM_HAS_TARGETS 1
// Versions of a function for AVX-512, AVX2 and the rest, chosen when the library is loaded: for loops that the compiler
// makes vectors of. Kernels that name their vectors are compiled by for_each_target.h instead.
#define SSM_VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SSM_HAS_TARGETS 0
#define SSM_VERSIONS
#endif
