// All scans over an image in one pass, forward and backward: the four of SS2D, which read the same map, and the two of a
// bidirectional mixer, which read one each. Mathematics: kernels/ssm_ops/{ss2d_scan,bidirectional_scan}/api.py.
//
// A map is channels-last: whichever way a route goes, the W channels of a block lie side by side at every pixel. So
// routes are read from the map itself, and their outputs are summed in the output itself; neither the routes nor the step
// sizes ever exist in memory. The channels are cut into `parts`, each walked by one thread, route after route, chunk after
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

extern "C" {

struct Ss2dArguments {
    const float *x[4], *dy;          // (B, L, D): the map that each route reads, and the gradient of y
    const float* proj;               // (B, L, K, F): R numbers for dt, then B, then C, per pixel and route
    const float *dt_weight, *A, *D, *bias;  // (K, D, R), (K, D, N), (K, D), (K, D)
    float *y, *dx[4];                // (B, L, D); routes that read the same map add to the same gradient
    float* states;                   // (S, B, K, N, D)
    float* dproj;                    // (parts, B, L, K, F)
    float *ddt_weight, *dA, *dD, *dbias;    // (B, K, D, R), (B, K, D, N), (B, K, D), (B, K, D): the caller adds samples
    const int32_t* order;            // (K, L): the pixel at every place of a route
    int64_t batch, dim, length, state, rank, parts, routes;
    int32_t threads;
};

}  // extern "C"

#define SSM_KERNELS "ss2d_scan_kernels.h"
#include "for_each_target.h"

static int run(const Ss2dArguments& a, void (*part)(const Ss2dArguments&, int64_t, float*)) {
    const int64_t floats = SSM_BEST(workspace)(a);
    int failed = 0;
#pragma omp parallel num_threads(a.threads) reduction(| : failed)
    {
        float* memory = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * floats));
        failed = memory == nullptr;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < a.parts * a.batch; task++)
            if (!failed) part(a, task, memory);
        std::free(memory);
    }
    return failed;
}

extern "C" {

// Both return 0, or 1 if there was no memory for the buffers.
SSM_EXPORT int ss2d_scan_forward(const Ss2dArguments* a) { return run(*a, SSM_BEST(forward_part)); }
SSM_EXPORT int ss2d_scan_backward(const Ss2dArguments* a) { return run(*a, SSM_BEST(backward_part)); }

}  // extern "C"
