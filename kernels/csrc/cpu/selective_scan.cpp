// Selective scan on the CPU, forward and backward. Mathematics: kernels/ssm_ops/selective_scan/api.py.
//
// Work is cut into blocks of W channels of one sample and group, and time into chunks of T tokens, which fit into the
// first-level cache. Within a chunk everything is (token, channel): one step of the recurrence is one vector operation
// for W channels, and B_t, C_t are scalars to it. The forward stores the state before every chunk; the backward walks
// the chunks from the end, recomputes the states of one chunk for one n at a time, and runs the adjoint recurrence.
//
// Nothing depends on the number of threads: every result is written by one block, except dB and dC, which are sums over
// the channels of a group. These are summed within a fixed number of `parts`, each in order, and the caller adds the
// parts.
//
// Shapes: batch B, channels D, tokens L, state N, groups G, E = D / G. Plain C interface, no headers of PyTorch: the
// library fits every version of it.

#include "recurrence.h"

extern "C" {

struct ScanArguments {
    Map u, delta, z, dout;          // z.data may be null
    const float *A, *D, *bias;      // (D, N), (D) or null, (Dd) or null
    const float *B, *C;             // (B, G, N, L), strides below
    int64_t b_batch, b_group, b_state, b_time;
    int64_t c_batch, c_group, c_state, c_time;
    float *out, *last, *states;     // (B, D, L), (B, D, N), (S + 1, B, G, N, E)
    float *du, *ddelta, *dz;        // (B, D, L) each; ddelta per channel of u
    float *dA, *dD, *dbias;         // (B, D, N), (B, D), (B, D): the caller sums over the samples
    float *dB, *dC;                 // (parts, B, G, N, L)
    int64_t batch, dim, length, state, groups, parts;
    int32_t softplus, threads;
};

}  // extern "C"

