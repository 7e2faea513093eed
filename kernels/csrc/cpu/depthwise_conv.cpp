// The 3x3 depthwise convolution of a channels-last map with SiLU on the CPU, for inference. Mathematics:
// kernels/ssm_ops/depthwise_conv/api.py.
//
// A task is a row of the map. It goes through W channels after W channels, whose nine taps stay in registers while the
// row is walked; the three rows that it reads are in the first-level cache for the channels that come next. The map may
// be a part of a wider one. Plain C interface, no headers of PyTorch.

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>
#include <vector>

#include "interface.h"

#define SSM_KERNELS "depthwise_conv_kernels.h"
#include "for_each_target.h"

constexpr int TAPS = 9;

extern "C" SSM_EXPORT const char* depthwise_conv_forward(const DepthwiseArguments* arguments) {
    const DepthwiseArguments& a = *arguments;
    Check c;
    c.that(is_floating(a.x.dtype), "x holds %s", name_of(a.x.dtype));
    c.shape("x", a.x.size, {a.batch, a.height, a.width, a.dim});
    c.that(is_floating(a.out.dtype), "out holds %s", name_of(a.out.dtype));
    c.buffer("out", a.out, a.out.dtype, a.batch * a.height * a.width * a.dim);
    c.buffer("weight", a.weight, FLOAT32, a.dim * TAPS);
    c.optional("bias", a.bias, FLOAT32, a.dim);
    c.that(a.threads >= 1, "there are %d threads", a.threads);
    if (c.problem()) return c.problem();

    const int64_t padded = (a.dim + BLOCK - 1) / BLOCK * BLOCK;
    std::vector<float> taps(TAPS * padded), bias(padded);
    for (int64_t channel = 0; channel < a.dim; channel++) {
        for (int k = 0; k < TAPS; k++) taps[k * padded + channel] = a.weight[channel * TAPS + k];
        if (a.bias.data) bias[channel] = a.bias[channel];
    }
    const auto row = SSM_BEST(convolve_row);
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t i = 0; i < a.batch * a.height; i++) {
        const FadeToZero fade;
        row(a, taps.data(), bias.data(), padded, i);
    }
    return nullptr;
}
