// Depthwise causal convolution with SiLU on the CPU, forward and backward. Mathematics:
// kernels/ssm_ops/causal_conv1d/api.py.
//
// Work is cut into blocks of W channels of one sample, and time into windows, which lie in the first-level cache as
// (token, channel): a tap is then one vector product, whatever the layout of the tensors. A window reaches over its
// tokens as far as the taps do, so that windows do not depend on each other. Gradients of weight and bias are given per
// sample, and the caller adds them: nothing depends on the number of threads.
//
// Shapes: batch B, channels D, tokens L, taps K. Plain C interface, no headers of PyTorch.

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>
#include <vector>

#include "interface.h"

#define SSM_KERNELS "causal_conv1d_kernels.h"
#include "for_each_target.h"

static void run(const ConvArguments& a, void (*block)(const ConvArguments&, int64_t, int64_t)) {
    const int64_t blocks = (a.dim + baseline::W - 1) / baseline::W;
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t i = 0; i < a.batch * blocks; i++) {
        const FadeToZero fade;
        block(a, i / blocks, i % blocks);
    }
}

// Channels-last tokens, forward: parts of the tokens of a sample are the tasks.
static void run_tokens(const ConvArguments& a) {
    constexpr int64_t group = 64, some = 32;
    const int64_t padded = (a.dim + group - 1) / group * group;
    std::vector<float> taps(a.taps * padded), bias(padded);
    for (int64_t c = 0; c < a.dim; c++) {
        for (int64_t j = 0; j < a.taps; j++) taps[j * padded + c] = a.weight[c * a.taps + (a.reverse ? a.taps - 1 - j : j)];
        if (a.bias) bias[c] = a.bias[c];
    }
    const auto tokens = SSM_BEST(forward_tokens);
    const int64_t parts = (a.length + some - 1) / some;
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t i = 0; i < a.batch * parts; i++) {
        const FadeToZero fade;
        const int64_t first = i % parts * some;
        tokens(a, taps.data(), bias.data(), padded, i / parts, first, first + some < a.length ? first + some : a.length);
    }
}

// Do the channels of a token lie side by side?
static bool by_tokens(const ConvArguments& a) { return a.channels_last && a.x.channel == 1 && a.x.repeat == 1; }

// Half precision is taken as it is there, and nowhere else.
static int64_t dtype_of(const ConvArguments& a) {
    return by_tokens(a) && is_floating(a.x.dtype) ? a.x.dtype : int64_t(FLOAT32);
}

// What both directions read.
static Check check(const ConvArguments& a, int64_t dtype) {
    Check c;
    c.that(a.taps >= 1 && a.threads >= 1, "there are %lld taps and %d threads", (long long)a.taps, a.threads);
    check_map(c, "x", a.x, a.batch, a.dim, a.length, dtype);
    c.buffer("weight", a.weight, FLOAT32, a.dim * a.taps);
    c.optional("bias", a.bias, FLOAT32, a.dim);
    return c;
}

extern "C" {

SSM_EXPORT const char* causal_conv1d_forward(const ConvArguments* arguments) {
    const ConvArguments& a = *arguments;
    const int64_t type = dtype_of(a);
    Check c = check(a, type);
    c.buffer("out", a.out, type, a.batch * a.dim * a.length);
    if (c.problem()) return c.problem();
    by_tokens(a) ? run_tokens(a) : run(a, SSM_BEST(forward_block));
    return c.problem();
}

SSM_EXPORT const char* causal_conv1d_backward(const ConvArguments* arguments) {
    const ConvArguments& a = *arguments;
    const int64_t type = a.dout.channel == 1 ? dtype_of(a) : int64_t(FLOAT32);
    Check c = check(a, type);
    check_map(c, "dout", a.dout, a.batch, a.dim, a.length, type);
    c.buffer("dx", a.dx, type, a.batch * a.dim * a.length);
    c.buffer("dweight", a.dweight, FLOAT32, a.batch * a.dim * a.taps);
    c.buffer("dbias", a.dbias, FLOAT32, a.batch * a.dim);
    if (!c.problem()) run(a, SSM_BEST(backward_block));
    return c.problem();
}

}  // extern "C"
