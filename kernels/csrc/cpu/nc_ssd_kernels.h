// Tiles of non-causal SSD; the plan is in nc_ssd.cpp, which includes this once for every instruction set.
//
// Matrices of a tile are (token, number), their numbers padded with zeros to whole vectors: N' of a state, P' of a head.

#include "lanes.h"
#include "elements.h"
#include "products.h"

constexpr int64_t T = TILE_TOKENS;

// Floats of a thread: four matrices of a tile with N', and three with P'.
static int64_t workspace(const NcSsdArguments& a) {
    return T * (4 * whole_vectors(a.state_size) + 3 * whole_vectors(a.channels));
}

struct Tile {
    int64_t b, start, tokens;
};

SSM_INLINE Tile tile_at(const NcSsdArguments& a, int64_t b, int64_t tile) {
    const int64_t start = tile * a.length / a.tiles;
    return {b, start, (tile + 1) * a.length / a.tiles - start};
}

SSM_INLINE int64_t offset(const Rows& r, const Tile& at, int64_t t, int64_t head) {
    return at.b * r.batch + (at.start + t) * r.token + head * r.head;
}

// tile[t] = r[b, start + t, head], times weight[t] where there are weights
SSM_INLINE void load_rows(float* tile, const Rows& r, const Tile& at, int64_t head, const float* weight = nullptr) {
    const int64_t count = r.size[3], width = whole_vectors(count);
    for (int64_t t = 0; t < at.tokens; t++)
        for (int64_t c = 0; c < count; c += W) {
            const Lanes x = load_any(r.data, r.dtype, offset(r, at, t, head) + c, count - c);
            store(tile + t * width + c, weight ? x * weight[t] : x);
        }
}

// The same as a factor of a product: where it lies if it can be read there, else in `tile`.
SSM_INLINE Left rows_of(float* tile, const Rows& r, const Tile& at, int64_t head) {
    if (r.dtype == FLOAT32) return {static_cast<const float*>(r.data) + offset(r, at, 0, head), r.token, 1};
    load_rows(tile, r, at, head);
    return {tile, whole_vectors(r.size[3]), 1};
}

// What becomes of dt: raw = dt + bias; step = softplus(raw) or raw; weight = rate step with rate = -A or A.
struct Steps {
    float rate;
    alignas(64) float step[T], weight[T], slope[T];  // slope: the derivative of step
};

SSM_INLINE void load_steps(Steps& s, const NcSsdArguments& a, const Tile& at, int64_t head) {
    alignas(64) float raw[T] = {};
    const float* dt = a.dt.data + at.b * a.dt.batch + head * a.dt.channel + at.start * a.dt.time;
    for (int64_t t = 0; t < at.tokens; t++) raw[t] = dt[t * a.dt.time] + (a.bias.data ? a.bias.data[head] : 0.0f);
    s.rate = a.positive ? -a.A.data[head] : a.A.data[head];
    for (int64_t t = 0; t < T; t += SIDE * W) {
        Group step = load_group(raw + t), slope;
        SSM_EACH slope.v[j] = everywhere(1.0f);
        if (a.softplus) {
            const Group x = step, power = exp_minus_magnitude(x);
            step = softplus(x, power);
            slope = sigmoid(x, power);
        }
        store(s.step + t, step);
        store(s.slope + t, slope);
        SSM_EACH step.v[j] = step.v[j] * s.rate;
        store(s.weight + t, step);
    }
}

// sums[part] = sum over the tokens of a part of B x^T, x weighted or not; task = (part, b, head)
SSM_INLINE void sum_part(const NcSsdArguments& a, int64_t task, float* memory, const Rows& B, const Rows& x, bool weighted) {
    const int64_t states = whole_vectors(a.state_size), channels = whole_vectors(a.channels);
    const int64_t part = task / (a.batch * a.heads), b = task / a.heads % a.batch, head = task % a.heads;
    float* const sum = a.sums.data + task * a.state_size * channels;
    float *const left = memory, *const right = memory + T * states;
    std::memset(sum, 0, sizeof(float) * a.state_size * channels);
    for (int64_t tile = part * a.tiles / a.parts; tile < (part + 1) * a.tiles / a.parts; tile++) {
        const Tile at = tile_at(a, b, tile);
        Steps s;
        if (weighted) load_steps(s, a, at, head);
        load_rows(left, B, at, head % a.groups);  // a copy, as it is read along the tokens, which lie far apart
        load_rows(right, x, at, head, weighted ? s.weight : nullptr);
        add_product({left, 1, states}, {right, channels}, {sum, channels}, a.state_size, at.tokens, channels);
    }
}

