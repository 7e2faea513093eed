// The four scans of SS2D over an image in one pass, forward and backward. Mathematics: kernels/ssm_ops/ss2d_scan/api.py.
//
// A block is W channels of one sample. Its pixels are brought into a buffer of the thread once (L x W floats, which stay
// in the second-level cache up to about 90 x 90 pixels), all routes read from it, and the outputs are summed in another.
// No route is ever written to memory, and neither are the step sizes: their R numbers per pixel and route are multiplied
// with the block's rows of the weight on the spot. As in selective_scan.cpp, states are kept before every chunk only.
//
// Results do not depend on the number of threads. The gradient of `proj` is a sum over channels: it is formed in a fixed
// number of `parts`, each in order, which the caller adds.
//
// Shapes: batch B, channels D, pixels L = H * Wd, routes K = 4, state N, rank R, F = R + 2 N.

#include <cstdlib>

#include "recurrence.h"

constexpr int K = 4;
constexpr int MAX_RANK = 256;

extern "C" {

// A map (batch, channel, pixel) of any strides.
struct Pixels {
    float* data;
    int64_t batch, channel, pixel;
};

struct Ss2dArguments {
    Pixels x, y, dy, dx;             // y and dy: the merged output and its gradient
    const float* proj;               // (B, L, K, F): R numbers for dt, then B, then C, per pixel and route
    const float* dt_weight;          // (K, R, D)
    const float *A, *D, *bias;       // (K, N, D), (K, D), (K, D)
    float* states;                   // (S, B, K, N, D)
    float* dproj;                    // (parts, B, L, K, F)
    float *ddt_weight, *dA, *dD, *dbias;  // (B, K, R, D), (B, K, N, D), (B, K, D), (B, K, D): summed by the caller
    const int32_t* order[K];         // (L): the pixel at every place of the route
    int64_t batch, dim, length, state, rank, parts;
    int32_t threads;
};

}  // extern "C"

