// One part of the channels of the scans over an image, forward and backward; the plan is in ss2d_scan.cpp, which includes
// this once for every instruction set.

#include "recurrence.h"
#include "elements.h"

using Args = Ss2dArguments;

// The blocks of one part of one sample.
struct Part {
    int64_t index, b, first, blocks;  // first channel
};

SSM_INLINE Part make_part(const Args& a, int64_t task) {
    const int64_t index = task / a.batch, all = a.dim / W;
    const int64_t from = index * all / a.parts, to = (index + 1) * all / a.parts;
    return {index, task % a.batch, from * W, to - from};
}

SSM_INLINE int64_t padded(int64_t rank) { return (rank + W - 1) / W * W; }

SSM_INLINE float* state_row(const Args& a, const Part& p, int64_t chunk, int route, int64_t n) {
    return a.states + (((chunk * a.batch + p.b) * a.routes + route) * a.state + n) * a.dim + p.first;
}

// Floats of memory that lasts, handed out piece by piece.
struct Arena {
    float* next;
    float* take(int64_t floats) {
        float* piece = next;
        next += (floats + W - 1) / W * W;
        return piece;
    }
};

// What a part needs of a route's parameters, by block, and of its states.
struct Route {
    float *weight, *turned;   // (block, R', W), (block, W, R') with R' = R padded by zeros
    float *A, *skip, *bias;   // (block, N, W), (block, W), (block, W)
    float *h;                 // (block, N, W): the states, or their gradients in the backward
    float *dweight, *dA, *dD, *dbias;  // as weight, A, skip, bias

    static int64_t floats(const Args& a, int64_t blocks) {
        return blocks * W * (3 * padded(a.rank) + 4 * a.state + 4);
    }

    Route(const Args& a, const Part& p, Arena arena) {
        const int64_t blocks = p.blocks * W, ranks = padded(a.rank);
        weight = arena.take(blocks * ranks), turned = arena.take(blocks * ranks), dweight = arena.take(blocks * ranks);
        A = arena.take(blocks * a.state), h = arena.take(blocks * a.state), dA = arena.take(blocks * a.state);
        skip = arena.take(blocks), bias = arena.take(blocks), dD = arena.take(blocks), dbias = arena.take(blocks);
    }
};

SSM_INLINE void load_route(const Args& a, const Part& p, int route, Route& r) {
    const int64_t ranks = padded(a.rank), channels = p.blocks * W, first = route * a.dim + p.first;
    for (int64_t c = 0; c < channels; c++) {
        std::memcpy(r.turned + c * ranks, a.dt_weight + (first + c) * a.rank, sizeof(float) * a.rank);
        std::memset(r.turned + c * ranks + a.rank, 0, sizeof(float) * (ranks - a.rank));
        for (int64_t n = 0; n < a.state; n++)
            r.A[(c / W * a.state + n) * W + c % W] = a.A[(first + c) * a.state + n];
    }
    for (int64_t c = 0; c < channels; c += W)
        for (int64_t i = 0; i < ranks; i += W)
            transpose(r.turned + c * ranks + i, ranks, r.weight + c * ranks + i * W, W);
    std::memcpy(r.skip, a.D + first, sizeof(float) * channels);
    std::memcpy(r.bias, a.bias + first, sizeof(float) * channels);
    std::memset(r.h, 0, sizeof(float) * channels * a.state);
}

// What all channels share of a chunk of a route.
struct Chunk {
    int tokens;
    int64_t pixel[T];           // its place in the image,
    int64_t at[T], to[T];       // in a map, and in a Sum; up to a whole group that of the last
    float *row;                 // (R + 2 N)', of one token
    float *rank, *B, *C;        // (T, R'), (N, T), (N, T); zeros after the last token
    float *drank, *dB, *dC;     // their gradients

    static int64_t floats(const Args& a) {
        return T * (2 * padded(a.rank) + 4 * a.state) + padded(a.rank + 2 * a.state);
    }

    Chunk(const Args& a, Arena arena) {
        const int64_t ranks = padded(a.rank);
        row = arena.take(padded(a.rank + 2 * a.state));
        rank = arena.take(T * ranks), drank = arena.take(T * ranks);
        B = arena.take(T * a.state), C = arena.take(T * a.state);
        dB = arena.take(T * a.state), dC = arena.take(T * a.state);
        std::memset(rank, 0, sizeof(float) * T * ranks);
        std::memset(B, 0, sizeof(float) * T * a.state);
        std::memset(C, 0, sizeof(float) * T * a.state);
    }
};

