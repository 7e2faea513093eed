// One block of channels of the selective scan, forward and backward; the plan is in selective_scan.cpp, which includes this
// once for every instruction set.

#include "recurrence.h"
#include "tiles.h"

using Args = ScanArguments;

// ---- blocks ----------------------------------------------------------------------------------------------------------

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
            a.B.data + b * a.B.batch + g * a.B.group,
            a.C.data + b * a.C.batch + g * a.C.group};
}

SSM_INLINE float* state_slot(const Args& a, const Block& k, int64_t chunk) {
    const int64_t per_group = a.dim / a.groups;
    return a.states + ((chunk * a.batch + k.b) * a.groups + k.g) * a.state * per_group + k.first - k.g * per_group;
}

// What a chunk reads. Step sizes come with their derivative after the raw ones, where it is wanted.
struct Chunk {
    int64_t start;
    int tokens;
    alignas(64) float u[TILE], dt[TILE], dtu[TILE], slope[TILE];
};

SSM_INLINE void load_chunk(const Args& a, const Block& k, int64_t start, bool wants_slope, Chunk& s) {
    s.start = start;
    s.tokens = static_cast<int>(a.length - start < T ? a.length - start : T);
    load_tile(s.u, a.u, k.b, k.first, k.lanes, start, s.tokens);
    load_tile(s.dt, a.delta, k.b, k.first, k.lanes, start, s.tokens);
    float bias[W] = {};
    if (a.bias)
        for (int c = 0; c < k.lanes; c++) bias[c] = a.bias[(k.first + c) / a.delta.repeat];
    const Lanes shift = load(bias);
    for (int i = 0; i < s.tokens * W; i += SIDE * W) {
        Group x = load_group(s.dt + i), slope;
        SSM_EACH x.v[j] += shift;
        SSM_EACH slope.v[j] = everywhere(1.0f);
        if (a.softplus) {
            const Group power = exp_minus_magnitude(x);
            if (wants_slope) slope = sigmoid(x, power);
            x = softplus(x, power);
        }
        if (wants_slope) store(s.slope + i, slope);
        store(s.dt + i, x);
        SSM_EACH store(s.dtu + i + j * W, x.v[j] * load(s.u + i + j * W));
    }
    fill_up(s.dt, s.tokens);
    fill_up(s.dtu, s.tokens);
}

// A, B and C of M states from n on: (M), (M, T), (M, T)
template <int M>
struct Parameters {
    Lanes A[M];
    float B[M * T], C[M * T];

    inline __attribute__((always_inline)) Parameters(const Args& a, const Block& k, const Chunk& s, int64_t n) {
        for (int m = 0; m < M; m++, n++) {
            float column[W] = {};
            for (int c = 0; c < k.lanes; c++) column[c] = a.A[(k.first + c) * a.state + n];
            A[m] = load(column);
            for (int t = 0; t < s.tokens; t++) {
                B[m * T + t] = k.B[n * a.B.state + (s.start + t) * a.B.time];
                C[m * T + t] = k.C[n * a.C.state + (s.start + t) * a.C.time];
            }
            for (int t = s.tokens; t < whole_groups(s.tokens); t++) B[m * T + t] = C[m * T + t] = 0.0f;
        }
    }
};

SSM_INLINE Lanes load_skip(const Args& a, const Block& k) {
    float skip[W] = {};
    if (a.D) std::memcpy(skip, a.D + k.first, sizeof(float) * k.lanes);
    return load(skip);
}

// M states from n on; h: (N, W)
template <int M>
SSM_INLINE void scan_states(const Args& a, const Block& k, const Chunk& s, int64_t n, float* h, float* y) {
    const Parameters<M> p(a, k, s, n);
    scan_chunk<M>(s.tokens, s.dt, s.dtu, p.A, p.B, p.C, h + n * W, y);
}

// y = D u + sum_n C h over a chunk
SSM_INLINE void scan_states(const Args& a, const Block& k, const Chunk& s, Lanes skip, float* h, float* y) {
    for (int i = 0; i < s.tokens * W; i += W) store(y + i, load(s.u + i) * skip);
    int64_t n = 0;
    for (; n + 3 < a.state; n += 4) scan_states<4>(a, k, s, n, h, y);
    for (; n < a.state; n++) scan_states<1>(a, k, s, n, h, y);
}

static void forward_block(const Args& a, int64_t b, int64_t g, int64_t index) {
    const Block k = make_block(a, b, g, index);
    Chunk s;
    alignas(64) float y[TILE], gate[TILE], h[MAX_STATE * W];
    const int64_t per_group = a.dim / a.groups;
    const Lanes skip = load_skip(a, k);
    std::memset(h, 0, sizeof(float) * W * a.state);

    int64_t chunk = 0;
    for (int64_t start = 0; start < a.length; start += T, chunk++) {
        float* slot = state_slot(a, k, chunk);
        for (int64_t n = 0; n < a.state; n++) std::memcpy(slot + n * per_group, h + n * W, sizeof(float) * k.lanes);
        load_chunk(a, k, start, false, s);
        prefetch(a.u, k.b, k.first, k.lanes, start + T, T);
        prefetch(a.delta, k.b, k.first, k.lanes, start + T, T);
        scan_states(a, k, s, skip, h, y);
        if (a.z.data) {
            load_tile(gate, a.z, k.b, k.first, k.lanes, start, s.tokens);
            for (int i = 0; i < s.tokens * W; i += SIDE * W) {
                const Group z = load_group(gate + i), open = sigmoid(z, exp_minus_magnitude(z));
                SSM_EACH store(y + i + j * W, load(y + i + j * W) * z.v[j] * open.v[j]);
            }
        }
        store_tile(a.out + (k.b * a.dim + k.first) * a.length + start, a.length, y, k.lanes, s.tokens);
    }
    float* slot = state_slot(a, k, chunk);
    for (int64_t n = 0; n < a.state; n++)
        for (int c = 0; c < k.lanes; c++) {
            slot[n * per_group + c] = h[n * W + c];
            a.last[(k.b * a.dim + k.first + c) * a.state + n] = h[n * W + c];
        }
}

