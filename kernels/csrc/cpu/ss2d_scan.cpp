// All scans over an image in one pass, forward and backward: the four of SS2D, which read the same map, and the two of a
// bidirectional mixer, which read one each. Mathematics: kernels/ssm_ops/{ss2d_scan,bidirectional_scan}/api.py.
//
// A map is channels-last: whichever way a route goes, the W channels of a block lie side by side at every pixel. So
// routes are read from the map itself, and their outputs are summed in the output itself (by the thread for itself, where
// that is not float32); neither the routes nor the step sizes ever exist in memory. The channels are cut into `parts`, each walked by one thread, route after route, chunk after
// chunk (T tokens), and within a chunk block after block: what all channels share of a chunk (where its pixels are, R
// numbers for dt, B and C) is gathered once. The forward keeps the states before every chunk; the backward recomputes the
// rest. The gradient of `proj` is a sum over channels, of which every part gives its own; the caller adds them, so that
// nothing depends on the number of threads.
//
// Shapes: batch B, channels D (a multiple of W), pixels L = H * Wd, routes K, state N, rank R, F = R + 2 N.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "interface.h"

#define SSM_KERNELS "ss2d_scan_kernels.h"
#include "for_each_target.h"

template <typename T>
static void check_any(Check& c, const char* name, const Buffer<T>& b, int64_t dtype, int64_t count) {
    c.that(is_floating(b.dtype), "%s holds %s", name, name_of(b.dtype));
    c.buffer(name, b, dtype, count);
}

// What both directions read.
static Check check(const Ss2dArguments& a, bool backward) {
    Check c;
    c.that(a.routes >= 1 && a.routes <= MAX_MAPS, "there are %lld routes, not 1 to %d", (long long)a.routes, MAX_MAPS);
    c.that(a.dim % BLOCK == 0, "%lld channels are no multiple of %d", (long long)a.dim, BLOCK);
    c.that(a.state >= 1 && a.rank >= 1, "the state size is %lld, the rank %lld", (long long)a.state, (long long)a.rank);
    c.that(a.parts >= 1 && a.threads >= 1, "there are %lld parts and %d threads", (long long)a.parts, a.threads);
    if (c.problem()) return c;
    const int64_t channels = a.routes * a.dim, tokens = a.batch * a.length, chunks = (a.length + CHUNK - 1) / CHUNK;
    for (int64_t route = 0; route < a.routes; route++) check_any(c, "x", a.x[route], a.x[0].dtype, tokens * a.dim);
    check_any(c, "proj", a.proj, a.x[0].dtype, tokens * a.routes * (a.rank + 2 * a.state));
    c.buffer("dt_weight", a.dt_weight, FLOAT32, channels * a.rank);
    c.buffer("A", a.A, FLOAT32, channels * a.state);
    c.buffer("D", a.D, FLOAT32, channels);
    c.buffer("dt_bias", a.bias, FLOAT32, channels);
    c.buffer("order", a.order, INT32, a.routes * a.length);
    if (backward || a.states) c.buffer("states", a.states, FLOAT32, (chunks + 1) * a.batch * channels * a.state);
    return c;
}

static const char* run(const Ss2dArguments& a, void (*part)(const Ss2dArguments&, int64_t, float*)) {
    const int64_t floats = SSM_BEST(workspace)(a);
    int failed = 0;
#pragma omp parallel num_threads(a.threads) reduction(| : failed)
    {
        const FadeToZero fade;
        float* memory = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * floats));
        failed = memory == nullptr;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < a.parts * a.batch; task++)
            if (!failed) part(a, task, memory);
        std::free(memory);
    }
    return failed ? "no memory for the buffers of its threads; use fewer" : nullptr;
}

extern "C" {

SSM_EXPORT const char* ss2d_scan_forward(const Ss2dArguments* arguments) {
    const Ss2dArguments& a = *arguments;
    Check c = check(a, false);
    check_any(c, "y", a.y, a.y.dtype, a.batch * a.length * a.dim);
    return c.problem() ? c.problem() : run(a, SSM_BEST(forward_part));
}

SSM_EXPORT const char* ss2d_scan_backward(const Ss2dArguments* arguments) {
    const Ss2dArguments& a = *arguments;
    Check c = check(a, true);
    if (c.problem()) return c.problem();
    const int64_t numbers = a.batch * a.length * a.dim, channels = a.batch * a.routes * a.dim;
    check_any(c, "dy", a.dy, a.dy.dtype, numbers);
    for (int64_t route = 0; route < a.routes; route++) c.buffer("dx", a.dx[route], FLOAT32, numbers);
    c.buffer("dproj", a.dproj, FLOAT32, a.parts * a.batch * a.length * a.routes * (a.rank + 2 * a.state));
    c.buffer("ddt_weight", a.ddt_weight, FLOAT32, channels * a.rank);
    c.buffer("dA", a.dA, FLOAT32, channels * a.state);
    c.buffer("dD", a.dD, FLOAT32, channels);
    c.buffer("dbias", a.dbias, FLOAT32, channels);
    return c.problem() ? c.problem() : run(a, SSM_BEST(backward_part));
}

}  // extern "C"