namespace {

using Args = ScanArguments;

// One block of channels of one sample.
struct Block {
    int64_t b, g, first;  // sample, group, first channel
    int lanes;            // channels that exist, at most W
    const float *B, *C;   // of this sample and group
};

SSM_INLINE Block make_block(const Args& a, int64_t b, int64_t g, int64_t index) {
    const int64_t per_group = a.dim / a.groups, offset = index * W, left = per_group - offset;
    return {b,
            g,
            g * per_group + offset,
            static_cast<int>(left < W ? left : W),
            a.B + b * a.b_batch + g * a.b_group,
            a.C + b * a.c_batch + g * a.c_group};
}

SSM_INLINE float* state_slot(const Args& a, const Block& k, int64_t chunk) {
    const int64_t per_group = a.dim / a.groups;
    return a.states + ((chunk * a.batch + k.b) * a.groups + k.g) * a.state * per_group + k.first - k.g * per_group;
}

SSM_INLINE void load_step_sizes(const Args& a, const Block& k, int64_t start, int tokens, float* raw, float* dt) {
    load_tile(raw, a.delta, k.b, k.first, k.lanes, start, tokens);
    if (a.bias) {
        float bias[W] = {};
        for (int c = 0; c < k.lanes; c++) bias[c] = a.bias[(k.first + c) / a.delta.repeat];
        for (int t = 0; t < tokens; t++)
            SSM_LANES(c, W) raw[t * W + c] += bias[c];
    }
    if (a.softplus)
        SSM_LANES(i, tokens * W) dt[i] = softplus(raw[i]);
    else
        std::memcpy(dt, raw, sizeof(float) * W * tokens);
}

SSM_INLINE void load_column(const Args& a, const Block& k, int64_t n, float* column) {
    SSM_LANES(c, W) column[c] = c < k.lanes ? a.A[(k.first + c) * a.state + n] : 0.0f;
}

SSM_INLINE void load_scalars(const Args& a, const Block& k, int64_t n, int64_t start, int tokens, float* B, float* C) {
    for (int t = 0; t < tokens; t++) {
        B[t] = k.B[n * a.b_state + (start + t) * a.b_time];
        C[t] = k.C[n * a.c_state + (start + t) * a.c_time];
    }
}

// y += sum_n C h over a chunk; h: (N, W)
SSM_INLINE void scan_states(
    const Args& a, const Block& k, int64_t start, int tokens, const float* dt, const float* dtu, float* h, float* y) {
    for (int64_t n = 0; n < a.state; n++) {
        float A[W], B[T], C[T];
        load_column(a, k, n, A);
        load_scalars(a, k, n, start, tokens, B, C);
        scan_chunk(tokens, dt, dtu, A, B, C, h + n * W, y);
    }
}

SSM_VERSIONS void forward_block(const Args& a, int64_t b, int64_t g, int64_t index) {
    const Block k = make_block(a, b, g, index);
    alignas(64) float raw[TILE], dt[TILE], u[TILE], y[TILE], dtu[TILE], gate[TILE], h[MAX_STATE * W];
    const int64_t per_group = a.dim / a.groups;
    std::memset(h, 0, sizeof(float) * W * a.state);
    float skip[W] = {};
    if (a.D)
        for (int c = 0; c < k.lanes; c++) skip[c] = a.D[k.first + c];

    int64_t chunk = 0;
    for (int64_t start = 0; start < a.length; start += T, chunk++) {
        const int tokens = static_cast<int>(a.length - start < T ? a.length - start : T);
        float* slot = state_slot(a, k, chunk);
        for (int64_t n = 0; n < a.state; n++)
            for (int c = 0; c < k.lanes; c++) slot[n * per_group + c] = h[n * W + c];

        load_tile(u, a.u, k.b, k.first, k.lanes, start, tokens);
        load_step_sizes(a, k, start, tokens, raw, dt);
        for (int t = 0; t < tokens; t++)
            SSM_LANES(c, W) {
                dtu[t * W + c] = dt[t * W + c] * u[t * W + c];
                y[t * W + c] = skip[c] * u[t * W + c];
            }
        scan_states(a, k, start, tokens, dt, dtu, h, y);
        if (a.z.data) {
            load_tile(gate, a.z, k.b, k.first, k.lanes, start, tokens);
            SSM_LANES(i, tokens * W) y[i] *= gate[i] * sigmoid(gate[i]);
        }
        store_tile(a.out + (k.b * a.dim + k.first) * a.length + start, a.length, y, k.lanes, tokens);
    }
    float* slot = state_slot(a, k, chunk);
    for (int64_t n = 0; n < a.state; n++)
        for (int c = 0; c < k.lanes; c++) {
            slot[n * per_group + c] = h[n * W + c];
            a.last[(k.b * a.dim + k.first + c) * a.state + n] = h[n * W + c];
        }
}

SSM_VERSIONS void backward_block(const Args& a, int64_t b, int64_t g, int64_t index, float* dB, float* dC) {
    const Block k = make_block(a, b, g, index);
    alignas(64) float raw[TILE], dt[TILE], u[TILE], dtu[TILE], dy[TILE], du[TILE], ddt[TILE], y[TILE], gate[TILE];
    alignas(64) float h0[MAX_STATE * W], h[MAX_STATE * W], carry[MAX_STATE * W], dA[MAX_STATE * W];
    const int64_t per_group = a.dim / a.groups;
    std::memset(carry, 0, sizeof(float) * W * a.state);
    std::memset(dA, 0, sizeof(float) * W * a.state);
    float skip[W] = {}, dD[W] = {}, dbias[W] = {};
    if (a.D)
        for (int c = 0; c < k.lanes; c++) skip[c] = a.D[k.first + c];

    int64_t chunk = (a.length + T - 1) / T;
    while (chunk-- > 0) {
        const int64_t start = chunk * T;
        const int tokens = static_cast<int>(a.length - start < T ? a.length - start : T);
        const float* slot = state_slot(a, k, chunk);
        for (int64_t n = 0; n < a.state; n++)
            SSM_LANES(c, W) h0[n * W + c] = c < k.lanes ? slot[n * per_group + c] : 0.0f;
        const int64_t rows = (k.b * a.dim + k.first) * a.length + start;
        load_tile(u, a.u, k.b, k.first, k.lanes, start, tokens);
        load_tile(dy, a.dout, k.b, k.first, k.lanes, start, tokens);
        load_step_sizes(a, k, start, tokens, raw, dt);
        SSM_LANES(i, tokens * W) dtu[i] = dt[i] * u[i];

        if (a.z.data) {
            // the output before the gate, again, for the gradient of the gate
            for (int t = 0; t < tokens; t++)
                SSM_LANES(c, W) y[t * W + c] = skip[c] * u[t * W + c];
            std::memcpy(h, h0, sizeof(float) * W * a.state);
            scan_states(a, k, start, tokens, dt, dtu, h, y);
            load_tile(gate, a.z, k.b, k.first, k.lanes, start, tokens);
            SSM_LANES(i, tokens * W) {
                const float s = sigmoid(gate[i]);
                y[i] = dy[i] * y[i] * s * (1.0f + gate[i] * (1.0f - s));
                dy[i] = dy[i] * gate[i] * s;
            }
            store_tile(a.dz + rows, a.length, y, k.lanes, tokens);
        }

        std::memset(du, 0, sizeof(float) * W * tokens);
        std::memset(ddt, 0, sizeof(float) * W * tokens);
        for (int64_t n = 0; n < a.state; n++) {
            float A[W], B[T], C[T], sum_B[T], sum_C[T];
            load_column(a, k, n, A);
            load_scalars(a, k, n, start, tokens, B, C);
            const Adjoint to = {carry + n * W, dA + n * W, du, ddt};
            adjoint_chunk(tokens, dt, dtu, dy, A, B, C, h0 + n * W, to, sum_B, sum_C);
            for (int t = 0; t < tokens; t++) {
                dB[n * a.length + start + t] += sum_B[t];
                dC[n * a.length + start + t] += sum_C[t];
            }
        }
        finish_adjoint(tokens, raw, dt, u, dy, skip, a.softplus, du, ddt, dD, dbias);
        store_tile(a.du + rows, a.length, du, k.lanes, tokens);
        store_tile(a.ddelta + rows, a.length, ddt, k.lanes, tokens);
    }
    for (int c = 0; c < k.lanes; c++) {
        const int64_t channel = k.b * a.dim + k.first + c;
        a.dD[channel] = dD[c];
        a.dbias[channel] = dbias[c];
        for (int64_t n = 0; n < a.state; n++) a.dA[channel * a.state + n] = dA[n * W + c];
    }
}

}  // namespace

extern "C" {

SSM_EXPORT void selective_scan_forward(const ScanArguments* arguments) {
    const Args& a = *arguments;
    const int64_t blocks = (a.dim / a.groups + W - 1) / W, all = a.batch * a.groups * blocks;
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t i = 0; i < all; i++) forward_block(a, i / (a.groups * blocks), i / blocks % a.groups, i % blocks);
}

// dB and dC must be zero on entry.
SSM_EXPORT void selective_scan_backward(const ScanArguments* arguments) {
    const Args& a = *arguments;
    const int64_t blocks = (a.dim / a.groups + W - 1) / W, all = a.parts * a.batch * a.groups;
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t i = 0; i < all; i++) {
        const int64_t part = i / (a.batch * a.groups), g = i % a.groups, b = i / a.groups % a.batch;
        float* dB = a.dB + i * a.state * a.length;
        float* dC = a.dC + i * a.state * a.length;
        for (int64_t k = part * blocks / a.parts; k < (part + 1) * blocks / a.parts; k++)
            backward_block(a, b, g, k, dB, dC);
    }
}

}  // extern "C"
