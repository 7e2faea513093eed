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
#include <utility>
#include <vector>

#include "map.h"

extern "C" {

struct ConvArguments {
    Map x, dout;
    const float *weight, *bias;       // (D, K), (D) or null
    float *out, *dx;                  // (B, D, L), or (B, L, D) with channels_last
    float *dweight, *dbias;           // (B, D, K), (B, D)
    int64_t batch, dim, length, taps;
    int32_t silu, reverse, channels_last, threads;
};

}  // extern "C"

#define SSM_KERNELS "causal_conv1d_kernels.h"
#include "for_each_target.h"

static void run(const ConvArguments& a, void (*block)(const ConvArguments&, int64_t, int64_t)) {
    const int64_t blocks = (a.dim + baseline::W - 1) / baseline::W;
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t i = 0; i < a.batch * blocks; i++) block(a, i / blocks, i % blocks);
}

extern "C" {

SSM_EXPORT void causal_conv1d_forward(const ConvArguments* a) { run(*a, SSM_BEST(forward_block)); }
SSM_EXPORT void causal_conv1d_backward(const ConvArguments* a) { run(*a, SSM_BEST(backward_block)); }

}  // extern "C"
