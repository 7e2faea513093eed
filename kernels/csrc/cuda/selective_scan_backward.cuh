// The backward kernel and its launch; the plan is in selective_scan.cuh.
#pragma once

#include "launch.cuh"
#include "selective_scan.cuh"

namespace {

// Shared memory: of every warp (N, 32 / R), BACKWARD_ROWS times, and two slots of sums.
__host__ __device__ constexpr int64_t backward_floats(int64_t state, int channels) {
    return BACKWARD_ROWS * state * channels + 2 * SUMS;
}

// dout is of either type.
template <typename T, int R>
__device__ __forceinline__ void load_dout(const Args& a, const Place<R>& k, int t, int tokens, Run& x) {
    if (a.wide)
        load_run(row<float>(a.dout, k.sample, k.channel) + t, tokens, a.vector, x);
    else
        load_run(row<T>(a.dout, k.sample, k.channel) + t, tokens, a.vector, x);
}

template <typename T, int R>
__device__ __forceinline__ void prefetch_dout(const Args& a, const Place<R>& k, int t) {
    if (a.wide)
        prefetch(row<float>(a.dout, k.sample, k.channel) + t);
    else
        prefetch(row<T>(a.dout, k.sample, k.channel) + t);
}

template <typename T, int R, bool GATED>
__global__ void __launch_bounds__(GATED ? GATED_THREADS : BACKWARD_THREADS, GATED ? 3 : 2)
    backward_kernel(const __grid_constant__ Args a) {
    constexpr int CHANNELS = 32 / R, TILE = R * K;
    constexpr int BATCH = SUMS / (2 * TILE);  // states whose sums over the channels are formed together
    extern __shared__ __align__(16) float shared[];
    const Place<R> k(a);
    const int N = int(a.state);
    const int length = int(a.length), group_dim = per_group(a);
    const int64_t chunk_stride = a.batch * a.dim * a.state;

    // [warp][two slots][BATCH][dB, dC][TILE]; the two slots take turns, so that one barrier per batch is enough
    float* const sums = shared;
    float* const A2 = shared + a.warps * 2 * SUMS + k.warp * BACKWARD_ROWS * N * CHANNELS + k.slot;  // A log2(e); [n * CHANNELS]
    float* const carry = A2 + N * CHANNELS;     // exp(dt A) times the gradient of the state, of the first token after
    float* const dA = carry + N * CHANNELS;
    float* const before = dA + N * CHANNELS;    // the state before the tile
    const float* const states = saved(a, k);
    for (int n = k.run; n < N; n += R) {
        A2[n * CHANNELS] = k.exists ? a.A[int64_t(k.channel) * N + n] * LOG2E : 0.0f;
        carry[n * CHANNELS] = dA[n * CHANNELS] = 0.0f;
    }

    const T* const u_row = row<T>(a.u, k.sample, k.channel);
    const T* const delta_row = row<T>(a.delta, k.sample, delta_channel(a, k.channel));
    const T* const B_rows = row<T>(a.B, k.sample, k.group);
    const T* const C_rows = row<T>(a.C, k.sample, k.group);
    const int64_t own_row = (int64_t(k.sample) * a.dim + k.channel) * a.length;
    const int64_t sum_rows = ((int64_t(k.block) * a.batch + k.sample) * a.groups + k.group) * a.state * a.length;
    const float skip = a.D ? a.D[k.channel] : 0.0f, bias = a.bias ? a.bias[delta_channel(a, k.channel)] : 0.0f;
    float dD = 0.0f, dbias = 0.0f;
    int slot = 0;

    for (int start = (length - 1) / TILE * TILE; start >= 0; start -= TILE) {
        const int t = start + k.run * K;
        const int tokens = count_tokens(t, length), own = k.exists ? tokens : 0;
        if (k.exists && start > 0) {
            prefetch(u_row + t - TILE);
            prefetch(delta_row + t - TILE);
            prefetch_dout<T>(a, k, t - TILE);
        }
        for (int n = k.run; n < N; n += R)
            before[n * CHANNELS] = k.exists ? states[start / CHUNK * chunk_stride + int64_t(n) * group_dim] : 0.0f;
        __syncwarp();

        Run dtu, dt, dy, y = {};
        load_run(u_row + t, own, a.vector, dtu);
        load_run(delta_row + t, own, a.vector, dt);
        load_dout<T>(a, k, t, own, dy);
        if (GATED) {
            Run z;
            load_run(row<T>(a.z, k.sample, k.channel) + t, own, a.vector, z);
#pragma unroll
            for (int j = 0; j < K; j++) dy[j] *= z[j] * sigmoid(z[j]);
        }
        step_sizes(dt, bias, a.softplus, own);
#pragma unroll
        for (int j = 0; j < K; j++) dtu[j] *= dt[j];

        Run lambda_B = {}, dexponent = {};  // sums over n: of lambda B, and the gradient of dt through exp(dt A)
        const T *B_row = B_rows + t, *C_row = C_rows + t;
        for (int first_n = 0; first_n < N; first_n += BATCH, slot ^= 1) {
            const int count = min(BATCH, N - first_n);
#pragma unroll 1
            for (int i = 0; i < count; i++) {
                const int n = (first_n + i) * CHANNELS;
                Run B, C, decay, kept;
                load_run(B_row, tokens, a.vector, B);
                load_run(C_row, tokens, a.vector, C);
                B_row += a.B.state, C_row += a.C.state;
                const float A = A2[n], first = before[n], last = carry[n];
                float p = 1.0f, q = 0.0f, r = 0.0f;
#pragma unroll
                for (int j = 0; j < K; j++) {
                    decay[j] = exp2_fast(dt[j] * A);
                    p *= decay[j];
                    q = decay[j] * q + dtu[j] * B[j];
                }
#pragma unroll
                for (int j = K - 1; j >= 0; j--) r = decay[j] * (dy[j] * C[j] + r);
                float h = enter_forward<R>(p, q, first, k.run);
                float w = enter_backward<R>(p, r, last, k.run);

                float* const to = sums + ((k.warp * 2 + slot) * BATCH + i) * 2 * TILE;
                const int first_token = k.run * K + first_summed<R>(k.lane);
                Run shares;  // in the gradient of C, then of B
#pragma unroll
                for (int j = 0; j < K; j++) {
                    kept[j] = decay[j] * h;  // what is left of the state before the token
                    h = kept[j] + dtu[j] * B[j];
                    shares[j] = h * dy[j];
                    if (GATED) y[j] += h * C[j];
                }
                sum_channels<R>(shares, k.lane);
                store_sums<R>(shares, first_token, to + TILE);

                float sum_A = 0.0f;
#pragma unroll
                for (int j = K - 1; j >= 0; j--) {
                    const float lambda = dy[j] * C[j] + w;
                    w = decay[j] * lambda;
                    const float d = lambda * kept[j];
                    dexponent[j] += d * A;
                    sum_A += d * dt[j];
                    lambda_B[j] += lambda * B[j];
                    shares[j] = lambda * dtu[j];
                }
                sum_A = sum_lanes<R>(sum_A);
                if (k.run == 0) {
                    carry[n] = w;
                    dA[n] += sum_A;
                }
                sum_channels<R>(shares, k.lane);
                store_sums<R>(shares, first_token, to);
            }
            // Also for the next tile, which overwrites `before` and begins with what lane 0 has written: after the barrier
            // of its last batch, this tile uses neither.
            __syncthreads();
            for (int i = threadIdx.x; i < count * 2 * TILE; i += blockDim.x) {
                float sum = 0.0f;
                for (int w = 0; w < a.warps; w++) sum += sums[(w * 2 + slot) * SUMS + place_of_sum(i)];
                const int at = start + i % TILE;
                float* to = i / TILE % 2 ? a.dC : a.dB;
                if (at < length) to[sum_rows + int64_t(first_n + i / (2 * TILE)) * a.length + at] = sum;
            }
        }

        Run raw, u, du;  // inputs are read again rather than held
        load_run(u_row + t, own, a.vector, u);
        load_run(delta_row + t, own, a.vector, raw);
        float sum_D = 0.0f, sum_bias = 0.0f;  // of the run first: long sums lose digits
#pragma unroll
        for (int j = 0; j < K; j++) {
            float d = lambda_B[j] * u[j] + dexponent[j] * LN2;
            if (a.softplus) d *= sigmoid(raw[j] + bias);
            du[j] = lambda_B[j] * dt[j] + dy[j] * skip;
            dexponent[j] = d;
            sum_D += dy[j] * u[j];
            if (j < own) sum_bias += d;
        }
        dD += sum_D, dbias += sum_bias;
        store_run(du, own, a.vector, static_cast<T*>(a.du.data) + own_row + t);
        if (a.wide_delta)
            store_run(dexponent, own, a.vector, static_cast<float*>(a.ddelta.data) + own_row + t);
        else
            store_run(dexponent, own, a.vector, static_cast<T*>(a.ddelta.data) + own_row + t);
        if (GATED) {
            Run z;
            load_run(row<T>(a.z, k.sample, k.channel) + t, own, a.vector, z);
            load_dout<T>(a, k, t, own, dy);
#pragma unroll
            for (int j = 0; j < K; j++) {
                const float gate = sigmoid(z[j]);
                z[j] = dy[j] * (y[j] + skip * u[j]) * gate * (1.0f + z[j] * (1.0f - gate));
            }
            store_run(z, own, a.vector, static_cast<T*>(a.dz.data) + own_row + t);
        }
    }

    const int64_t channel = int64_t(k.sample) * a.dim + k.channel;
    for (int n = k.run; n < N; n += R)
        if (k.exists) a.dA[channel * N + n] = dA[n * CHANNELS];
    dD = sum_lanes<R>(dD), dbias = sum_lanes<R>(dbias);
    if (k.exists && k.run == 0) {
        if (a.D) a.dD[channel] = dD;
        if (a.bias) a.dbias[channel] = dbias;
    }
}

template <typename T, int R>
const char* backward(const Args& a) {
    const bool gated = a.z.dtype != ABSENT;
    const int64_t floats = backward_floats(a.state, 32 / R), numbers = a.batch * a.dim * a.length;
    Check c = check_inputs<T>(a, gated ? GATED_THREADS : BACKWARD_THREADS, floats);
    if (c.problem()) return c.problem();
    const int64_t sums = blocks_of_group(a) * a.batch * a.groups * a.state * a.length;
    check_states(c, a);
    check_map(c, "dout", a.dout, a.wide ? FLOAT32 : DTYPE<T>, a, a.dim);
    c.buffer("du", a.du, DTYPE<T>, numbers);
    c.buffer("ddelta", a.ddelta, a.wide_delta ? FLOAT32 : DTYPE<T>, numbers);
    if (gated) c.buffer("dz", a.dz, DTYPE<T>, numbers);
    c.buffer("dA", a.dA, FLOAT32, a.batch * a.dim * a.state);
    if (a.D) c.buffer("dD", a.dD, FLOAT32, a.batch * a.dim);
    if (a.bias) c.buffer("dbias", a.dbias, FLOAT32, a.batch * a.dim);
    c.buffer("dB", a.dB, FLOAT32, sums);
    c.buffer("dC", a.dC, FLOAT32, sums);
    if (c.problem()) return c.problem();
    return launch(gated ? backward_kernel<T, R, true> : backward_kernel<T, R, false>, a, floats);
}

}  // namespace

// One per file, so that they compile side by side.
#define SSM_BACKWARD(name, T)                                                       \
    SSM_EXPORT const char* selective_scan_backward_##name(const ScanArguments* a) { \
        return a->lanes == 8 ? backward<T, 8>(*a) : backward<T, 32>(*a);            \
    }
