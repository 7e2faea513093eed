// The arguments of this library's functions, and the numbers that their callers count with. ssm_ops/_interface.py says the
// same in Python, and ssm_ops_abi (abi.cpp) tells what was compiled: a library that differs is not used. Whoever changes
// the order or the meaning of a field, which the sizes there do not show, raises VERSION on both sides.
//
// All functions return null, or what is wrong with the call.
#pragma once

#include "../buffers.h"

constexpr int VERSION = 4;
constexpr int BLOCK = 16;       // channels side by side
constexpr int CHUNK = 64;       // tokens between two saved states
constexpr int TILE_TOKENS = 64;  // of a tile of non-causal SSD, at most
constexpr int MAX_STATE = 256;  // N
constexpr int MAX_MAPS = 4;     // of an image scan

// A float32 tensor (batch, channel, time) of any strides, in elements; of `repeat` channels of a scan each reads the same.
struct Map {
    const float* data;
    int64_t dtype, size[3];
    int64_t batch, channel, time;
    int64_t repeat;
};

// A float32 tensor (batch, group, state, time), likewise
struct StateMap {
    const float* data;
    int64_t dtype, size[4];
    int64_t batch, group, state, time;
};

// A tensor (batch, token, head, number) of float32, float16 or bfloat16, whose numbers lie side by side
struct Rows {
    const void* data;
    int64_t dtype, size[4];
    int64_t batch, token, head;
};

struct ScanArguments {
    Map u, delta, z, dout;                    // (B, D, L); delta of Dd channels; z may be absent
    StateMap B, C;                            // (B, G, N, L)
    Buffer<const float> A, D, bias;           // (D, N), (D) or absent, (Dd) or absent
    Buffer<float> out, last, states;          // (B, D, L), (B, D, N), (S + 1, B, G, N, E)
    Buffer<float> du, ddelta, dz;             // (B, D, L) each; ddelta per channel of u
    Buffer<float> dA, dD, dbias;              // (B, D, N), (B, D), (B, D): the caller sums over the samples
    Buffer<float> dB, dC;                     // (parts, B, G, N, L), zero on entry
    int64_t batch, dim, length, state, groups, parts;
    int32_t softplus, threads;
};

struct ConvArguments {
    Map x, dout;                              // (B, D, L)
    Buffer<const float> weight, bias;         // (D, K), (D) or absent
    Buffer<float> out, dx;                    // (B, D, L), or (B, L, D) with channels_last
    Buffer<float> dweight, dbias;             // (B, D, K), (B, D): the caller sums over the samples
    int64_t batch, dim, length, taps;
    int32_t silu, reverse, channels_last, threads;
};

// The convolution of channels-last tokens takes and gives float16 and bfloat16, too: x, out, dout and dx alike.

struct DepthwiseArguments {
    Rows x;                                   // (B, H, W, C)
    Buffer<const float> weight, bias;         // (C, 3, 3), (C) or absent
    Buffer<void> out;                         // (B, H, W, C), of its own dtype
    int64_t batch, height, width, dim;
    int32_t silu, threads;
};

struct GateArguments {
    Buffer<void> y, out, dout, dy, dz;        // (rows, D), all of one dtype
    const void* z;                            // (rows, D), z_row numbers from row to row
    int64_t z_dtype, z_row, rows, dim;
    float scale;
    int32_t threads;
};

struct NormArguments {
    Buffer<void> x, branch, sum, out;         // (rows, D), each of its own dtype; branch and sum may be absent
    Buffer<const float> weight, bias;         // (D) or absent
    int64_t rows, dim;
    float eps;
    int32_t rms, threads;
};

struct CrossArguments {
    void *map, *routes;                       // (B, 4 or 1, C, H, W) and (B, 4, C, L), of any strides, in elements, ...
    int64_t map_dtype, map_batch, map_route, map_stride[3];
    int64_t routes_dtype, route_batch, route_route, route_channel, route_place;
    int64_t batch, size[3], map_routes;       // B; C, H, W; 4 or 1
    int64_t routes_size[4];
    int32_t map_last, routes_last;            // ... but 1 for the channel ("last"), or for the column and the place
    int32_t columns, backwards;               // bit k: does route k walk the columns? backwards?
    int32_t one_by_one, threads;
};

struct Ss2dArguments {
    Buffer<const void> x[MAX_MAPS], dy;       // (B, L, D): the map that each route reads, and the gradient of y
    Buffer<const void> proj;                  // (B, L, K, R + 2 N): per pixel and route the numbers of dt, of B, of C
    Buffer<const float> dt_weight, A, D, bias;  // (K, D, R), (K, D, N), (K, D), (K, D)
    Buffer<const int32_t> order;              // (K, L): the pixel at every place of a route
    Buffer<void> y;                           // (B, L, D); of x, dy, proj and y each has its own dtype
    Buffer<float> dx[MAX_MAPS];               // (B, L, D); routes that read the same map add to the same gradient
    Buffer<float> states;                     // (S + 1, B, K, N, D), the last of which is left as it is; forward: or absent
    Buffer<float> dproj;                      // (parts, B, L, K, R + 2 N)
    Buffer<float> ddt_weight, dA, dD, dbias;  // (B, K, D, R), (B, K, D, N), (B, K, D), (B, K, D): the caller adds samples
    int64_t batch, dim, length, state, rank, parts, routes;
    int32_t threads;
};

struct NcSsdArguments {
    Rows x, B, C, dy;                         // (B, L, H, P), (B, L, G, N) twice, (B, L, H, P)
    Map dt;                                   // (B, H, L)
    Buffer<const float> A, D, bias;           // (H), (H, P) or absent, (H) or absent
    Buffer<float> sums, turned;               // (parts, B, H, N, P'), (2, B, H, P', N'): P, N up to multiples of BLOCK
    Buffer<const float> state;                // (B, H, N, P')
    Buffer<void> out, dx, dB, dC;             // (B, L, H, P) twice, (B, L, G, N) twice; out and dy have dtypes of their own
    Buffer<float> ddt, dA, dD;                // (B, L, H), (B, tiles, H), (B, tiles, H, P): the caller adds the tiles
    int64_t batch, length, heads, channels, groups, state_size, parts, tiles;
    int32_t softplus, positive, threads;
};

inline bool is_floating(int64_t dtype) { return dtype == FLOAT32 || dtype == FLOAT16 || dtype == BFLOAT16; }

inline void check_map(Check& c, const char* name, const Map& map, int64_t batch, int64_t dim, int64_t length,
                      int64_t dtype = FLOAT32) {
    c.dtype(name, map.dtype, dtype);
    c.that(map.repeat >= 1 && map.size[1] * map.repeat == dim, "%lld channels of %s are not shared by %lld evenly",
           (long long)map.size[1], name, (long long)dim);
    c.that(map.size[0] == batch && map.size[2] == length, "%s has %lld samples of %lld tokens, not %lld of %lld", name,
           (long long)map.size[0], (long long)map.size[2], (long long)batch, (long long)length);
}
