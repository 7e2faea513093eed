// Instructions of the GPU that C++ has no name for, and what they mean.
#pragma once

#include <cuda_runtime.h>

namespace {

// 2^x, to 2 units in the last place; one instruction, for which subnormal numbers are zero
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
#ifdef __CUDACC__
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
#else
    y = exp2f(x);
    if (y < 1.17549435e-38f) y = 0.0f;
#endif
    return y;
}

// Ask for what the next tile will need; the data waits in the second-level cache, not in registers.
__device__ __forceinline__ void prefetch(const void* address) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
    __builtin_prefetch(address);
#endif
}

// The same address, of which the compiler knows nothing else. It would otherwise keep address + 1, address + 2, ... in
// registers through a whole loop, or move them to memory, instead of adding the constants where they are used.
template <typename T>
__device__ __forceinline__ T* here(T* address) {
#ifdef __CUDACC__
    asm("" : "+l"(address));
#endif
    return address;
}

}  // namespace