// row: of a Sum
SSM_INLINE void load_shared(const Args& a, const Part& p, int route, int64_t start, int64_t row, Chunk& s) {
    const int64_t fields = a.rank + 2 * a.state, ranks = padded(a.rank);
    s.tokens = static_cast<int>(a.length - start < T ? a.length - start : T);
    for (int t = 0; t < s.tokens; t++) {
        s.pixel[t] = a.order[route * a.length + start + t];
        s.at[t] = s.pixel[t] * a.dim, s.to[t] = s.pixel[t] * row;
        const int64_t place = ((p.b * a.length + s.pixel[t]) * a.routes + route) * fields;
        const float* proj = s.row;
        if (a.proj.dtype == FLOAT32)
            proj = static_cast<const float*>(a.proj.data) + place;
        else
            for (int64_t i = 0; i < fields; i += W)
                store(s.row + i, load_any(a.proj.data, a.proj.dtype, place + i, fields - i));
        std::memcpy(s.rank + t * ranks, proj, sizeof(float) * a.rank);
        for (int64_t n = 0; n < a.state; n++) {
            s.B[n * T + t] = proj[a.rank + n];
            s.C[n * T + t] = proj[a.rank + a.state + n];
        }
    }
    for (int t = s.tokens; t < whole_groups(s.tokens); t++) {
        s.at[t] = s.at[s.tokens - 1], s.to[t] = s.to[s.tokens - 1];
        std::memset(s.rank + t * ranks, 0, sizeof(float) * ranks);
        for (int64_t n = 0; n < a.state; n++) s.B[n * T + t] = s.C[n * T + t] = 0.0f;
    }
}

// Products with small matrices keep this many rows of sums in registers.
constexpr int ROWS = NATIVE / 2;
static_assert(T % ROWS == 0, "blocks of rows end where a tile ends");

// Step sizes are formed for so many blocks at once, as registers allow: blocks share the reads of the R numbers.
constexpr int BLOCKS = NATIVE == 16 ? 2 : 1;

// One block of a chunk, and step sizes of those that come next.
struct Tiles {
    alignas(64) float slope[TILE], dtx[TILE], steps[BLOCKS][TILE], x[TILE];
    float* dt;
};

// Of `count` blocks, each: tile (T, W) = bias + rank (T, R') weight (R', W); to the end of a block of rows
template <int count>
SSM_INLINE void raw_step_sizes(
    const Args& a, const Chunk& s, const float* weight, const float* bias, float (*tiles)[TILE]) {
    const int64_t ranks = padded(a.rank);
    for (int t = 0; t < s.tokens; t += ROWS) {
        Lanes sums[count][ROWS];
        for (int i = 0; i < count; i++)
            for (int j = 0; j < ROWS; j++) sums[i][j] = load(bias + i * W);
        for (int64_t r = 0; r < a.rank; r++) {
            Lanes row[count];
            for (int i = 0; i < count; i++) row[i] = load(weight + (i * ranks + r) * W);
            for (int j = 0; j < ROWS; j++)
                for (int i = 0; i < count; i++) sums[i][j] += row[i] * s.rank[(t + j) * ranks + r];
        }
        for (int i = 0; i < count; i++)
            for (int j = 0; j < ROWS; j++) store(tiles[i] + (t + j) * W, sums[i][j]);
    }
}

// Of block i, when its turn comes, and of those after it that share the work; returns those of block i.
SSM_INLINE float* raw_step_sizes(
    const Args& a, const Part& p, const Chunk& s, const Route& r, int64_t i, float (*tiles)[TILE]) {
    const float *weight = r.weight + i * padded(a.rank) * W, *bias = r.bias + i * W;
    if (i % BLOCKS == 0) {
        if (i + BLOCKS <= p.blocks)
            raw_step_sizes<BLOCKS>(a, s, weight, bias, tiles);
        else
            raw_step_sizes<1>(a, s, weight, bias, tiles);
    }
    return tiles[i % BLOCKS];
}

// W channels of a map at a group of pixels
template <typename E>
SSM_INLINE Group gather(const E* map, const int64_t* at) {
    Group x;
    SSM_EACH {
        x.v[j] = load(map + at[j]);
        __builtin_prefetch(map + at[j] + W);  // the next block: pixels are too far apart to be foreseen
    }
    return x;
}

