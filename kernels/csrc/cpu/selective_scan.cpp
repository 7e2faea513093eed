// Selective scan on the CPU, forward and backward. Mathematics: kernels/ssm_ops/selective_scan/api.py.
//
// Work is cut into blocks of W channels of one sample and group, and time into chunks of T tokens, which fit into the
// first-level cache. Within a chunk everything is (token, channel): one step of the recurrence is one vector operation
// for W channels, and B_t, C_t are scalars to it. The forward stores the state before every chunk; the backward walks
// the chunks from the end, recomputes the states of one chunk for one n at a time, and runs the adjoint recurrence.
//
// Nothing depends on the number of threads: every result is written by one block, except dB and dC, which are sums over
// the channels of a group. These are summed within a fixed number of `parts`, each in order, and the caller adds the
// parts.
//
// Shapes: batch B, channels D, tokens L, state N, groups G, E = D / G. Plain C interface, no headers of PyTorch: the
// library fits every version of it.

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "map.h"

extern "C" {

struct ScanArguments {
    Map u, delta, z, dout;          // z.data may be null
    const float *A, *D, *bias;      // (D, N), (D) or null, (Dd) or null
    const float *B, *C;             // (B, G, N, L), strides below
    int64_t b_batch, b_group, b_state, b_time;
    int64_t c_batch, c_group, c_state, c_time;
    float *out, *last, *states;     // (B, D, L), (B, D, N), (S + 1, B, G, N, E)
    float *du, *ddelta, *dz;        // (B, D, L) each; ddelta per channel of u
    float *dA, *dD, *dbias;         // (B, D, N), (B, D), (B, D): the caller sums over the samples
    float *dB, *dC;                 // (parts, B, G, N, L)
    int64_t batch, dim, length, state, groups, parts;
    int32_t softplus, threads;
};

}  // extern "C"

#define SSM_KERNELS "selective_scan_kernels.h"
#include "for_each_target.h"

constexpr int W = baseline::W;  // the same for all

extern "C" {

SSM_EXPORT void selective_scan_forward(const ScanArguments* arguments) {
    const ScanArguments& a = *arguments;
    const int64_t blocks = (a.dim / a.groups + W - 1) / W, all = a.batch * a.groups * blocks;
    const auto forward_block = SSM_BEST(forward_block);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t i = 0; i < all; i++) forward_block(a, i / (a.groups * blocks), i / blocks % a.groups, i % blocks);
}

// dB and dC must be zero on entry.
SSM_EXPORT void selective_scan_backward(const ScanArguments* arguments) {
    const ScanArguments& a = *arguments;
    const int64_t blocks = (a.dim / a.groups + W - 1) / W, all = a.parts * a.batch * a.groups;
    const auto backward_block = SSM_BEST(backward_block);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t i = 0; i < all; i++) {
        const int64_t part = i / (a.batch * a.groups), g = i % a.groups, b = i / a.groups % a.batch;
        float* dB = a.dB + i * a.state * a.length;
        float* dC = a.dC + i * a.state * a.length;
        for (int64_t k = part * blocks / a.parts; k < (part + 1) * blocks / a.parts; k++)
            backward_block(a, b, g, k, dB, dC);
    }
}

}  // extern "C"
