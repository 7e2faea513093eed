// The part of CUDA's header of this name that the emulator knows (README.md).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)
#define __launch_bounds__(...)

constexpr int warpSize = 32;

using std::max;
using std::min;

// ---- vectors --------------------------------------------------------------------------------------------------------

template <typename T>
struct alignas(2 * sizeof(T)) EmulatorVector2 {
    T x, y;
};
template <typename T>
struct alignas(4 * sizeof(T)) EmulatorVector4 {
    T x, y, z, w;
};
using uint2 = EmulatorVector2<unsigned>;
using uint4 = EmulatorVector4<unsigned>;
using float2 = EmulatorVector2<float>;
using float4 = EmulatorVector4<float>;

// ---- warps and blocks -----------------------------------------------------------------------------------------------

inline void __syncthreads(EMULATOR_SITE) { emulator::meet(emulator::BLOCK, 0, 0, 0, {file, line}); }
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_SITE) { emulator::meet(emulator::WARP, mask, 0, 0, {file, line}); }
inline void __threadfence() {}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
    return unsigned(emulator::meet(emulator::VOTE, mask, predicate != 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int yes, EMULATOR_SITE) { return __ballot_sync(mask, yes, file, line) != 0; }
inline int __all_sync(unsigned mask, int yes, EMULATOR_SITE) { return __ballot_sync(mask, !yes, file, line) == 0; }

namespace emulator {

inline int lane() { return int((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32); }

// A lane gets its own value if `source` is not one of `first` to `end`.
template <typename T>
T shuffle(unsigned mask, T value, int source, int first, int end, Site site) {
    static_assert(sizeof(T) <= 8, "a lane exchanges at most 8 bytes");
    if (source < first || source >= end) source = lane();
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = meet(SHUFFLE, mask, bits, unsigned(source), site);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace emulator

// Another lane of the segment of `width` lanes; with xor also one of an earlier segment
#define EMULATOR_SHUFFLE(name, how, source, first)                                                 \
    template <typename T>                                                                          \
    T __shfl##name##_sync(unsigned mask, T value, how, int width = 32, EMULATOR_SITE) {            \
        [[maybe_unused]] const int lane = emulator::lane(), begin = lane & ~(width - 1);           \
        return emulator::shuffle(mask, value, source, first, begin + width, {file, line});         \
    }
EMULATOR_SHUFFLE(, int from, begin + (from & (width - 1)), begin)
EMULATOR_SHUFFLE(_up, unsigned delta, lane - int(delta), begin)
EMULATOR_SHUFFLE(_down, unsigned delta, lane + int(delta), begin)
EMULATOR_SHUFFLE(_xor, int bits, lane ^ bits, 0)

// ---- memory and arithmetic ------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* address) {
    return *address;
}

template <typename T, typename F>
__attribute__((no_sanitize("thread"))) T emulator_atomic(T* address, F change) {
    emulator::atomic(address, sizeof(T));
    const T before = *address;
    *address = change(before);
    return before;
}
template <typename T>
T atomicAdd(T* address, T value) {
    return emulator_atomic(address, [=](T x) { return T(x + value); });
}
template <typename T>
T atomicExch(T* address, T value) {
    return emulator_atomic(address, [=](T) { return value; });
}

inline float __fdividef(float x, float y) { return x / y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <typename To, typename From>
To emulator_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}
inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }

// ---- on the host ----------------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();       // of the launches since it was asked before
const char* cudaGetErrorString(cudaError_t error);
cudaError_t emulator_set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
    return emulator_set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
    struct Bound {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> arguments;  // every thread gets a copy
    } bound{kernel, {std::forward<Arguments>(given)...}};
    const auto body = [](void* data) {
        std::apply(static_cast<Bound*>(data)->kernel, static_cast<Bound*>(data)->arguments);
    };
    return emulator::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                            reinterpret_cast<const void*>(kernel), {body, &bound, sizeof(bound)});
}

namespace emulator {

// kernel<<<grid, block, shared, stream>>>(arguments) becomes launcher(kernel, grid, block, shared, stream)(arguments).
template <typename... Parameters>
auto launcher(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared = 0, cudaStream_t stream = nullptr) {
    return [=](Parameters... arguments) {
        const cudaLaunchConfig_t config{grid, block, shared, stream};
        cudaLaunchKernelEx(&config, kernel, arguments...);
    };
}

}  // namespace emulator