// Where a part sums its channels of the output: there itself, or in memory of its own, (L, channels), if that is not float32.
struct Sum {
    float* data;
    int64_t row;

    static int64_t floats(const Args& a, int64_t blocks) {
        return a.y.data && a.y.dtype != FLOAT32 ? a.length * blocks * W : 0;
    }

    Sum(const Args& a, const Part& p, float* memory) {
        const bool in_place = a.y.dtype == FLOAT32;
        data = in_place ? static_cast<float*>(a.y.data) + p.b * a.length * a.dim + p.first : memory;
        row = in_place ? a.dim : p.blocks * W;
    }
};

// Of the forward: k.dt becomes the step sizes, dtx them times x, y D x.
template <typename E>
SSM_INLINE void load_block(const Chunk& s, const E* map, Lanes skip, Tiles& k, float* y) {
    for (int t = 0; t < s.tokens; t += SIDE) {
        const Group raw = load_group(k.dt + t * W), x = gather(map, s.at + t);
        const Group step = softplus(raw, exp_minus_magnitude(raw));
        store(k.dt + t * W, step);
        SSM_EACH {
            store(k.dtx + (t + j) * W, step.v[j] * x.v[j]);
            store(y + (t + j) * W, x.v[j] * skip);
        }
    }
    fill_up(k.dt, s.tokens);
    fill_up(k.dtx, s.tokens);
}

SSM_INLINE void put(float* to, Lanes y, bool adds) { store(to, adds ? y + load(to) : y); }

// All of the forward for one state, from the raw step sizes to the output, without tiles between. out: this block of a Sum.
template <typename E>
SSM_INLINE void scan_one_state(
    const Chunk& s, const E* map, const float* raw_steps, Lanes skip, Lanes A, float* h, float* out, bool adds) {
    const Lanes exponent = A * LOG2_E;
    Lanes state = load(h);
    for (int t = 0; t < s.tokens; t += SIDE) {
        const Group raw = load_group(raw_steps + t * W), x = gather(map, s.at + t);
        const Group step = softplus(raw, exp_minus_magnitude(raw));
        Group factor;
        SSM_EACH factor.v[j] = step.v[j] * exponent;
        factor = exp2(factor);
        SSM_EACH if (t + j < s.tokens) {
            state = factor.v[j] * state + step.v[j] * x.v[j] * s.B[t + j];
            put(out + s.to[t + j], state * s.C[t + j] + x.v[j] * skip, adds);
        }
    }
    store(h, state);
}

SSM_INLINE void load_lanes(const float* from, int count, Lanes* to) {
    for (int m = 0; m < count; m++) to[m] = load(from + m * W);
}

// M states from n on
template <int M>
SSM_INLINE void scan_states(const Chunk& s, const Tiles& k, int64_t n, const float* A, float* h, float* y) {
    Lanes columns[M];
    load_lanes(A + n * W, M, columns);
    scan_chunk<M>(s.tokens, k.dt, k.dtx, columns, s.B + n * T, s.C + n * T, h + n * W, y);
}

static void forward_part(const Args& a, int64_t task, float* memory) {
    const Part p = make_part(a, task);
    Chunk s(a, {memory});
    Route r(a, p, {memory + Chunk::floats(a)});
    const Sum sum(a, p, memory + Chunk::floats(a) + Route::floats(a, p.blocks));
    Tiles k;
    alignas(64) float y[TILE];
    const int64_t map = p.b * a.length * a.dim + p.first;
    for (int route = 0; route < a.routes; route++) {
        load_route(a, p, route, r);
        for (int64_t start = 0, chunk = 0; start < a.length; start += T, chunk++) {
            load_shared(a, p, route, start, sum.row, s);
            for (int64_t i = 0; i < p.blocks; i++) {
                float* h = r.h + i * a.state * W;
                const float* A = r.A + i * a.state * W;
                for (int64_t n = 0; a.states && n < a.state; n++)
                    store(state_row(a, p, chunk, route, n) + i * W, load(h + n * W));
                k.dt = raw_step_sizes(a, p, s, r, i, k.steps);
                const Lanes skip = load(r.skip + i * W);
                float* out = sum.data + i * W;
                with_element(a.x[route].dtype, [&](auto element) SSM_ALWAYS {
                    const auto* x = static_cast<const decltype(element)*>(a.x[route].data) + map + i * W;
                    if (a.state == 1)
                        scan_one_state(s, x, k.dt, skip, load(A), h, out, route > 0);
                    else
                        load_block(s, x, skip, k, y);
                });
                if (a.state == 1) continue;
                int64_t n = 0;
                for (; n + 3 < a.state; n += 4) scan_states<4>(s, k, n, A, h, y);
                for (; n < a.state; n++) scan_states<1>(s, k, n, A, h, y);
                for (int t = 0; t < s.tokens; t++) put(out + s.to[t], load(y + t * W), route > 0);
            }
        }
    }
    if (a.y.dtype == FLOAT32) return;
    for (int64_t pixel = 0; pixel < a.length; pixel++)
        for (int64_t c = 0; c < sum.row; c += W)
            store_any(a.y.data, a.y.dtype, map + pixel * a.dim + c, load(sum.data + pixel * sum.row + c), W);
}

