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

#include "interface.h"

#define SSM_KERNELS "selective_scan_kernels.h"
#include "for_each_target.h"

// What both directions read.
static Check check(const ScanArguments& a) {
    Check c;
    c.that(a.groups >= 1 && a.dim % a.groups == 0, "%lld groups do not divide %lld channels", (long long)a.groups,
           (long long)a.dim);
    c.that(a.state >= 1 && a.state <= MAX_STATE, "the state size is %lld, not 1 to %d", (long long)a.state, MAX_STATE);
    c.that(a.threads >= 1, "there are %d threads", a.threads);
    check_map(c, "u", a.u, a.batch, a.dim, a.length);
    check_map(c, "delta", a.delta, a.batch, a.dim, a.length);
    if (a.z.data || a.z.dtype != ABSENT) check_map(c, "z", a.z, a.batch, a.dim, a.length);
    const int64_t shape[] = {a.batch, a.groups, a.state, a.length};
    for (const StateMap* map : {&a.B, &a.C}) {
        const char* const name = map == &a.B ? "B" : "C";
        c.dtype(name, map->dtype, FLOAT32);
        c.shape(name, map->size, shape);
    }
    c.buffer("A", a.A, FLOAT32, a.dim * a.state);
    c.optional("D", a.D, FLOAT32, a.dim);
    c.optional("delta_bias", a.bias, FLOAT32, a.delta.size[1]);
    c.buffer("states", a.states, FLOAT32, ((a.length + CHUNK - 1) / CHUNK + 1) * a.batch * a.state * a.dim);
    return c;
}

// Of a group
static int64_t blocks_of(const ScanArguments& a) { return (a.dim / a.groups + BLOCK - 1) / BLOCK; }

extern "C" {

SSM_EXPORT const char* selective_scan_forward(const ScanArguments* arguments) {
    const ScanArguments& a = *arguments;
    Check c = check(a);
    c.buffer("out", a.out, FLOAT32, a.batch * a.dim * a.length);
    c.buffer("last", a.last, FLOAT32, a.batch * a.dim * a.state);
    if (c.problem()) return c.problem();

    const int64_t blocks = blocks_of(a), all = a.batch * a.groups * blocks;
    const auto forward_block = SSM_BEST(forward_block);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t i = 0; i < all; i++) {
        const FadeToZero fade;
        forward_block(a, i / (a.groups * blocks), i / blocks % a.groups, i % blocks);
    }
    return nullptr;
}

SSM_EXPORT const char* selective_scan_backward(const ScanArguments* arguments) {
    const ScanArguments& a = *arguments;
    const int64_t numbers = a.batch * a.dim * a.length, sums = a.parts * a.batch * a.groups * a.state * a.length;
    Check c = check(a);
    check_map(c, "dout", a.dout, a.batch, a.dim, a.length);
    c.buffer("du", a.du, FLOAT32, numbers);
    c.buffer("ddelta", a.ddelta, FLOAT32, numbers);
    c.buffer("dz", a.dz, FLOAT32, a.z.data ? numbers : 0);
    c.buffer("dA", a.dA, FLOAT32, a.batch * a.dim * a.state);
    c.buffer("dD", a.dD, FLOAT32, a.batch * a.dim);
    c.buffer("dbias", a.dbias, FLOAT32, a.batch * a.dim);
    c.buffer("dB", a.dB, FLOAT32, sums);
    c.buffer("dC", a.dC, FLOAT32, sums);
    if (c.problem()) return c.problem();

    const int64_t blocks = blocks_of(a), all = a.parts * a.batch * a.groups;
    const auto backward_block = SSM_BEST(backward_block);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t i = 0; i < all; i++) {
        const FadeToZero fade;
        const int64_t part = i / (a.batch * a.groups), g = i % a.groups, b = i / a.groups % a.batch;
        float* dB = a.dB + i * a.state * a.length;
        float* dC = a.dC + i * a.state * a.length;
        for (int64_t k = part * blocks / a.parts; k < (part + 1) * blocks / a.parts; k++)
            backward_block(a, b, g, k, dB, dC);
    }
    return nullptr;
}

}  // extern "C"
