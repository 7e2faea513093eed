// One chunk of the recurrence h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = C_t h_t, and its adjoint, for one n.
//
// Tiles are (token, channel), W channels wide; A is a number per channel, B_t and C_t a number per token.
#pragma once

#include "lanes.h"

constexpr int T = 64;  // tokens of a chunk; STATE_CHUNK["cpu"] of the operators
constexpr int MAX_STATE = 256;

// Floats of a tile (T, W), and a cache line more: tiles lie one behind the other on the stack, and if equal places of all
// of them had equal addresses modulo 4096, a load would wait for the store to another tile before it.
constexpr int TILE = T * W + W;

// h: the state before the chunk, becomes the one after it. y += C h.
SSM_INLINE void scan_chunk(
    int tokens, const float* dt, const float* dtu, const float* A, const float* B, const float* C, float* h, float* y) {
    float state[W];
    std::memcpy(state, h, sizeof(state));
    for (int t = 0; t < tokens; t++)
        SSM_LANES(c, W) {
            state[c] = fast_exp(dt[t * W + c] * A[c]) * state[c] + dtu[t * W + c] * B[t];
            y[t * W + c] += state[c] * C[t];
        }
    std::memcpy(h, state, sizeof(state));
}

// sums[t] = sum over the channels of tile[t]; W tokens at a time, turned so that the additions are vector operations.
// Writes up to the next multiple of W tokens.
SSM_INLINE void sum_lanes(const float* tile, int tokens, float* sums) {
    alignas(64) float turned[W * W];
    for (int start = 0; start < tokens; start += W) {
        transpose(tile + start * W, W, turned, W);
        float sum[W] = {};
        SSM_LANES(c, W)
            SSM_LANES(t, W) sum[t] += turned[c * W + t];
        std::memcpy(sums + start, sum, sizeof(sum));
    }
}

// What the adjoint of a chunk adds to, besides the gradients of B and C.
struct Adjoint {
    float* lambda;  // (W): exp(dt A) times the gradient of the state after the chunk; becomes that before it
    float* dA;      // (W)
    float* du;      // (T, W): += lambda B, to be multiplied by dt
    float* ddt;     // (T, W): += lambda exp(dt A) h_{t-1} A; the part through dt u B is du times u
};

// From the state before the chunk and dy, the gradient of y; dB, dC: (T), sums over the channels, overwritten up to a
// multiple of W.
SSM_INLINE void adjoint_chunk(
    int tokens, const float* dt, const float* dtu, const float* dy, const float* A, const float* B, const float* C,
    const float* h, const Adjoint& to, float* dB, float* dC) {
    alignas(64) float kept[TILE], factor[TILE], to_B[TILE];
    float state[W], lambda[W], dA[W] = {};
    std::memcpy(state, h, sizeof(state));
    for (int t = 0; t < tokens; t++)
        SSM_LANES(c, W) {
            const int i = t * W + c;
            factor[i] = fast_exp(dt[i] * A[c]);
            kept[i] = factor[i] * state[c];  // what is left of the state before the token
            state[c] = kept[i] + dtu[i] * B[t];
        }
    std::memcpy(lambda, to.lambda, sizeof(lambda));
    for (int t = tokens - 1; t >= 0; t--)
        SSM_LANES(c, W) {
            const int i = t * W + c;
            lambda[c] += dy[i] * C[t];
            const float decay = lambda[c] * kept[i];
            to.du[i] += lambda[c] * B[t];
            to.ddt[i] += decay * A[c];
            dA[c] += decay * dt[i];
            to_B[i] = lambda[c] * dtu[i];
            kept[i] = (kept[i] + dtu[i] * B[t]) * dy[i];  // from here on the share of dC
            lambda[c] *= factor[i];
        }
    std::memcpy(to.lambda, lambda, sizeof(lambda));
    SSM_LANES(c, W) to.dA[c] += dA[c];
    sum_lanes(to_B, tokens, dB);
    sum_lanes(kept, tokens, dC);
}

// The gradients of u and of the raw step size (before softplus), once du and ddt have been summed over n.
// skip: D of every channel; dD, dbias: (W), +=. Sums over time are formed per chunk first, for the sake of precision.
SSM_INLINE void finish_adjoint(
    int tokens, const float* raw, const float* dt, const float* u, const float* dy, const float* skip, bool softplus,
    float* du, float* ddt, float* dD, float* dbias) {
    SSM_LANES(i, tokens * W) ddt[i] += du[i] * u[i];
    if (softplus)
        SSM_LANES(i, tokens * W) {
            const float slope = sigmoid(raw[i]);
            ddt[i] *= raw[i] > 20.0f ? 1.0f : slope;
        }
    float sum_D[W] = {}, sum_bias[W] = {};
    for (int t = 0; t < tokens; t++)
        SSM_LANES(c, W) {
            const int i = t * W + c;
            sum_bias[c] += ddt[i];
            sum_D[c] += dy[i] * u[i];
            du[i] = du[i] * dt[i] + dy[i] * skip[c];
        }
    SSM_LANES(c, W) {
        dD[c] += sum_D[c];
        dbias[c] += sum_bias[c];
    }
}