// From n on, M states of a chunk: gradients of B and C are added to (N, L) of the sample and group.
template <int M, bool first>
SSM_INLINE void adjoint_states(
    const Args& a, const Block& k, const Chunk& s, int64_t n, const float* dy, const float* h, const Adjoint& to,
    float* dB, float* dC) {
    alignas(64) float sum_B[M * T] = {}, sum_C[M * T] = {};
    const Parameters<M> p(a, k, s, n);
    const Adjoint own = {to.lambda + n * W, to.dA + n * W, to.du, to.ddt};
    adjoint_chunk<M, first>(s.tokens, s.dt, s.dtu, dy, p.A, p.B, p.C, h + n * W, own, sum_B, sum_C);
    for (int m = 0; m < M; m++)
        for (int t = 0; t < s.tokens; t++) {
            dB[(n + m) * a.length + s.start + t] += sum_B[m * T + t];
            dC[(n + m) * a.length + s.start + t] += sum_C[m * T + t];
        }
}

static void backward_block(const Args& a, int64_t b, int64_t g, int64_t index, float* dB, float* dC) {
    const Block k = make_block(a, b, g, index);
    Chunk s;
    alignas(64) float dy[TILE], du[TILE], ddt[TILE], y[TILE], gate[TILE];
    alignas(64) float h0[MAX_STATE * W], h[MAX_STATE * W], carry[MAX_STATE * W], dA[MAX_STATE * W];
    const int64_t per_group = a.dim / a.groups;
    const Lanes skip = load_skip(a, k);
    std::memset(carry, 0, sizeof(float) * W * a.state);
    std::memset(dA, 0, sizeof(float) * W * a.state);
    std::memset(h0, 0, sizeof(float) * W * a.state);
    float dD[W] = {}, dbias[W] = {};

    int64_t chunk = (a.length + T - 1) / T;
    while (chunk-- > 0) {
        const float* slot = state_slot(a, k, chunk);
        for (int64_t n = 0; n < a.state; n++) std::memcpy(h0 + n * W, slot + n * per_group, sizeof(float) * k.lanes);
        load_chunk(a, k, chunk * T, true, s);
        load_tile(dy, a.dout, k.b, k.first, k.lanes, s.start, s.tokens);
        for (const Map* map : {&a.u, &a.delta, &a.dout}) prefetch(*map, k.b, k.first, k.lanes, s.start - T, T);
        const int64_t rows = (k.b * a.dim + k.first) * a.length + s.start;

        if (a.z.data) {
            // the output before the gate, again, for the gradient of the gate
            std::memcpy(h, h0, sizeof(float) * W * a.state);
            scan_states(a, k, s, skip, h, y);
            load_tile(gate, a.z, k.b, k.first, k.lanes, s.start, s.tokens);
            for (int i = 0; i < s.tokens * W; i += SIDE * W) {
                const Group z = load_group(gate + i), open = sigmoid(z, exp_minus_magnitude(z));
                const Group gradient = load_group(dy + i);
                SSM_EACH {
                    const Lanes slope = open.v[j] * (z.v[j] * (everywhere(1.0f) - open.v[j]) + 1.0f);
                    store(y + i + j * W, gradient.v[j] * load(y + i + j * W) * slope);
                    store(dy + i + j * W, gradient.v[j] * z.v[j] * open.v[j]);
                }
            }
            store_tile(a.dz + rows, a.length, y, k.lanes, s.tokens);
        }
        fill_up(dy, s.tokens);

        const Adjoint to = {carry, dA, du, ddt};
        int64_t n = a.state % 2;
        if (n)
            adjoint_states<1, true>(a, k, s, 0, dy, h0, to, dB, dC);
        else
            adjoint_states<2, true>(a, k, s, 0, dy, h0, to, dB, dC), n = 2;
        for (; n < a.state; n += 2) adjoint_states<2, false>(a, k, s, n, dy, h0, to, dB, dC);

        finish_adjoint(s.tokens, s.slope, s.dt, s.u, dy, skip, du, ddt, dD, dbias);
        store_tile(a.du + rows, a.length, du, k.lanes, s.tokens);
        store_tile(a.ddelta + rows, a.length, ddt, k.lanes, s.tokens);
    }
    for (int c = 0; c < k.lanes; c++) {
        const int64_t channel = k.b * a.dim + k.first + c;
        a.dD[channel] = dD[c];
        a.dbias[channel] = dbias[c];
        for (int64_t n = 0; n < a.state; n++) a.dA[channel * a.state + n] = dA[n * W + c];
    }
}