// dweight (R', W) += rank (T, R')^T ddt (T, W)
SSM_INLINE void add_weight_gradient(const Args& a, const Chunk& s, const float* ddt, float* dweight) {
    const int64_t ranks = padded(a.rank);
    for (int64_t first = 0; first < a.rank; first += ROWS) {
        Lanes sums[ROWS];
        for (int j = 0; j < ROWS; j++) sums[j] = load(dweight + (first + j) * W);
        for (int t = 0; t < s.tokens; t++) {
            const Lanes row = load(ddt + t * W);
            for (int j = 0; j < ROWS; j++) sums[j] += row * s.rank[t * ranks + first + j];
        }
        for (int j = 0; j < ROWS; j++) store(dweight + (first + j) * W, sums[j]);
    }
}

// drank (T, R') += ddt (T, W) turned (W, R'); to the end of a block of rows
SSM_INLINE void add_rank_gradient(const Args& a, Chunk& s, const float* ddt, const float* turned) {
    const int64_t ranks = padded(a.rank);
    for (int64_t first = 0; first < ranks; first += W)
        for (int t = 0; t < s.tokens; t += ROWS) {
            Lanes sums[ROWS];
            for (int j = 0; j < ROWS; j++) sums[j] = load(s.drank + (t + j) * ranks + first);
            for (int c = 0; c < W; c++) {
                const Lanes row = load(turned + c * ranks + first);
                for (int j = 0; j < ROWS; j++) sums[j] += row * ddt[(t + j) * W + c];
            }
            for (int j = 0; j < ROWS; j++) store(s.drank + (t + j) * ranks + first, sums[j]);
        }
}

SSM_INLINE Group gather_any(const Buffer<const void>& map, int64_t first, const int64_t* at) {
    Group x;
    with_element(map.dtype, [&](auto element) SSM_ALWAYS {
        x = gather(static_cast<const decltype(element)*>(map.data) + first, at);
    });
    return x;
}

// Of the backward: k.dt becomes the step sizes, and the other tiles what belongs to them.
SSM_INLINE void load_block(
    const Chunk& s, const Buffer<const void>& map, const Buffer<const void>& gradient, int64_t first, Tiles& k, float* dy) {
    for (int t = 0; t < s.tokens; t += SIDE) {
        const Group raw = load_group(k.dt + t * W), x = gather_any(map, first, s.at + t);
        const Group power = exp_minus_magnitude(raw), step = softplus(raw, power);
        store(k.slope + t * W, sigmoid(raw, power));
        store(k.dt + t * W, step);
        store(k.x + t * W, x);
        store(dy + t * W, gather_any(gradient, first, s.at + t));
        SSM_EACH store(k.dtx + (t + j) * W, step.v[j] * x.v[j]);
    }
    for (float* tile : {k.dt, k.dtx, dy}) fill_up(tile, s.tokens);
}

template <int M, bool first>
SSM_INLINE void adjoint_states(
    const Args& a, Chunk& s, const Tiles& k, int64_t n, const float* dy, const float* A, const float* states,
    const Adjoint& to) {
    Lanes columns[M];
    alignas(64) float h[M * W];
    load_lanes(A + n * W, M, columns);
    for (int m = 0; m < M; m++) store(h + m * W, load(states + (n + m) * a.dim));
    const Adjoint own = {to.lambda + n * W, to.dA + n * W, to.du, to.ddt};
    adjoint_chunk<M, first>(
        s.tokens, k.dt, k.dtx, dy, columns, s.B + n * T, s.C + n * T, h, own, s.dB + n * T, s.dC + n * T);
}

