// One chunk of the recurrence h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = C_t h_t, and its adjoint, for M states n at
// once, which share the loads of everything else.
//
// Tiles are (token, channel), W channels wide; A is a number per channel, B_t and C_t a number per token, (n, T) in
// memory. Tokens come in groups of SIDE: a chunk that ends within a group is filled up with tokens that change nothing,
// whose dt, dt u, B, C and dy are 0. Included by for_each_target.h.

#include "lanes.h"

constexpr int T = CHUNK;  // tokens

// Floats of a tile (T, W), and eight cache lines more: tiles lie one behind the other on the stack, and if equal places of all
// of them had equal addresses modulo 4096, a load would wait for the store to another tile before it.
constexpr int TILE = T * W + 8 * W;

SSM_INLINE int whole_groups(int tokens) { return (tokens + SIDE - 1) / SIDE * SIDE; }

// tile[t] = 0 from the last token to the end of its group
SSM_INLINE void fill_up(float* tile, int tokens) {
    std::memset(tile + tokens * W, 0, sizeof(float) * W * (whole_groups(tokens) - tokens));
}

// exp(dt A) of a group of tokens; A comes times log2(e)
SSM_INLINE Group decays(const float* dt, Lanes A) {
    Group x = load_group(dt);
    SSM_EACH x.v[j] = x.v[j] * A;
    return exp2(x);
}

// h: (M, W), the states before the chunk, become those after it. y += sum_n C h.
template <int M>
SSM_INLINE void scan_chunk(
    int tokens, const float* dt, const float* dtu, const Lanes* A, const float* B, const float* C, float* h, float* y) {
    Lanes state[M], exponent[M];
    for (int m = 0; m < M; m++) {
        state[m] = load(h + m * W);
        exponent[m] = A[m] * LOG2_E;
    }
    for (int t = 0; t < tokens; t += SIDE) {
        Group factor[M];
        for (int m = 0; m < M; m++) factor[m] = decays(dt + t * W, exponent[m]);
        SSM_EACH {
            const Lanes input = load(dtu + (t + j) * W);
            Lanes sum = load(y + (t + j) * W);
            for (int m = 0; m < M; m++) {
                state[m] = factor[m].v[j] * state[m] + input * B[m * T + t + j];
                sum += state[m] * C[m * T + t + j];
            }
            store(y + (t + j) * W, sum);
        }
    }
    for (int m = 0; m < M; m++) store(h + m * W, state[m]);
}

// What the adjoint of a chunk adds to, besides the gradients of B and C.
struct Adjoint {
    float* lambda;  // (M, W): exp(dt A) times the gradient of the state after the chunk; becomes that before it
    float* dA;      // (M, W)
    float* du;      // (T, W): += sum_n lambda B, to be multiplied by dt
    float* ddt;     // (T, W): += sum_n lambda exp(dt A) h_{t-1} A; the part through dt u B is du times u
};

// From the states before the chunk, h (M, W), and dy, the gradient of y. dB, dC: (M, T), += sums over the channels, up to
// a multiple of W tokens. `first`: du and ddt are written, not added to.
template <int M, bool first>
SSM_INLINE void adjoint_chunk(
    int tokens, const float* dt, const float* dtu, const float* dy, const Lanes* A, const float* B, const float* C,
    const float* h, const Adjoint& to, float* dB, float* dC) {
    alignas(64) float factor[M][TILE], left[M][TILE], to_B[M][TILE], to_C[M][TILE];
    Lanes state[M], lambda[M], dA[M], exponent[M];
    for (int m = 0; m < M; m++) {
        state[m] = load(h + m * W);
        lambda[m] = load(to.lambda + m * W);
        dA[m] = Lanes{};
        exponent[m] = A[m] * LOG2_E;
    }
    for (int t = 0; t < tokens; t += SIDE)
        for (int m = 0; m < M; m++) {
            const Group f = decays(dt + t * W, exponent[m]);
            store(factor[m] + t * W, f);
            SSM_EACH {
                const int i = (t + j) * W;
                store(left[m] + i, f.v[j] * state[m]);  // what is left of the state before the token
                state[m] = f.v[j] * state[m] + load(dtu + i) * B[m * T + t + j];
                store(to_C[m] + i, state[m] * load(dy + i));
            }
        }
    for (int t = whole_groups(tokens) - 1; t >= 0; t--) {
        const int i = t * W;
        const Lanes gradient = load(dy + i), input = load(dtu + i), step = load(dt + i);
        Lanes through_B = first ? Lanes{} : load(to.du + i), through_A = first ? Lanes{} : load(to.ddt + i);
        for (int m = 0; m < M; m++) {
            const Lanes own = gradient * C[m * T + t], f = load(factor[m] + i);
            const Lanes sum = lambda[m] + own, decay = sum * load(left[m] + i);
            through_B += sum * B[m * T + t];
            through_A += decay * A[m];
            dA[m] += decay * step;
            store(to_B[m] + i, sum * input);
            lambda[m] = f * lambda[m] + f * own;  // f * sum, but each token waits for one operation of the next only
        }
        store(to.du + i, through_B);
        store(to.ddt + i, through_A);
    }
    for (int m = 0; m < M; m++) {
        store(to.lambda + m * W, lambda[m]);
        add_to(to.dA + m * W, dA[m]);
        for (int t = 0; t < tokens; t += W) {
            add_to(dB + m * T + t, sum_rows(to_B[m] + t * W));
            add_to(dC + m * T + t, sum_rows(to_C[m] + t * W));
        }
    }
}

// The gradients of u and of the raw step size (before softplus, of which slope is the derivative), once du and ddt have
// been summed over n. skip: D of every channel; dD, dbias: (W), +=. Sums over time are formed per chunk first, for the
// sake of precision.
SSM_INLINE void finish_adjoint(
    int tokens, const float* slope, const float* dt, const float* u, const float* dy, Lanes skip, float* du, float* ddt,
    float* dD, float* dbias) {
    Lanes sum_D{}, sum_bias{};
    for (int i = 0; i < tokens * W; i += W) {
        const Lanes input = load(u + i), gradient = load(dy + i), through_B = load(du + i);
        const Lanes raw = (load(ddt + i) + through_B * input) * load(slope + i);
        store(ddt + i, raw);
        store(du + i, through_B * load(dt + i) + gradient * skip);
        sum_bias += raw;
        sum_D += gradient * input;
    }
    add_to(dD, sum_D);
    add_to(dbias, sum_bias);
}
