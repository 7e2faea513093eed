// The forward kernel and its launch; the plan is in selective_scan.cuh.
#pragma once

#include "launch.cuh"
#include "selective_scan.cuh"

namespace {

// Shared memory: of every warp (N, 32 / R), FORWARD_ROWS times.
__host__ __device__ constexpr int64_t forward_floats(int64_t state, int channels) { return FORWARD_ROWS * state * channels; }

template <typename T, int R, bool KEEPS>
__global__ void __launch_bounds__(FORWARD_THREADS, 3) forward_kernel(const __grid_constant__ Args a) {
    constexpr int CHANNELS = 32 / R, TILE = R * K;
    extern __shared__ float shared[];
    const Place<R> k(a);
    const int N = int(a.state);
    const int length = int(a.length), group_dim = per_group(a);
    const int64_t chunk_stride = a.batch * a.dim * a.state;

    float* const A2 = shared + k.warp * forward_floats(N, CHANNELS) + k.slot;  // A log2(e); [n * CHANNELS]
    float* const carry = A2 + N * CHANNELS;                                     // the state before the tile
    float* const states = KEEPS ? saved(a, k) : nullptr;
#pragma unroll 1
    for (int n = k.run; n < N; n += R) {
        A2[n * CHANNELS] = k.exists ? a.A[int64_t(k.channel) * N + n] * LOG2E : 0.0f;
        carry[n * CHANNELS] = 0.0f;
        if (KEEPS && k.exists) states[int64_t(n) * group_dim] = 0.0f;
    }
    __syncwarp();

    const T* const u_row = row<T>(a.u, k.sample, k.channel);
    const T* const delta_row = row<T>(a.delta, k.sample, delta_channel(a, k.channel));
    const T* const B_rows = row<T>(a.B, k.sample, k.group);
    const T* const C_rows = row<T>(a.C, k.sample, k.group);
    const int64_t out_row = (int64_t(k.sample) * a.dim + k.channel) * a.length;
    const float skip = a.D ? a.D[k.channel] : 0.0f, bias = a.bias ? a.bias[delta_channel(a, k.channel)] : 0.0f;

    for (int start = 0; start < length; start += TILE) {
        const int t = start + k.run * K;
        const int tokens = count_tokens(t, length), own = k.exists ? tokens : 0;
        if (k.exists && t + TILE < length) {
            prefetch(u_row + t + TILE);
            prefetch(delta_row + t + TILE);
        }
        Run dt, dtu, y;
        load_run(u_row + t, own, a.vector, y);
        load_run(delta_row + t, own, a.vector, dt);
        step_sizes(dt, bias, a.softplus, own);
#pragma unroll
        for (int j = 0; j < K; j++) {
            dtu[j] = dt[j] * y[j];
            y[j] *= skip;
        }

        const T *B_row = B_rows + t, *C_row = C_rows + t;
        const int chunk = t / CHUNK;
        const bool saves = k.exists && k.run % RUNS == RUNS - 1 && chunk * CHUNK < length;
        float* save = KEEPS ? states + (chunk + 1) * chunk_stride : nullptr;
#pragma unroll 1
        for (int n = 0; n < N; n++) {
            Run B, C, decay;
            load_run(B_row, tokens, a.vector, B);
            load_run(C_row, tokens, a.vector, C);
            const float A = A2[n * CHANNELS], first = carry[n * CHANNELS];
            float p = 1.0f, q = 0.0f;
#pragma unroll
            for (int j = 0; j < K; j++) {
                decay[j] = exp2_fast(dt[j] * A);
                B[j] *= dtu[j];
                p *= decay[j];
                q = decay[j] * q + B[j];
            }
            float h = enter_forward<R>(p, q, first, k.run);
#pragma unroll
            for (int j = 0; j < K; j++) {
                h = decay[j] * h + B[j];
                y[j] += h * C[j];
            }
            if (k.run == R - 1) carry[n * CHANNELS] = h;
            if (KEEPS && saves) *save = h;
            B_row += a.B.state, C_row += a.C.state;
            if (KEEPS) save += group_dim;
        }
        __syncwarp();  // the next tile begins with what the last lane has written

        if (a.z.data) {
            Run z;
            load_run(row<T>(a.z, k.sample, k.channel) + t, own, a.vector, z);
#pragma unroll
            for (int j = 0; j < K; j++) y[j] *= z[j] * sigmoid(z[j]);
        }
        if (a.wide)
            store_run(y, own, a.vector, static_cast<float*>(a.out.data) + out_row + t);
        else
            store_run(y, own, a.vector, static_cast<T*>(a.out.data) + out_row + t);
    }
#pragma unroll 1
    for (int n = k.run; n < N; n += R)
        if (k.exists) a.last[(int64_t(k.sample) * a.dim + k.channel) * N + n] = carry[n * CHANNELS];
}

template <typename T, int R>
const char* forward(const Args& a) {
    Check c = check_inputs<T>(a, FORWARD_THREADS, forward_floats(a.state, 32 / R));
    c.buffer("out", a.out, a.wide ? FLOAT32 : DTYPE<T>, a.batch * a.dim * a.length);
    c.buffer("last", a.last, FLOAT32, a.batch * a.dim * a.state);
    const bool keeps = a.states.dtype != ABSENT;  // for a backward
    if (keeps) check_states(c, a);
    if (c.problem()) return c.problem();
    return launch(keeps ? forward_kernel<T, R, true> : forward_kernel<T, R, false>, a, forward_floats(a.state, 32 / R));
}

}  // namespace

// One per file, so that they compile side by side.
#define SSM_FORWARD(name, T)                                                       \
    SSM_EXPORT const char* selective_scan_forward_##name(const ScanArguments* a) { \
        return a->lanes == 8 ? forward<T, 8>(*a) : forward<T, 32>(*a);             \
    }
