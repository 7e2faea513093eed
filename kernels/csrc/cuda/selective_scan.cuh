// Selective scan on the GPU, forward and backward. Mathematics: kernels/ssm_ops/selective_scan/api.py.
//
// A warp owns 32 / R channels of one group of one sample and walks along time in tiles of R * K tokens. R lanes share a
// channel, and a lane holds a run of K consecutive tokens in registers, for all N states one after the other. A run
// turns the state that enters it, h, into p h + q. These pairs are scanned across the R lanes by shuffles; within the
// run the tokens are visited one by one, as in the definition. So a token and state cost one exponential, about six
// multiplications and 2 log2(R) / K shuffles, and forward no warp ever waits for another one.
//
// R = 8 costs the fewest shuffles and wastes the least where L is no multiple of the tile; R = 32 makes four times as
// many warps of few channels. u, delta, z and the results pass through registers once, in vectors of 16 bytes where
// strides and L allow. B and C are read along time by all channels of a block, from the first-level cache but once.
//
// The forward keeps the state before every CHUNK tokens; the backward recomputes those in between. It writes only what
// it owns: the gradients of B and C leave as one partial sum per block of channels and those of the parameters as one
// per sample, for the caller to add in a fixed order. So the same call gives the same bits.
//
// Bytes per (channel, token), e those of an element, n channels of a block (32 where there are many, 16 with a gate):
//   forward    3 e + 4 N / CHUNK              (+ e with z), + 2 N e / n from the second-level cache
//   backward   5 e + 4 N / CHUNK + 8 N / n    (+ 2 e with z), + 2 N e / n from the second-level cache; u, delta, and
//              with z also z and dout, are read once more at the end of a tile, from a cache
//
// Shapes: batch B, channels D, channels of delta Dd, tokens L, state N, groups G, E = D / G. Plain C interface, no
// headers of PyTorch: the library fits every version of it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

extern "C" {

// (batch, channel, time), strides in elements, that of time is 1
struct Map {
    void* data;
    int64_t batch, channel;
};

// (batch, group, state, time), likewise
struct StateMap {
    void* data;
    int64_t batch, group, state;
};

struct ScanArguments {
    Map u, delta, z, dout;         // delta has Dd channels; z.data may be null
    StateMap B, C;                 // (B, G, N, L)
    const float *A, *D, *bias;     // (D, N), (D) or null, (Dd) or null
    void* out;                     // (B, D, L)
    float *last, *states;          // (B, D, N), (S + 1, B, G, N, E)
    void *du, *ddelta, *dz;        // (B, D, L); ddelta per channel of u
    float *dA, *dD, *dbias;        // (B, D, N), (B, D), (B, D): the caller sums over the samples
    float *dB, *dC;                // (blocks of channels, B, G, N, L)
    int64_t batch, dim, length, state, groups;
    int64_t repeat;                // channels that share a channel of delta
    int32_t softplus;
    int32_t vector;                // elements, a power of 2 to which all rows of all maps are aligned
    int32_t wide, wide_delta;      // out and dout, ddelta: float32 instead of the dtype of the inputs
    int32_t lanes, warps;          // R; warps of a block
    int32_t device;
    cudaStream_t stream;
};

}  // extern "C"

namespace {

constexpr int K = 8;        // tokens of a run
constexpr int CHUNK = 64;   // tokens between saved states; STATE_CHUNK["cuda"] of the operators
constexpr int RUNS = CHUNK / K;
constexpr int FORWARD_THREADS = 256, BACKWARD_THREADS = 256, GATED_THREADS = 128;  // at most; the gate takes registers
constexpr int SUMS = 512;   // floats of a warp's slot for sums over its channels, of dB and dC together
constexpr unsigned ALL = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

using Args = ScanArguments;
using Run = float[K];

// ---- elementary functions -------------------------------------------------------------------------------------------

// 2^x, to 2 units in the last place; one instruction
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log(1 + v) for v in [0, 1], to a relative error of 1.4e-7 however small v is
__device__ __forceinline__ float log1p_unit(float v) {
    // minimax polynomial of log1p(v) / v on [0, 1]; no logarithm of the hardware is accurate near 1
    float p = -0.0032440247f * v + 0.0198514592f;
    p = p * v - 0.0569595285f;
    p = p * v + 0.106036544f;
    p = p * v - 0.153055921f;
    p = p * v + 0.196759388f;
    p = p * v - 0.249541342f;
    p = p * v + 0.333299637f;
    p = p * v - 0.499999017f;
    return (p * v + 1.0f) * v;
}

// Above 20 this is the identity to the last bit, without saying so.
__device__ __forceinline__ float softplus(float raw) {
    return fmaxf(raw, 0.0f) + log1p_unit(exp2_fast(-fabsf(raw) * LOG2E));
}

__device__ __forceinline__ float sigmoid(float x) {
    const float v = exp2_fast(-fabsf(x) * LOG2E);
    return __fdividef(x > 0.0f ? 1.0f : v, 1.0f + v);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float x, float& to) { to = x; }
__device__ __forceinline__ void from_float(float x, __half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

template <typename V, typename T>
__device__ __forceinline__ void load_vectors(const T* from, Run& x) {
    alignas(16) T raw[K];
#pragma unroll
    for (int i = 0; i < int(K * sizeof(T) / sizeof(V)); i++)
        reinterpret_cast<V*>(raw)[i] = __ldg(reinterpret_cast<const V*>(from) + i);
#pragma unroll
    for (int j = 0; j < K; j++) x[j] = to_float(raw[j]);
}

template <typename V, typename T>
__device__ __forceinline__ void store_vectors(const Run& x, T* to) {
    alignas(16) T raw[K];
#pragma unroll
    for (int j = 0; j < K; j++) from_float(x[j], raw[j]);
#pragma unroll
    for (int i = 0; i < int(K * sizeof(T) / sizeof(V)); i++)
        reinterpret_cast<V*>(to)[i] = reinterpret_cast<const V*>(raw)[i];
}

// The run at `from`, of which `tokens` (0 to K) exist; zeros behind them. Nothing that does not exist is read.
template <typename T>
__device__ __forceinline__ void load_run(const T* from, int tokens, int vector, Run& x) {
    const int bytes = vector * int(sizeof(T));
    if (tokens == K && bytes >= 16) {
        load_vectors<uint4>(from, x);
    } else if (tokens == K && bytes == 8) {
        load_vectors<uint2>(from, x);
    } else {
#pragma unroll
        for (int j = 0; j < K; j++) x[j] = j < tokens ? to_float(__ldg(from + j)) : 0.0f;
    }
}

template <typename T>
__device__ __forceinline__ void store_run(const Run& x, int tokens, int vector, T* to) {
    const int bytes = vector * int(sizeof(T));
    if (tokens == K && bytes >= 16) {
        store_vectors<uint4>(x, to);
    } else if (tokens == K && bytes == 8) {
        store_vectors<uint2>(x, to);
    } else {
#pragma unroll
        for (int j = 0; j < K; j++)
            if (j < tokens) from_float(x[j], to[j]);
    }
}

// Ask for what the next tile will need; the data waits in the second-level cache, not in registers.
__device__ __forceinline__ void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// ---- scans across the R lanes of a channel --------------------------------------------------------------------------

// Runs turn what enters them into p times it plus q. Returns what enters the run of this lane, from `first`, which
// enters that of lane 0.
template <int R>
__device__ __forceinline__ float enter_forward(float p, float q, float first, int run) {
    if (run == 0) q = p * first + q;
#pragma unroll
    for (int s = 1; s < R; s *= 2) {
        const float q_from = __shfl_up_sync(ALL, q, s, R);
        if (run >= s) q = p * q_from + q;
        if (2 * s < R) {
            const float p_from = __shfl_up_sync(ALL, p, s, R);
            if (run >= s) p *= p_from;
        }
    }
    const float entered = __shfl_up_sync(ALL, q, 1, R);
    return run == 0 ? first : entered;
}

// The same from the last lane to the first.
template <int R>
__device__ __forceinline__ float enter_backward(float p, float q, float first, int run) {
    if (run == R - 1) q = p * first + q;
#pragma unroll
    for (int s = 1; s < R; s *= 2) {
        const float q_from = __shfl_down_sync(ALL, q, s, R);
        if (run + s < R) q = p * q_from + q;
        if (2 * s < R) {
            const float p_from = __shfl_down_sync(ALL, p, s, R);
            if (run + s < R) p *= p_from;
        }
    }
    const float entered = __shfl_down_sync(ALL, q, 1, R);
    return run == R - 1 ? first : entered;
}

// Sum over the R lanes of a channel; all of them get it.
template <int R>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (int s = R / 2; s > 0; s /= 2) x += __shfl_xor_sync(ALL, x, s);
    return x;
}

// Sum over the channels of the warp. Every exchange halves what a lane still holds: K R / 32 tokens at the end, the
// first elements of x. They begin at token `first_summed` of the run.
template <int R>
__device__ __forceinline__ void sum_channels(Run& x, int lane) {
    int held = K;
#pragma unroll
    for (int s = 16; s >= R; s /= 2) {
        held /= 2;
        const bool upper = lane & s;
#pragma unroll
        for (int j = 0; j < held; j++) {
            const float sent = upper ? x[j] : x[j + held], kept = upper ? x[j + held] : x[j];
            x[j] = kept + __shfl_xor_sync(ALL, sent, s);
        }
    }
}

template <int R>
__device__ __forceinline__ int first_summed(int lane) {
    int first = 0, held = K;
#pragma unroll
    for (int s = 16; s >= R; s /= 2) {
        held /= 2;
        if (lane & s) first += held;
    }
    return first;
}

// ---- what both kernels share ----------------------------------------------------------------------------------------

// Where this lane is.
template <int R>
struct Place {
    int lane, warp, run;    // run: index among the R lanes of the channel
    int slot;               // channel within the warp
    bool exists;            // the channel does; lanes of others compute zeros and store nothing
    int64_t sample, group, block;
    int64_t e, channel;     // within the group, of all

    __device__ __forceinline__ explicit Place(const Args& a) {
        lane = threadIdx.x % 32, warp = threadIdx.x / 32, run = lane % R, slot = lane / R;
        const int64_t per_group = a.dim / a.groups, per_block = a.warps * (32 / R);
        const int64_t blocks = (per_group + per_block - 1) / per_block, i = blockIdx.x;
        sample = i / blocks / a.groups, group = i / blocks % a.groups, block = i % blocks;
        e = block * per_block + warp * (32 / R) + slot;
        exists = e < per_group;
        if (!exists) e = per_group - 1;
        channel = group * per_group + e;
    }
};

template <typename T>
__device__ __forceinline__ const T* row(const Map& m, int64_t sample, int64_t channel) {
    return static_cast<const T*>(m.data) + sample * m.batch + channel * m.channel;
}

template <typename T>
__device__ __forceinline__ const T* row(const StateMap& m, int64_t sample, int64_t group) {
    return static_cast<const T*>(m.data) + sample * m.batch + group * m.group;
}

// This channel's element of state 0 in `states`, chunk 0; states are E elements apart, chunks B D N.
template <int R>
__device__ __forceinline__ float* saved(const Args& a, const Place<R>& k) {
    const int64_t per_group = a.dim / a.groups;
    return a.states + (k.sample * a.groups + k.group) * a.state * per_group + k.e;
}

// How many of K tokens from `t` on exist.
__device__ __forceinline__ int count_tokens(int64_t t, int64_t length) {
    const int64_t left = length - t;
    return left >= K ? K : left > 0 ? int(left) : 0;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Shared memory: of every warp (N, 32 / R) twice.
__host__ __device__ constexpr int64_t forward_floats(int64_t state, int channels) { return 2 * state * channels; }

template <typename T, int R>
__global__ void __launch_bounds__(FORWARD_THREADS, 3) forward_kernel(const __grid_constant__ Args a) {
    constexpr int CHANNELS = 32 / R, TILE = R * K;
    extern __shared__ float shared[];
    const Place<R> k(a);
    const int N = int(a.state);
    const int64_t per_group = a.dim / a.groups, chunk_stride = a.batch * a.dim * a.state;

    float* const A2 = shared + k.warp * forward_floats(N, CHANNELS) + k.slot;  // A log2(e); [n * CHANNELS]
    float* const carry = A2 + N * CHANNELS;                                     // the state before the tile
    float* const states = saved(a, k);
    for (int n = k.run; n < N; n += R) {
        A2[n * CHANNELS] = k.exists ? a.A[k.channel * N + n] * LOG2E : 0.0f;
        carry[n * CHANNELS] = 0.0f;
        if (k.exists) states[n * per_group] = 0.0f;
    }
    __syncwarp();

    const T* const u_row = row<T>(a.u, k.sample, k.channel);
    const T* const delta_row = row<T>(a.delta, k.sample, k.channel / a.repeat);
    const T* const B_rows = row<T>(a.B, k.sample, k.group);
    const T* const C_rows = row<T>(a.C, k.sample, k.group);
    const int64_t out_row = (k.sample * a.dim + k.channel) * a.length;
    const float skip = a.D ? a.D[k.channel] : 0.0f, bias = a.bias ? a.bias[k.channel / a.repeat] : 0.0f;

    for (int64_t start = 0; start < a.length; start += TILE) {
        const int64_t t = start + k.run * K;
        const int tokens = count_tokens(t, a.length), own = k.exists ? tokens : 0;
        if (k.exists && t + TILE < a.length) {
            prefetch(u_row + t + TILE);
            prefetch(delta_row + t + TILE);
        }
        Run dt, dtu, y;
        load_run(u_row + t, own, a.vector, y);
        load_run(delta_row + t, own, a.vector, dt);
#pragma unroll
        for (int j = 0; j < K; j++) {
            dt[j] += bias;
            if (a.softplus) dt[j] = softplus(dt[j]);
            if (j >= own) dt[j] = 0.0f;  // leaves the state as it is
            dtu[j] = dt[j] * y[j];
            y[j] *= skip;
        }

        const T *B_row = B_rows + t, *C_row = C_rows + t;
        const int64_t chunk = t / CHUNK;
        const bool saves = k.exists && k.run % RUNS == RUNS - 1 && chunk * CHUNK < a.length;
        float* save = states + (chunk + 1) * chunk_stride;
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
            if (saves) *save = h;
            B_row += a.B.state, C_row += a.C.state, save += per_group;
        }
        __syncwarp();  // the next tile begins with what the last lane has written

        if (a.z.data) {
            Run z;
            load_run(row<T>(a.z, k.sample, k.channel) + t, own, a.vector, z);
#pragma unroll
            for (int j = 0; j < K; j++) y[j] *= z[j] * sigmoid(z[j]);
        }
        if (a.wide)
            store_run(y, own, a.vector, static_cast<float*>(a.out) + out_row + t);
        else
            store_run(y, own, a.vector, static_cast<T*>(a.out) + out_row + t);
    }
    for (int n = k.run; n < N; n += R)
        if (k.exists) a.last[(k.sample * a.dim + k.channel) * N + n] = carry[n * CHANNELS];
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Shared memory: of every warp (N, 32 / R) four times, and two slots of sums.
__host__ __device__ constexpr int64_t backward_floats(int64_t state, int channels) { return 4 * state * channels + 2 * SUMS; }

// dout is of either type.
template <typename T, int R>
__device__ __forceinline__ void load_dout(const Args& a, const Place<R>& k, int64_t t, int tokens, Run& x) {
    if (a.wide)
        load_run(row<float>(a.dout, k.sample, k.channel) + t, tokens, a.vector, x);
    else
        load_run(row<T>(a.dout, k.sample, k.channel) + t, tokens, a.vector, x);
}

template <typename T, int R>
__device__ __forceinline__ void prefetch_dout(const Args& a, const Place<R>& k, int64_t t) {
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
    extern __shared__ float shared[];
    const Place<R> k(a);
    const int N = int(a.state);
    const int64_t per_group = a.dim / a.groups, chunk_stride = a.batch * a.dim * a.state;

    // [warp][two slots][BATCH][dB, dC][TILE]; the two slots take turns, so that one barrier per batch is enough
    float* const sums = shared;
    float* const A2 = shared + a.warps * 2 * SUMS + k.warp * 4 * N * CHANNELS + k.slot;  // A log2(e); [n * CHANNELS]
    float* const carry = A2 + N * CHANNELS;     // exp(dt A) times the gradient of the state, of the first token after
    float* const dA = carry + N * CHANNELS;
    float* const before = dA + N * CHANNELS;    // the state before the tile
    const float* const states = saved(a, k);
    for (int n = k.run; n < N; n += R) {
        A2[n * CHANNELS] = k.exists ? a.A[k.channel * N + n] * LOG2E : 0.0f;
        carry[n * CHANNELS] = dA[n * CHANNELS] = 0.0f;
    }

    const T* const u_row = row<T>(a.u, k.sample, k.channel);
    const T* const delta_row = row<T>(a.delta, k.sample, k.channel / a.repeat);
    const T* const B_rows = row<T>(a.B, k.sample, k.group);
    const T* const C_rows = row<T>(a.C, k.sample, k.group);
    const int64_t own_row = (k.sample * a.dim + k.channel) * a.length;
    const int64_t sum_rows = ((k.block * a.batch + k.sample) * a.groups + k.group) * a.state * a.length;
    const float skip = a.D ? a.D[k.channel] : 0.0f, bias = a.bias ? a.bias[k.channel / a.repeat] : 0.0f;
    float dD = 0.0f, dbias = 0.0f;
    int slot = 0;

    for (int64_t start = (a.length - 1) / TILE * TILE; start >= 0; start -= TILE) {
        const int64_t t = start + k.run * K;
        const int tokens = count_tokens(t, a.length), own = k.exists ? tokens : 0;
        if (k.exists && start > 0) {
            prefetch(u_row + t - TILE);
            prefetch(delta_row + t - TILE);
            prefetch_dout<T>(a, k, t - TILE);
        }
        for (int n = k.run; n < N; n += R)
            before[n * CHANNELS] = k.exists ? states[start / CHUNK * chunk_stride + n * per_group] : 0.0f;
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
#pragma unroll
        for (int j = 0; j < K; j++) {
            dt[j] += bias;
            if (a.softplus) dt[j] = softplus(dt[j]);
            if (j >= own) dt[j] = 0.0f;  // leaves the state, and its gradient, as it is
            dtu[j] *= dt[j];
        }

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

                float* to = sums + ((k.warp * 2 + slot) * BATCH + i) * 2 * TILE + k.run * K + first_summed<R>(k.lane);
                Run shares;  // in the gradient of C, then of B
#pragma unroll
                for (int j = 0; j < K; j++) {
                    kept[j] = decay[j] * h;  // what is left of the state before the token
                    h = kept[j] + dtu[j] * B[j];
                    shares[j] = h * dy[j];
                    if (GATED) y[j] += h * C[j];
                }
                sum_channels<R>(shares, k.lane);
#pragma unroll
                for (int j = 0; j < K / CHANNELS; j++) to[TILE + j] = shares[j];

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
#pragma unroll
                for (int j = 0; j < K / CHANNELS; j++) to[j] = shares[j];
            }
            __syncthreads();
            for (int i = threadIdx.x; i < count * 2 * TILE; i += blockDim.x) {
                float sum = 0.0f;
                for (int w = 0; w < a.warps; w++) sum += sums[(w * 2 + slot) * SUMS + i];
                const int64_t at = start + i % TILE;
                float* to = i / TILE % 2 ? a.dC : a.dB;
                if (at < a.length) to[sum_rows + (first_n + i / (2 * TILE)) * a.length + at] = sum;
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
        store_run(du, own, a.vector, static_cast<T*>(a.du) + own_row + t);
        if (a.wide_delta)
            store_run(dexponent, own, a.vector, static_cast<float*>(a.ddelta) + own_row + t);
        else
            store_run(dexponent, own, a.vector, static_cast<T*>(a.ddelta) + own_row + t);
        if (GATED) {
            Run z;
            load_run(row<T>(a.z, k.sample, k.channel) + t, own, a.vector, z);
            load_dout<T>(a, k, t, own, dy);
#pragma unroll
            for (int j = 0; j < K; j++) {
                const float gate = sigmoid(z[j]);
                z[j] = dy[j] * (y[j] + skip * u[j]) * gate * (1.0f + z[j] * (1.0f - gate));
            }
            store_run(z, own, a.vector, static_cast<T*>(a.dz) + own_row + t);
        }
        __syncwarp();  // the next tile overwrites `before`, and begins with what lane 0 has written
    }

    const int64_t channel = k.sample * a.dim + k.channel;
    for (int n = k.run; n < N; n += R)
        if (k.exists) a.dA[channel * N + n] = dA[n * CHANNELS];
    dD = sum_lanes<R>(dD), dbias = sum_lanes<R>(dbias);
    if (k.exists && k.run == 0) {
        if (a.D) a.dD[channel] = dD;
        if (a.bias) a.dbias[channel] = dbias;
    }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

// Null, or what went wrong. The caller keeps shared memory within the 48 KiB that need no asking.
inline const char* launch(void (*kernel)(Args), const Args& a, int64_t floats_of_warp) {
    const int64_t per_block = a.warps * (32 / a.lanes), per_group = a.dim / a.groups;
    const int64_t blocks = a.batch * a.groups * ((per_group + per_block - 1) / per_block);
    if (blocks == 0) return nullptr;
    if (blocks > INT32_MAX) return "too many blocks of channels";
    cudaError_t status = cudaSetDevice(a.device);  // the runtime of this library is not that of PyTorch
    if (status == cudaSuccess) {
        void* arguments[] = {const_cast<Args*>(&a)};
        status = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(32 * a.warps),
                                  arguments, size_t(a.warps * floats_of_warp) * sizeof(float), a.stream);
    }
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace

#define SSM_EXPORT extern "C" __attribute__((visibility("default")))

// One per file, so that they compile side by side.
#define SSM_FORWARD(name, T)                                                                       \
    SSM_EXPORT const char* selective_scan_forward_##name(const ScanArguments* a) {                 \
        if (a->lanes == 8) return launch(forward_kernel<T, 8>, *a, forward_floats(a->state, 4));   \
        return launch(forward_kernel<T, 32>, *a, forward_floats(a->state, 1));                     \
    }

#define SSM_BACKWARD(name, T)                                                                      \
    SSM_EXPORT const char* selective_scan_backward_##name(const ScanArguments* a) {                \
        const bool gated = a->z.data != nullptr;                                                   \
        if (a->lanes == 8)                                                                         \
            return launch(gated ? backward_kernel<T, 8, true> : backward_kernel<T, 8, false>, *a,  \
                          backward_floats(a->state, 4));                                           \
        return launch(gated ? backward_kernel<T, 32, true> : backward_kernel<T, 32, false>, *a,    \
                      backward_floats(a->state, 1));                                               \
    }
