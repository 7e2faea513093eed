// One chunk of the recurrence h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = C_t h_t, and its adjoint, for one n.
//
// Tiles are (token, channel), W channels wide; A is a number per channel, B_t and C_t a number per token.
#pragma once

#include "lanes.h"

constexpr int T = 64;  // tokens of a chunk; STATE_CHUNK["cpu"] of the operators
constexpr int MAX_STATE = 256;

// h: the state before the chunk, becomes the one after it. y += C h.
SSM_INLINE void scan_chunk(
    int tokens, const float* dt, const float* dtu, const float* A, const float* B, const float* C, float* h, float* y) {
    float state[W];
    std::memcpy(state, h, sizeof(state));
    for (int t = 0; t < tokens; t++)
        for (int c = 0; c < W; c++) {
            state[c] = fast_exp(dt[t * W + c] * A[c]) * state[c] + dtu[t * W + c] * B[t];
            y[t * W + c] += state[c] * C[t];
        }
    std::memcpy(h, state, sizeof(state));
}

// What the adjoint of a chunk adds to, besides the gradients of B and C.
struct Adjoint {
    float* lambda;  // (W): exp(dt A) times the gradient of the state after the chunk; becomes that before it
    float* dA;      // (W)
    float* du;      // (T, W): += lambda B, to be multiplied by dt
    float* ddt;     // (T, W): += lambda exp(dt A) h_{t-1} A; the part through dt u B is du times u
};

// From the state before the chunk and dy, the gradient of y; dB, dC: (T), sums over the channels, overwritten.
SSM_INLINE void adjoint_chunk(
    int tokens, const float* dt, const float* dtu, const float* dy, const float* A, const float* B, const float* C,
    const float* h, const Adjoint& to, float* dB, float* dC) {
    alignas(64) float kept[T * W], factor[T * W], to_B[T * W];
    float state[W], lambda[W], dA[W] = {};
    std::memcpy(state, h, sizeof(state));
    for (int t = 0; t < tokens; t++)
        for (int c = 0; c < W; c++) {
            const int i = t * W + c;
            factor[i] = fast_exp(dt[i] * A[c]);
            kept[i] = factor[i] * state[c];  // what is left of the state before the token
            state[c] = kept[i] + dtu[i] * B[t];
        }
    std::memcpy(lambda, to.lambda, sizeof(lambda));
    for (int t = tokens - 1; t >= 0; t--)
        for (int c = 0; c < W; c++) {
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
    for (int c = 0; c < W; c++) to.dA[c] += dA[c];
    for (int t = 0; t < tokens; t++) {
        for (int half = W / 2; half > 0; half /= 2)
            for (int c = 0; c < half; c++) {
                to_B[t * W + c] += to_B[t * W + c + half];
                kept[t * W + c] += kept[t * W + c + half];
            }
        dB[t] = to_B[t * W];
        dC[t] = kept[t * W];
    }
}

// The gradients of u and of the raw step size (before softplus), once du and ddt have been summed over n.
// skip: D of every channel; dD, dbias: (W), +=. Sums over time are formed per chunk first, for the sake of precision.
SSM_INLINE void finish_adjoint(
    int tokens, const float* raw, const float* dt, const float* u, const float* dy, const float* skip, bool softplus,
    float* du, float* ddt, float* dD, float* dbias) {
    float sum_D[W] = {}, sum_bias[W] = {};
    for (int t = 0; t < tokens; t++)
        for (int c = 0; c < W; c++) {
            const int i = t * W + c;
            float d = ddt[i] + du[i] * u[i];
            if (softplus) d = raw[i] > 20.0f ? d : d * sigmoid(raw[i]);
            ddt[i] = d;
            sum_bias[c] += d;
            sum_D[c] += dy[i] * u[i];
            du[i] = du[i] * dt[i] + dy[i] * skip[c];
        }
    for (int c = 0; c < W; c++) {
        dD[c] += sum_D[c];
        dbias[c] += sum_bias[c];
    }
}