static void backward_part(const Args& a, int64_t task, float* memory) {
    const Part p = make_part(a, task);
    Chunk s(a, {memory});
    Route r(a, p, {memory + Chunk::floats(a)});
    Tiles k;
    alignas(64) float dy[TILE], dx[TILE], ddt[TILE];
    const int64_t map = p.b * a.length * a.dim + p.first, ranks = padded(a.rank), channels = p.blocks * W;
    const int64_t fields = a.rank + 2 * a.state;
    float* dproj = a.dproj + (p.index * a.batch + p.b) * a.length * a.routes * fields;
    for (int route = 0; route < a.routes; route++) {
        load_route(a, p, route, r);
        for (float* sum : {r.dD, r.dbias}) std::memset(sum, 0, sizeof(float) * channels);
        std::memset(r.dA, 0, sizeof(float) * channels * a.state);
        std::memset(r.dweight, 0, sizeof(float) * channels * ranks);
        int64_t chunk = (a.length + T - 1) / T;
        while (chunk-- > 0) {
            load_shared(a, p, route, chunk * T, a.dim, s);
            std::memset(s.drank, 0, sizeof(float) * T * ranks);
            for (float* sum : {s.dB, s.dC}) std::memset(sum, 0, sizeof(float) * T * a.state);
            for (int64_t i = 0; i < p.blocks; i++) {
                k.dt = raw_step_sizes(a, p, s, r, i, k.steps);
                load_block(s, a.x[route], a.dy, map + i * W, k, dy);
                const float *A = r.A + i * a.state * W, *states = state_row(a, p, chunk, route, 0) + i * W;
                const Adjoint to = {r.h + i * a.state * W, r.dA + i * a.state * W, dx, ddt};
                int64_t n = 1;
                if (a.state % 2)
                    adjoint_states<1, true>(a, s, k, 0, dy, A, states, to);
                else
                    adjoint_states<2, true>(a, s, k, 0, dy, A, states, to), n = 2;
                for (; n < a.state; n += 2) adjoint_states<2, false>(a, s, k, n, dy, A, states, to);
                finish_adjoint(
                    s.tokens, k.slope, k.dt, k.x, dy, load(r.skip + i * W), dx, ddt, r.dD + i * W, r.dbias + i * W);
                add_weight_gradient(a, s, ddt, r.dweight + i * ranks * W);
                add_rank_gradient(a, s, ddt, r.turned + i * ranks * W);
                float* out = a.dx[route] + map + i * W;
                if (route == 0 || a.dx[route] != a.dx[route - 1])
                    for (int t = 0; t < s.tokens; t++) store(out + s.at[t], load(dx + t * W));
                else
                    for (int t = 0; t < s.tokens; t++) add_to(out + s.at[t], load(dx + t * W));
            }
            for (int t = 0; t < s.tokens; t++) {
                float* to = dproj + (s.pixel[t] * a.routes + route) * fields;
                std::memcpy(to, s.drank + t * ranks, sizeof(float) * a.rank);
                for (int64_t n = 0; n < a.state; n++) {
                    to[a.rank + n] = s.dB[n * T + t];
                    to[a.rank + a.state + n] = s.dC[n * T + t];
                }
            }
        }
        const int64_t row = (p.b * a.routes + route) * a.dim + p.first;
        std::memcpy(a.dD + row, r.dD, sizeof(float) * channels);
        std::memcpy(a.dbias + row, r.dbias, sizeof(float) * channels);
        for (int64_t c = 0; c < channels; c += W)
            for (int64_t i = 0; i < ranks; i += W)  // turned is read no more
                transpose(r.dweight + c * ranks + i * W, W, r.turned + c * ranks + i, ranks);
        for (int64_t c = 0; c < channels; c++) {
            std::memcpy(a.ddt_weight + (row + c) * a.rank, r.turned + c * ranks, sizeof(float) * a.rank);
            for (int64_t n = 0; n < a.state; n++)
                a.dA[(row + c) * a.state + n] = r.dA[(c / W * a.state + n) * W + c % W];
        }
    }
}

// Floats that a thread needs.
static int64_t workspace(const Args& a) {
    const int64_t blocks = (a.dim / W + a.parts - 1) / a.parts;
    return Chunk::floats(a) + Route::floats(a, blocks) + Sum::floats(a, blocks);
}