namespace {

using Args = Ss2dArguments;

struct Block {
    int64_t b, first;
    int lanes;
};

SSM_INLINE Block make_block(const Args& a, int64_t b, int64_t index) {
    const int64_t left = a.dim - index * W;
    return {b, index * W, static_cast<int>(left < W ? left : W)};
}

// buffer[pixel][c]; lanes that do not exist are 0
SSM_INLINE void load_pixels(const Args& a, const Block& k, const Pixels& from, float* buffer) {
    load_tile(buffer, Map{from.data, from.batch, from.channel, from.pixel, 1}, k.b, k.first, k.lanes, 0, a.length);
}

SSM_INLINE void store_pixels(const Args& a, const Block& k, const float* buffer, const Pixels& to) {
    float* target = to.data + k.b * to.batch + k.first * to.channel;
    if (to.pixel == 1) {
        store_tile(target, to.channel, buffer, k.lanes, a.length);
        return;
    }
    for (int64_t l = 0; l < a.length; l++)
        for (int c = 0; c < k.lanes; c++) target[l * to.pixel + c * to.channel] = buffer[l * W + c];
}

SSM_INLINE void load_row(const float* row, const Block& k, float* lanes) {
    SSM_LANES(c, W) lanes[c] = c < k.lanes ? row[k.first + c] : 0.0f;
}

SSM_INLINE float* state_row(const Args& a, const Block& k, int64_t chunk, int route, int64_t n) {
    return a.states + (((chunk * a.batch + k.b) * K + route) * a.state + n) * a.dim;
}

// What one route needs of the parameters, for the channels of the block.
struct Route {
    float weight[MAX_RANK * W], A[MAX_STATE * W], skip[W], bias[W];
};

SSM_INLINE void load_route(const Args& a, const Block& k, int route, Route& p) {
    for (int64_t r = 0; r < a.rank; r++) load_row(a.dt_weight + (route * a.rank + r) * a.dim, k, p.weight + r * W);
    for (int64_t n = 0; n < a.state; n++) load_row(a.A + (route * a.state + n) * a.dim, k, p.A + n * W);
    load_row(a.D + route * a.dim, k, p.skip);
    load_row(a.bias + route * a.dim, k, p.bias);
}

// A chunk of a route: where its pixels are, its inputs, step sizes and their product.
struct Chunk {
    int tokens;
    const float* proj[T];
    int32_t pixel[T];
    alignas(64) float x[TILE], raw[TILE], dt[TILE], dtx[TILE];
};

SSM_INLINE void load_chunk(
    const Args& a, const Block& k, int route, const Route& p, const float* buffer, int64_t start, Chunk& s) {
    const int64_t fields = a.rank + 2 * a.state;
    s.tokens = static_cast<int>(a.length - start < T ? a.length - start : T);
    for (int t = 0; t < s.tokens; t++) {
        s.pixel[t] = a.order[route][start + t];
        s.proj[t] = a.proj + ((k.b * a.length + s.pixel[t]) * K + route) * fields;
        std::memcpy(s.x + t * W, buffer + static_cast<int64_t>(s.pixel[t]) * W, sizeof(float) * W);
    }
    constexpr int ROWS = 4;  // tokens at once: the sums over r are chains of dependent operations
    for (int t = 0; t < s.tokens; t += ROWS) {
        const float* rows[ROWS];
        float sums[ROWS][W];
        for (int j = 0; j < ROWS; j++) {
            rows[j] = s.proj[t + j < s.tokens ? t + j : s.tokens - 1];
            SSM_LANES(c, W) sums[j][c] = p.bias[c];
        }
        for (int64_t r = 0; r < a.rank; r++)
            for (int j = 0; j < ROWS; j++)
                SSM_LANES(c, W) sums[j][c] += rows[j][r] * p.weight[r * W + c];
        for (int j = 0; j < ROWS && t + j < s.tokens; j++) std::memcpy(s.raw + (t + j) * W, sums[j], sizeof(sums[j]));
    }
    SSM_LANES(i, s.tokens * W) {
        s.dt[i] = softplus(s.raw[i]);
        s.dtx[i] = s.dt[i] * s.x[i];
    }
}

SSM_INLINE void load_scalars(const Args& a, const Chunk& s, int64_t n, float* B, float* C) {
    for (int t = 0; t < s.tokens; t++) {
        B[t] = s.proj[t][a.rank + n];
        C[t] = s.proj[t][a.rank + a.state + n];
    }
}

SSM_VERSIONS void forward_block(const Args& a, int64_t b, int64_t index, float* workspace) {
    const Block k = make_block(a, b, index);
    float *x = workspace, *sum = workspace + a.length * W;
    load_pixels(a, k, a.x, x);
    std::memset(sum, 0, sizeof(float) * W * a.length);
    Route p;
    Chunk s;
    alignas(64) float h[MAX_STATE * W], y[TILE];
    for (int route = 0; route < K; route++) {
        load_route(a, k, route, p);
        std::memset(h, 0, sizeof(float) * W * a.state);
        for (int64_t start = 0, chunk = 0; start < a.length; start += T, chunk++) {
            for (int64_t n = 0; n < a.state; n++)
                std::memcpy(state_row(a, k, chunk, route, n) + k.first, h + n * W, sizeof(float) * k.lanes);
            load_chunk(a, k, route, p, x, start, s);
            for (int t = 0; t < s.tokens; t++)
                SSM_LANES(c, W) y[t * W + c] = p.skip[c] * s.x[t * W + c];
            for (int64_t n = 0; n < a.state; n++) {
                float B[T], C[T];
                load_scalars(a, s, n, B, C);
                scan_chunk(s.tokens, s.dt, s.dtx, p.A + n * W, B, C, h + n * W, y);
            }
            for (int t = 0; t < s.tokens; t++) {
                float* to = sum + static_cast<int64_t>(s.pixel[t]) * W;
                SSM_LANES(c, W) to[c] += y[t * W + c];
            }
        }
    }
    store_pixels(a, k, sum, a.y);
}

// dproj: the part of the gradient that this block adds to, (L, K, F) of its sample
SSM_VERSIONS void backward_block(const Args& a, int64_t b, int64_t index, float* workspace, float* dproj) {
    const Block k = make_block(a, b, index);
    const int64_t fields = a.rank + 2 * a.state, ranks = (a.rank + W - 1) / W * W;
    float *x = workspace, *dy_all = x + a.length * W, *dx_all = dy_all + a.length * W;
    load_pixels(a, k, a.x, x);
    load_pixels(a, k, a.dy, dy_all);
    std::memset(dx_all, 0, sizeof(float) * W * a.length);
    Route p;
    Chunk s;
    alignas(64) float dy[TILE], dx[TILE], ddt[TILE], h[W], lambda[MAX_STATE * W], dA[MAX_STATE * W];
    alignas(64) float dweight[MAX_RANK * W], turned[W * MAX_RANK];
    for (int route = 0; route < K; route++) {
        load_route(a, k, route, p);
        float dD[W] = {}, dbias[W] = {};
        std::memset(lambda, 0, sizeof(float) * W * a.state);
        std::memset(dA, 0, sizeof(float) * W * a.state);
        std::memset(dweight, 0, sizeof(float) * W * a.rank);
        std::memset(turned, 0, sizeof(float) * W * ranks);  // the weight with the rank innermost, padded to whole vectors
        for (int64_t r = 0; r < a.rank; r++)
            SSM_LANES(c, W) turned[c * ranks + r] = p.weight[r * W + c];

        int64_t chunk = (a.length + T - 1) / T;
        while (chunk-- > 0) {
            load_chunk(a, k, route, p, x, chunk * T, s);
            for (int t = 0; t < s.tokens; t++)
                std::memcpy(dy + t * W, dy_all + static_cast<int64_t>(s.pixel[t]) * W, sizeof(float) * W);
            std::memset(dx, 0, sizeof(float) * W * s.tokens);
            std::memset(ddt, 0, sizeof(float) * W * s.tokens);
            for (int64_t n = 0; n < a.state; n++) {
                float B[T], C[T], sum_B[T], sum_C[T];
                load_scalars(a, s, n, B, C);
                load_row(state_row(a, k, chunk, route, n), k, h);
                const Adjoint to = {lambda + n * W, dA + n * W, dx, ddt};
                adjoint_chunk(s.tokens, s.dt, s.dtx, dy, p.A + n * W, B, C, h, to, sum_B, sum_C);
                for (int t = 0; t < s.tokens; t++) {
                    float* to_fields = dproj + (static_cast<int64_t>(s.pixel[t]) * K + route) * fields + a.rank + n;
                    to_fields[0] += sum_B[t];
                    to_fields[a.state] += sum_C[t];
                }
            }
            finish_adjoint(s.tokens, s.raw, s.dt, s.x, dy, p.skip, true, dx, ddt, dD, dbias);
            for (int64_t r = 0; r < a.rank; r++) {
                float sums[W] = {};
                for (int t = 0; t < s.tokens; t++)
                    SSM_LANES(c, W) sums[c] += ddt[t * W + c] * s.proj[t][r];
                SSM_LANES(c, W) dweight[r * W + c] += sums[c];
            }
            for (int t = 0; t < s.tokens; t++) {
                float* to_x = dx_all + static_cast<int64_t>(s.pixel[t]) * W;
                SSM_LANES(c, W) to_x[c] += dx[t * W + c];
                float* to_rank = dproj + (static_cast<int64_t>(s.pixel[t]) * K + route) * fields;
                for (int64_t first = 0; first < a.rank; first += W) {
                    float sums[W] = {};
                    SSM_LANES(c, W)
                        SSM_LANES(r, W) sums[r] += ddt[t * W + c] * turned[c * ranks + first + r];
                    const int64_t left = a.rank - first < W ? a.rank - first : W;
                    for (int64_t r = 0; r < left; r++) to_rank[first + r] += sums[r];
                }
            }
        }
        const int64_t row = b * K + route;
        std::memcpy(a.dD + row * a.dim + k.first, dD, sizeof(float) * k.lanes);
        std::memcpy(a.dbias + row * a.dim + k.first, dbias, sizeof(float) * k.lanes);
        for (int64_t n = 0; n < a.state; n++)
            std::memcpy(a.dA + (row * a.state + n) * a.dim + k.first, dA + n * W, sizeof(float) * k.lanes);
        for (int64_t r = 0; r < a.rank; r++)
            std::memcpy(a.ddt_weight + (row * a.rank + r) * a.dim + k.first, dweight + r * W, sizeof(float) * k.lanes);
    }
    store_pixels(a, k, dx_all, a.dx);
}

// A buffer of this thread, `maps` times an L x W block, aligned to cache lines.
struct Workspace {
    float* data;
    Workspace(const Args& a, int maps)
        : data(static_cast<float*>(std::aligned_alloc(64, sizeof(float) * W * a.length * maps))) {}
    ~Workspace() { std::free(data); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
};

}  // namespace

extern "C" {

// Both return 0, or 1 if there was no memory for the buffers.
SSM_EXPORT int ss2d_scan_forward(const Ss2dArguments* arguments) {
    const Args& a = *arguments;
    const int64_t blocks = (a.dim + W - 1) / W;
    int failed = 0;
#pragma omp parallel num_threads(a.threads) reduction(| : failed)
    {
        Workspace workspace(a, 2);
        failed = workspace.data == nullptr;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < a.batch * blocks; i++)
            if (!failed) forward_block(a, i / blocks, i % blocks, workspace.data);
    }
    return failed;
}

// dproj must be zero on entry.
SSM_EXPORT int ss2d_scan_backward(const Ss2dArguments* arguments) {
    const Args& a = *arguments;
    const int64_t blocks = (a.dim + W - 1) / W, fields = a.rank + 2 * a.state;
    int failed = 0;
#pragma omp parallel num_threads(a.threads) reduction(| : failed)
    {
        Workspace workspace(a, 3);
        failed = workspace.data == nullptr;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < a.parts * a.batch; i++) {
            const int64_t part = i / a.batch, b = i % a.batch;
            float* dproj = a.dproj + i * a.length * K * fields;
            for (int64_t k = part * blocks / a.parts; k < (part + 1) * blocks / a.parts && !failed; k++)
                backward_block(a, b, k, workspace.data, dproj);
        }
    }
    return failed;
}

}  // extern "C"
