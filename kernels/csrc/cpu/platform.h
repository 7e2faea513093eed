// What depends on the compiler and the processor: inlining, exports, and versions for several instruction sets.
#pragma once

#define SSM_ALWAYS __attribute__((always_inline))  // of a lambda, behind its parameters
#define SSM_INLINE static inline SSM_ALWAYS
#define SSM_EXPORT __attribute__((visibility("default")))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SSM_HAS_TARGETS 1
#include <immintrin.h>
// Versions of a function for AVX-512, AVX2 and the rest, chosen when the library is loaded: for loops that the compiler
// makes vectors of. Kernels that name their vectors are compiled by for_each_target.h instead.
#define SSM_VERSIONS __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define SSM_HAS_TARGETS 0
#define SSM_VERSIONS
#endif

// While it lives, this thread takes numbers below the normal ones (1e-38) for 0, on x86-64. States and their gradients
// that nothing feeds fade into such numbers, for each of which the processor takes a hundred times as long.
class FadeToZero {
#if SSM_HAS_TARGETS
  public:
    FadeToZero() : before(_mm_getcsr()) { _mm_setcsr(before | 0x8040); }  // of results, and of what is read
    ~FadeToZero() { _mm_setcsr(before); }
    FadeToZero(const FadeToZero&) = delete;

  private:
    unsigned before;
#else
  public:
    FadeToZero() {}
#endif
};

// The numbers of vectors x and y, counted on from x to y, in the order of the indices; Mask is a vector of integers.
#if defined(__clang__)
#define SSM_SHUFFLE(Mask, x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SSM_SHUFFLE(Mask, x, y, ...) __builtin_shuffle(x, y, Mask{__VA_ARGS__})
#endif
