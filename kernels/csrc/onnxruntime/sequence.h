// SelectiveScan and CausalConv1d, by the functions of csrc/cpu of the same names.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "runtime.h"

namespace ssm {

// u, delta (B, D, L), A (D, N), B, C (B, G, N, L), D, delta_bias (D) -> y (B, D, L)
//
// A task is a part of the channels of a group of one sample, which lie side by side: nothing is copied.
struct SelectiveScan {
    static constexpr const char* name = "SelectiveScan";
    static constexpr size_t inputs = 7;
    int64_t softplus;

    template <typename Attributes>
    explicit SelectiveScan(const Attributes& of) : softplus(of.integer("softplus")) {}

    void run(const Call& call) const {
        const Tensor u = call.input(0, "u", 3), delta = call.input(1, "delta", 3), A = call.input(2, "A", 2);
        const Tensor B = call.input(3, "B", 4), C = call.input(4, "C", 4);
        const Tensor D = call.input(5, "D", 1), bias = call.input(6, "delta_bias", 1);
        const int64_t batch = u.shape[0], dim = u.shape[1], length = u.shape[2], groups = B.shape[1], state = A.shape[1];
        expect(groups >= 1 && dim % groups == 0, "the groups of B do not divide the channels of u");
        expect(delta.shape == u.shape && A.shape[0] == dim && D.shape[0] == dim && bias.shape[0] == dim,
               "delta, A, D and delta_bias do not fit the channels of u");
        expect(B.shape == Shape({batch, groups, state, length}) && C.shape == B.shape, "B and C do not fit u and A");
        float* y = call.output(u.shape);
        if (batch * length == 0) return;

        const int64_t each = dim / groups, blocks = (each + BLOCK - 1) / BLOCK, chunks = (length + CHUNK - 1) / CHUNK;
        const int64_t parts = parts_of_sample(batch * groups, blocks);
        call.parallel(batch * groups * parts, [&](int64_t task) {
            const int64_t part = task % parts, g = task / parts % groups, b = task / parts / groups;
            const int64_t first = part * blocks / parts * BLOCK;
            const int64_t own = std::min((part + 1) * blocks / parts * BLOCK, each) - first;
            const int64_t channel = g * each + first, at = (b * dim + channel) * length;
            const auto map = [&](const Tensor& x) {
                return Map{x.data + at, FLOAT32, {1, own, length}, own * length, length, 1, 1};
            };
            const auto states_of = [&](const Tensor& x) {
                const float* data = x.data + (b * groups + g) * state * length;
                return StateMap{data, FLOAT32, {1, 1, state, length}, state * length, state * length, length, 1};
            };
            const Scratch memory((chunks + 1) * state * own + own * state);
            ScanArguments a{};
            a.u = map(u), a.delta = map(delta), a.B = states_of(B), a.C = states_of(C);
            a.z.repeat = a.dout.repeat = 1;
            a.A = reading(A.data + channel * state, own * state), a.D = reading(D.data + channel, own);
            a.bias = reading(bias.data + channel, own);
            a.out = writing(y + at, own * length), a.last = writing(memory, own * state);
            a.states = writing(memory + own * state, (chunks + 1) * state * own);
            a.batch = a.groups = a.threads = 1, a.dim = own, a.length = length, a.state = state;
            a.softplus = static_cast<int32_t>(softplus);
            return selective_scan_forward(&a);
        });
    }
};

// x (B, L, D), weight (D, K), bias (D) -> y (B, L, D)
//
// A task is a run of tokens of one sample. The convolution needs K - 1 tokens beside them, whose results are dropped.
struct CausalConv1d {
    static constexpr const char* name = "CausalConv1d";
    static constexpr size_t inputs = 3;
    static constexpr int64_t RUN = 64;  // tokens, whose numbers stay in a cache
    int64_t silu, reverse;

    template <typename Attributes>
    explicit CausalConv1d(const Attributes& of) : silu(of.integer("silu")), reverse(of.integer("reverse")) {}

    void run(const Call& call) const {
        const Tensor x = call.input(0, "x", 3), weight = call.input(1, "weight", 2), bias = call.input(2, "bias", 1);
        const int64_t batch = x.shape[0], length = x.shape[1], dim = x.shape[2], taps = weight.shape[1];
        expect(weight.shape[0] == dim && bias.shape[0] == dim, "weight and bias do not fit the channels of x");
        float* y = call.output(x.shape);
        if (batch * length == 0) return;
        const int64_t runs = (length + RUN - 1) / RUN;
        call.parallel(batch * runs, [&](int64_t task) {
            const int64_t b = task / runs, first = task % runs * RUN, last = std::min(first + RUN, length);
            const int64_t from = reverse ? first : std::max<int64_t>(first - (taps - 1), 0);
            const int64_t to = reverse ? std::min(last + taps - 1, length) : last;
            const Scratch out((to - from) * dim);
            ConvArguments a{};
            a.x = {x.data + (b * length + from) * dim, FLOAT32, {1, dim, to - from}, (to - from) * dim, 1, dim, 1};
            a.dout.repeat = 1;
            a.weight = reading(weight.data, dim * taps), a.bias = reading(bias.data, dim);
            a.out = writing(out, (to - from) * dim);
            a.batch = a.threads = 1, a.dim = dim, a.length = to - from, a.taps = taps;
            a.silu = static_cast<int32_t>(silu), a.reverse = static_cast<int32_t>(reverse), a.channels_last = 1;
            const char* problem = causal_conv1d_forward(&a);
            if (problem == nullptr)
                std::memcpy(y + (b * length + first) * dim, out + (first - from) * dim, sizeof(float) * (last - first) * dim);
            return problem;
        });
    }
};

}  // namespace ssm