static void state_part(const NcSsdArguments& a, int64_t task, float* memory) { sum_part(a, task, memory, a.B, a.x, true); }

static void state_gradient_part(const NcSsdArguments& a, int64_t task, float* memory) {
    sum_part(a, task, memory, a.C, a.dy, false);
}

// The parts of a head's sum added to the first of them; task = (b, head)
static void add_parts(const NcSsdArguments& a, int64_t task, float*) {
    const int64_t size = a.state_size * whole_vectors(a.channels);
    float* const sum = a.sums.data + task * size;
    for (int64_t part = 1; part < a.parts; part++)
        for (int64_t i = 0; i < size; i += W) add_to(sum + i, load(sum + part * a.batch * a.heads * size + i));
}

// y = S C + D x; task = (b, tile, head)
static void output_tile(const NcSsdArguments& a, int64_t task, float* memory) {
    const int64_t channels = whole_vectors(a.channels), b = task / (a.tiles * a.heads), head = task % a.heads;
    const Tile at = tile_at(a, b, task / a.heads % a.tiles);
    const Left C = rows_of(memory, a.C, at, head % a.groups);
    const int64_t place = ((b * a.length + at.start) * a.heads + head) * a.channels, row = a.heads * a.channels;
    const bool in_place = a.out.dtype == FLOAT32 && channels == a.channels;
    const Result y = in_place ? Result{static_cast<float*>(a.out.data) + place, row}
                              : Result{memory + T * whole_vectors(a.state_size), channels};
    for (int64_t t = 0; t < at.tokens; t++)
        for (int64_t p = 0; p < a.channels; p += W) {
            const int64_t left = a.channels - p;
            Lanes skip = everywhere(0.0f);
            if (a.D.data)
                skip = load_some(a.D.data + head * a.channels + p, left) *
                       load_any(a.x.data, a.x.dtype, offset(a.x, at, t, head) + p, left);
            store(y.data + t * y.row + p, skip);
        }
    const Right state = {a.sums.data + (b * a.heads + head) * a.state_size * channels, channels};
    add_product(C, state, y, at.tokens, a.state_size, channels);
    if (in_place) return;
    for (int64_t t = 0; t < at.tokens; t++)
        for (int64_t p = 0; p < a.channels; p += W)
            store_any(a.out.data, a.out.dtype, place + t * row + p, load(y.data + t * y.row + p), a.channels - p);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// (N, P') -> (P', N')
SSM_INLINE void turn(const float* from, float* to, int64_t n_state, int64_t channels) {
    const int64_t states = whole_vectors(n_state);
    if (states != n_state) std::memset(to, 0, sizeof(float) * channels * states);
    for (int64_t p = 0; p < channels; p += W) {
        int64_t n = 0;
        for (; n + W <= n_state; n += W) transpose(from + n * channels + p, channels, to + p * states + n, states);
        for (; n < n_state; n++)
            for (int64_t i = 0; i < W; i++) to[(p + i) * states + n] = from[n * channels + p + i];
    }
}

// The gradient of a head's state, and both that and the state turned; task = (b, head)
static void finish_state_gradient(const NcSsdArguments& a, int64_t task, float* memory) {
    const int64_t channels = whole_vectors(a.channels), size = a.state_size * channels;
    const int64_t turned = channels * whole_vectors(a.state_size);
    add_parts(a, task, memory);
    turn(a.sums.data + task * size, a.turned.data + task * turned, a.state_size, channels);
    turn(a.state.data + task * size, a.turned.data + (a.batch * a.heads + task) * turned, a.state_size, channels);
}

// Of one head and tile: dx, ddt and the sums of dA and dD, given x, dy and dv, the gradient of w x.
SSM_INLINE void head_gradients(
    const NcSsdArguments& a, const Tile& at, int64_t tile, int64_t head, const Steps& s, const float* dv) {
    const int64_t channels = whole_vectors(a.channels), place = (at.b * a.tiles + tile) * a.heads + head;
    float dA = 0.0f;
    float* const dD = a.D.data ? a.dD.data + place * a.channels : nullptr;
    if (dD) std::memset(dD, 0, sizeof(float) * a.channels);
    for (int64_t t = 0; t < at.tokens; t++) {
        const int64_t token = (at.b * a.length + at.start + t) * a.heads + head;
        Lanes products = everywhere(0.0f);
        for (int64_t p = 0; p < a.channels; p += W) {
            const int64_t left = a.channels - p;
            const Lanes x = load_any(a.x.data, a.x.dtype, offset(a.x, at, t, head) + p, left);
            const Lanes gradient = load(dv + t * channels + p);
            products += gradient * x;
            Lanes dx = gradient * s.weight[t];
            if (dD) {
                const Lanes given = load_any(a.dy.data, a.dy.dtype, offset(a.dy, at, t, head) + p, left);
                dx += given * load_some(a.D.data + head * a.channels + p, left);
                store_some(dD + p, load_some(dD + p, left) + given * x, left);
            }
            store_any(a.dx.data, a.dx.dtype, token * a.channels + p, dx, left);
        }
        const float d_weight = sum_of(products);
        a.ddt.data[token] = d_weight * s.rate * s.slope[t];
        dA += d_weight * s.step[t];
    }
    a.dA.data[place] = a.positive ? -dA : dA;
}

SSM_INLINE void store_rows(const Buffer<void>& to, const NcSsdArguments& a, const Tile& at, int64_t group, const float* tile) {
    const int64_t states = whole_vectors(a.state_size);
    for (int64_t t = 0; t < at.tokens; t++)
        for (int64_t n = 0; n < a.state_size; n += W) {
            const int64_t place = ((at.b * a.length + at.start + t) * a.groups + group) * a.state_size + n;
            store_any(to.data, to.dtype, place, load(tile + t * states + n), a.state_size - n);
        }
}

// All gradients of a tile; task = (b, tile). `sums` holds the gradient of the state, `turned` that and the state.
static void gradient_tile(const NcSsdArguments& a, int64_t task, float* memory) {
    const int64_t states = whole_vectors(a.state_size), channels = whole_vectors(a.channels);
    const int64_t b = task / a.tiles, tile = task % a.tiles;
    const Tile at = tile_at(a, b, tile);
    float *const dB = memory, *const dC = dB + T * states, *const room = dC + T * states;
    float *const x = room + 2 * T * states, *const dy = x + T * channels, *const dv = dy + T * channels;
    for (int64_t group = 0; group < a.groups; group++) {
        const Left B = rows_of(room, a.B, at, group);
        std::memset(dB, 0, sizeof(float) * 2 * T * states);
        for (int64_t head = group; head < a.heads; head += a.groups) {
            const int64_t place = b * a.heads + head;
            const float* const d_state_turned = a.turned.data + place * channels * states;
            const float* const state_turned = d_state_turned + a.batch * a.heads * channels * states;
            Steps s;
            load_steps(s, a, at, head);
            load_rows(x, a.x, at, head, s.weight);
            std::memset(dv, 0, sizeof(float) * at.tokens * channels);
            const Left given = rows_of(dy, a.dy, at, head);
            add_product(given, {state_turned, states}, {dC, states}, at.tokens, a.channels, states);
            add_product({x, channels, 1}, {d_state_turned, states}, {dB, states}, at.tokens, a.channels, states);
            const Right d_state = {a.sums.data + place * a.state_size * channels, channels};
            add_product(B, d_state, {dv, channels}, at.tokens, a.state_size, channels);
            head_gradients(a, at, tile, head, s, dv);
        }
        store_rows(a.dB, a, at, group, dB);
        store_rows(a.dC, a, at, group, dC);
    }
}
