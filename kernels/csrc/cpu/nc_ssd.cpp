// Non-causal SSD on the CPU, forward and backward. Mathematics: kernels/ssm_ops/nc_ssd/api.py.
//
// Everything is a product of small matrices: the state S (N, P) of a head is the sum over all tokens of B (w x)^T,
// and a token's result is C S. A first pass walks the tokens tile by tile (T tokens), weighs them in the first-level cache and
// adds their products to the state; a second one multiplies each tile by it. So the inputs are read twice and the result
// is written once, and nothing of the size of x lies in between. The backward is the same: its first pass forms the
// gradient of the state as the forward forms the state, its second one all other gradients of a tile, all heads of it,
// which share those of B and C.
//
// Nothing depends on the number of threads: tokens of a first pass are cut into a fixed number of `parts`, added in
// order; everything else is written by one tile.
//
// Shapes: batch B, tokens L, heads H of P channels, state N, groups G; head j reads group j mod G.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "interface.h"

#define SSM_KERNELS "nc_ssd_kernels.h"
#include "for_each_target.h"

static int64_t padded(int64_t count) { return (count + BLOCK - 1) / BLOCK * BLOCK; }

static void check_rows(Check& c, const char* name, const Rows& r, int64_t dtype, const int64_t (&shape)[4]) {
    c.dtype(name, r.dtype, dtype);
    c.shape(name, r.size, shape);
}

// What both directions read, and their state.
static Check check(const NcSsdArguments& a) {
    Check c;
    c.that(a.groups >= 1 && a.heads % a.groups == 0, "%lld groups do not divide %lld heads", (long long)a.groups,
           (long long)a.heads);
    c.that(a.tiles >= 1 && a.length <= a.tiles * TILE_TOKENS && a.parts >= 1 && a.parts <= a.tiles && a.threads >= 1,
           "there are %lld tiles and %lld parts of %lld tokens, and %d threads", (long long)a.tiles, (long long)a.parts,
           (long long)a.length, a.threads);
    c.that(is_floating(a.x.dtype), "x holds %s", name_of(a.x.dtype));
    check_rows(c, "x", a.x, a.x.dtype, {a.batch, a.length, a.heads, a.channels});
    check_rows(c, "B", a.B, a.x.dtype, {a.batch, a.length, a.groups, a.state_size});
    check_rows(c, "C", a.C, a.x.dtype, {a.batch, a.length, a.groups, a.state_size});
    check_map(c, "dt", a.dt, a.batch, a.heads, a.length);
    c.buffer("A", a.A, FLOAT32, a.heads);
    c.optional("D", a.D, FLOAT32, a.heads * a.channels);
    c.optional("dt_bias", a.bias, FLOAT32, a.heads);
    c.buffer("sums", a.sums, FLOAT32, a.parts * a.batch * a.heads * a.state_size * padded(a.channels));
    return c;
}

// Calls task(a, 0 .. tasks - 1, workspace of the thread)
static bool each(const NcSsdArguments& a, int64_t tasks, void (*task)(const NcSsdArguments&, int64_t, float*)) {
    const int64_t floats = SSM_BEST(workspace)(a);
    int failed = 0;
#pragma omp parallel num_threads(a.threads) reduction(| : failed)
    {
        const FadeToZero fade;
        float* memory = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * floats));
        failed = memory == nullptr;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tasks; i++)
            if (!failed) task(a, i, memory);
        std::free(memory);
    }
    return !failed;
}

static const char* const NO_MEMORY = "no memory for the buffers of its threads; use fewer";

extern "C" {

SSM_EXPORT const char* nc_ssd_forward(const NcSsdArguments* arguments) {
    const NcSsdArguments& a = *arguments;
    Check c = check(a);
    c.that(is_floating(a.out.dtype), "out holds %s", name_of(a.out.dtype));
    c.buffer("out", a.out, a.out.dtype, a.batch * a.length * a.heads * a.channels);
    if (c.problem()) return c.problem();
    const int64_t all = a.batch * a.heads;
    const bool done = each(a, a.parts * all, SSM_BEST(state_part)) && each(a, all, SSM_BEST(add_parts)) &&
                      each(a, all * a.tiles, SSM_BEST(output_tile));
    return done ? nullptr : NO_MEMORY;
}

SSM_EXPORT const char* nc_ssd_backward(const NcSsdArguments* arguments) {
    const NcSsdArguments& a = *arguments;
    const int64_t numbers = a.batch * a.length * a.heads * a.channels;
    Check c = check(a);
    c.that(is_floating(a.dy.dtype), "dout holds %s", name_of(a.dy.dtype));
    check_rows(c, "dout", a.dy, a.dy.dtype, {a.batch, a.length, a.heads, a.channels});
    const int64_t padded_states = a.batch * a.heads * padded(a.channels);
    c.buffer("state", a.state, FLOAT32, padded_states * a.state_size);
    c.buffer("turned", a.turned, FLOAT32, 2 * padded_states * padded(a.state_size));
    c.buffer("dx", a.dx, a.x.dtype, numbers);
    c.buffer("dB", a.dB, a.x.dtype, a.batch * a.length * a.groups * a.state_size);
    c.buffer("dC", a.dC, a.x.dtype, a.batch * a.length * a.groups * a.state_size);
    c.buffer("ddt", a.ddt, FLOAT32, a.batch * a.length * a.heads);
    c.buffer("dA", a.dA, FLOAT32, a.batch * a.tiles * a.heads);
    if (a.D) c.buffer("dD", a.dD, FLOAT32, a.batch * a.tiles * a.heads * a.channels);
    if (c.problem()) return c.problem();
    const int64_t all = a.batch * a.heads;
    const bool done = each(a, a.parts * all, SSM_BEST(state_gradient_part)) && each(a, all, SSM_BEST(finish_state_gradient)) &&
                      each(a, a.batch * a.tiles, SSM_BEST(gradient_tile));
    return done ? nullptr : NO_MEMORY;
}

}  // extern "C"
