// From the arguments of a call to a launch, on the host: what would read or write beyond its tensors is refused.
#pragma once

#include "interface.cuh"

namespace {

template <typename T>
constexpr int64_t DTYPE = FLOAT32;
template <>
constexpr int64_t DTYPE<__half> = FLOAT16;
template <>
constexpr int64_t DTYPE<__nv_bfloat16> = BFLOAT16;

// Blocks of channels of one sample and group
inline int64_t blocks_of_group(const ScanArguments& a) {
    const int64_t per_block = a.warps * (32 / a.lanes), per_group = a.dim / a.groups;
    return (per_group + per_block - 1) / per_block;
}

inline void check_map(
    Check& c, const char* name, const Map& map, int64_t dtype, const ScanArguments& a, int64_t channels) {
    const int64_t shape[] = {a.batch, channels, a.length};
    c.dtype(name, map.dtype, dtype);
    c.shape(name, map.size, shape);
}

// What both directions read, and sizes of blocks.
template <typename T>
Check check_inputs(const ScanArguments& a, int most_threads, int64_t floats_of_warp) {
    Check c;
    c.that(a.groups >= 1 && a.dim % a.groups == 0, "%lld groups do not divide %lld channels", (long long)a.groups,
           (long long)a.dim);
    c.that(a.state >= 1 && a.state <= MAX_STATE, "the state size is %lld, not 1 to %d", (long long)a.state, MAX_STATE);
    c.that(a.repeat >= 1 && a.dim % a.repeat == 0, "%lld channels do not share a step size evenly", (long long)a.repeat);
    c.that(a.dim <= INT32_MAX / 2 && a.length <= INT32_MAX / 2, "%lld channels or %lld tokens are too many",
           (long long)a.dim, (long long)a.length);
    c.that(a.lanes == 8 || a.lanes == 32, "a channel has %d lanes, not 8 or 32", a.lanes);
    c.that(a.vector >= 1 && K % a.vector == 0, "rows are aligned to %d elements", a.vector);
    c.that(a.warps >= 1 && 32 * a.warps <= most_threads, "a block has %d warps", a.warps);
    c.that(a.warps * floats_of_warp * 4 <= SHARED_BYTES, "%d warps have no room in shared memory", a.warps);
    if (c.problem()) return c;
    check_map(c, "u", a.u, DTYPE<T>, a, a.dim);
    check_map(c, "delta", a.delta, DTYPE<T>, a, a.dim / a.repeat);
    if (a.z.data || a.z.dtype != ABSENT) check_map(c, "z", a.z, DTYPE<T>, a, a.dim);
    const int64_t shape[] = {a.batch, a.groups, a.state, a.length};
    for (const StateMap* map : {&a.B, &a.C}) {
        const char* const name = map == &a.B ? "B" : "C";
        c.dtype(name, map->dtype, DTYPE<T>);
        c.shape(name, map->size, shape);
    }
    c.buffer("A", a.A, FLOAT32, a.dim * a.state);
    c.optional("D", a.D, FLOAT32, a.dim);
    c.optional("delta_bias", a.bias, FLOAT32, a.dim / a.repeat);
    return c;
}

inline void check_states(Check& c, const ScanArguments& a) {
    c.buffer("states", a.states, FLOAT32, ((a.length + CHUNK - 1) / CHUNK + 1) * a.batch * a.dim * a.state);
}

// Null, or what went wrong.
inline const char* launch(void (*kernel)(ScanArguments), const ScanArguments& a, int64_t floats_of_warp) {
    const int64_t blocks = a.batch * a.groups * blocks_of_group(a);
    if (blocks == 0) return nullptr;
    if (blocks > INT32_MAX) return "too many blocks of channels";
    cudaError_t status = cudaSetDevice(a.device);  // the runtime of this library is not that of PyTorch
    if (status == cudaSuccess) {
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(unsigned(blocks));
        config.blockDim = dim3(32 * a.warps);
        config.dynamicSmemBytes = size_t(a.warps * floats_of_warp) * sizeof(float);
        config.stream = a.stream;
        status = cudaLaunchKernelEx(&config, kernel, a);
    }
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace
