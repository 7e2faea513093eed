// Selective scan on the GPU: the plan, and what both directions share. Mathematics: kernels/ssm_ops/selective_scan/api.py.
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
// Where a backward follows, the forward keeps the state before every CHUNK tokens; the backward recomputes those in between,
// and writes only what it owns: the gradients of B and C leave as one partial sum per block of channels and those of the
// parameters as one per sample, for the caller to add in a fixed order. So the same call gives the same bits.
//
// Bytes per (channel, token), e those of an element, n channels of a block (32 where there are many, 16 with a gate):
//   inference  3 e                            (+ e with z), + 2 N e / n from the second-level cache
//   forward    3 e + 4 N / CHUNK              (+ e with z), + 2 N e / n from the second-level cache
//   backward   5 e + 4 N / CHUNK + 8 N / n    (+ 2 e with z), + 2 N e / n from the second-level cache; u, delta, and
//              with z also z and dout, are read once more at the end of a tile, from a cache
//
// Shapes: batch B, channels D, channels of delta Dd, tokens L, state N, groups G, E = D / G. Plain C interface, no
// headers of PyTorch: the library fits every version of it.
#pragma once

#include "instructions.cuh"
#include "interface.cuh"

namespace {

constexpr int RUNS = CHUNK / K;
constexpr unsigned ALL = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

using Args = ScanArguments;
using Run = float[K];

// ---- elementary functions -------------------------------------------------------------------------------------------

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
        from = here(from);
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
        to = here(to);
#pragma unroll
        for (int j = 0; j < K; j++)
            if (j < tokens) from_float(x[j], to[j]);
    }
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

// Where the sum of token i of a tile lies in shared memory: the halves of a run change places in every other four runs, so
// that lanes whose vectors are stored together do not meet in a bank.
__device__ __forceinline__ int place_of_sum(int i) { return i ^ (i >> 3 & 4); }

// The tokens that `sum_channels` has left to this lane, into the sums of a tile; `first` is the first of them.
template <int R>
__device__ __forceinline__ void store_sums(const Run& x, int first, float* sums) {
    constexpr int HELD = K * R / 32;
    static_assert(HELD == 2 || HELD == 8, "tokens of a lane make vectors");
    alignas(16) float raw[HELD];
#pragma unroll
    for (int j = 0; j < HELD; j++) raw[j] = x[j];
    if (HELD == 2) {
        *reinterpret_cast<float2*>(sums + place_of_sum(first)) = *reinterpret_cast<const float2*>(raw);
    } else {
#pragma unroll
        for (int j = 0; j < HELD; j += 4)
            *reinterpret_cast<float4*>(sums + place_of_sum(first + j)) = *reinterpret_cast<const float4*>(raw + j);
    }
}

// ---- places ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int per_group(const Args& a) { return int(unsigned(a.dim) / unsigned(a.groups)); }

// The channel of delta that belongs to a channel of u.
__device__ __forceinline__ int delta_channel(const Args& a, int channel) { return int(unsigned(channel) / unsigned(a.repeat)); }

// Where this lane is.
template <int R>
struct Place {
    int lane, warp, run;    // run: index among the R lanes of the channel
    int slot;               // channel within the warp
    bool exists;            // the channel does; lanes of others compute zeros and store nothing
    int sample, group, block;
    int e, channel;         // within the group, of all

    __device__ __forceinline__ explicit Place(const Args& a) {
        lane = threadIdx.x % 32, warp = threadIdx.x / 32, run = lane % R, slot = lane / R;
        // in 32 bits, which check_inputs has made sure of: a division of 64 bits takes a hundred instructions
        const unsigned groups = unsigned(a.groups), per_block = a.warps * (32 / R);
        const unsigned blocks = (unsigned(per_group(a)) + per_block - 1) / per_block, i = blockIdx.x;
        sample = int(i / blocks / groups), group = int(i / blocks % groups), block = int(i % blocks);
        e = block * int(per_block) + warp * (32 / R) + slot;
        exists = e < per_group(a);
        if (!exists) e = per_group(a) - 1;
        channel = group * per_group(a) + e;
    }
};

template <typename T>
__device__ __forceinline__ const T* row(const Map& m, int sample, int channel) {
    return static_cast<const T*>(m.data) + sample * m.batch + channel * m.channel;
}

template <typename T>
__device__ __forceinline__ const T* row(const StateMap& m, int sample, int group) {
    return static_cast<const T*>(m.data) + sample * m.batch + group * m.group;
}

// This channel's element of state 0 in `states`, chunk 0; states are E elements apart, chunks B D N.
template <int R>
__device__ __forceinline__ float* saved(const Args& a, const Place<R>& k) {
    return a.states + (int64_t(k.sample) * a.groups + k.group) * a.state * per_group(a) + k.e;
}

// How many of K tokens from `t` on exist.
__device__ __forceinline__ int count_tokens(int t, int length) { return max(min(length - t, K), 0); }

// Raw step sizes become step sizes. Behind the last token they are 0, which leaves the state, and its gradient, as it is.
__device__ __forceinline__ void step_sizes(Run& dt, float bias, bool with_softplus, int tokens) {
#pragma unroll
    for (int j = 0; j < K; j++) dt[j] += bias;
    if (with_softplus) {  // the same for all tokens: one branch
#pragma unroll
        for (int j = 0; j < K; j++) dt[j] = softplus(dt[j]);
    }
    if (tokens < K) {
#pragma unroll
        for (int j = 0; j < K; j++)
            if (j >= tokens) dt[j] = 0.0f;
    }
}

}  // namespace
