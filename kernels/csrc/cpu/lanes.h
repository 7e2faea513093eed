// Sixteen channels side by side: the unit of all loops here. A vector of sixteen floats is one register with AVX-512,
// two with AVX2, four with SSE2 or NEON; the compiler splits it.
//
// Elementary functions are polynomials, because calls into libm would not become vector operations. Their errors are
// about one unit in the last place; NaN stays NaN. (Powers saturate at 1e-38 and 8e37 instead of 0 and infinity.)
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// One version per instruction set, chosen when the library is loaded: a build serves every machine of the architecture.
#define SSM_VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SSM_VERSIONS
#endif
#define SSM_INLINE static inline __attribute__((always_inline))
#define SSM_EXPORT __attribute__((visibility("default")))

constexpr int W = 16;  // channels of a block

typedef float Lanes __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));

SSM_INLINE Lanes load(const float* from) {
    Lanes x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

SSM_INLINE void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof(x)); }

SSM_INLINE void add_to(float* to, Lanes x) { store(to, load(to) + x); }

SSM_INLINE Lanes everywhere(float x) { return x - Lanes{}; }  // minus 0 is nothing, plus 0 would change -0

// ---- functions ------------------------------------------------------------------------------------------------------

// Several vectors that go through a function side by side: its steps depend on each other, and take four cycles each.
constexpr int SIDE = 4;

struct Group {
    Lanes v[SIDE];
};

#define SSM_EACH for (int j = 0; j < SIDE; j++)

SSM_INLINE Group load_group(const float* from) {
    Group x;
    SSM_EACH x.v[j] = load(from + j * W);
    return x;
}

SSM_INLINE void store(float* to, const Group& x) { SSM_EACH store(to + j * W, x.v[j]); }

constexpr float LOG2_E = 1.44269504088896341f, LOG2_E_REST = 1.92596299e-8f;  // their sum is log2(e) to 48 bits
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold

// 2^(n + r) with n = shifted - MAGIC an integer and |r| <= 1/2
SSM_INLINE Group exp2_parts(const Group& shifted, const Group& r) {
    // 2^r = 1 + r q(r), exact at 0: factors near 1 are multiplied thousands of times. Minimax, error 2e-9.
    constexpr float coefficients[] = {1.3398875e-3f, 9.6184369e-3f, 5.5503324e-2f, 2.40226477e-1f, 6.93147182e-1f, 1.0f};
    Group q;
    SSM_EACH q.v[j] = everywhere(1.5353362e-4f);
    for (float c : coefficients) SSM_EACH q.v[j] = q.v[j] * r.v[j] + c;
    SSM_EACH q.v[j] *= (Lanes)(((Ints)shifted.v[j] << 23) + (127 << 23));
    return q;
}

// 2^x
SSM_INLINE Group exp2(Group x) {
    Group shifted;
    SSM_EACH x.v[j] = x.v[j] < -126.0f ? everywhere(-126.0f) : x.v[j];
    SSM_EACH x.v[j] = x.v[j] > 126.0f ? everywhere(126.0f) : x.v[j];
    SSM_EACH shifted.v[j] = x.v[j] + MAGIC;
    SSM_EACH x.v[j] -= shifted.v[j] - MAGIC;
    return exp2_parts(shifted, x);
}

// e^-|x|
SSM_INLINE Group exp_minus_magnitude(Group x) {
    Group shifted;
    SSM_EACH x.v[j] = (Lanes)((Ints)x.v[j] | INT32_MIN);
    SSM_EACH x.v[j] = x.v[j] < -87.0f ? everywhere(-87.0f) : x.v[j];
    SSM_EACH shifted.v[j] = x.v[j] * LOG2_E + MAGIC;
    SSM_EACH x.v[j] = x.v[j] * LOG2_E_REST + (x.v[j] * LOG2_E - (shifted.v[j] - MAGIC));
    return exp2_parts(shifted, x);
}

// max(x, 0) + log(1 + e^-|x|), given that power; in float it is x above 20, as everywhere in this field
SSM_INLINE Group softplus(const Group& x, const Group& power) {
    // log(1 + p) = p + p^2 q(p) for 0 <= p <= 1; minimax, error 3e-8
    constexpr float coefficients[] = {-3.0065773e-2f, 7.9204507e-2f, -1.37538001e-1f, 1.91536546e-1f,
                                      -2.48571634e-1f, 3.33213240e-1f, -4.99996483e-1f};
    Group q;
    SSM_EACH q.v[j] = everywhere(5.3648190e-3f);
    for (float c : coefficients) SSM_EACH q.v[j] = q.v[j] * power.v[j] + c;
    SSM_EACH q.v[j] = q.v[j] * (power.v[j] * power.v[j]) + power.v[j];
    SSM_EACH q.v[j] += x.v[j] < 0.0f ? Lanes{} : x.v[j];
    return q;
}

// 1 / (1 + e^-x), the derivative of softplus, given e^-|x|
SSM_INLINE Group sigmoid(const Group& x, const Group& power) {
    Group y;
    SSM_EACH y.v[j] = (x.v[j] < 0.0f ? power.v[j] : everywhere(1.0f)) / (power.v[j] + 1.0f);
    return y;
}

// ---- sixteen vectors at once ----------------------------------------------------------------------------------------

// A W x W block of floats, turned over its diagonal in registers: log2(W) rounds of interleaving rows i and i + W/2.
SSM_INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    Lanes rows[W], mixed[W];
    for (int i = 0; i < W; i++) rows[i] = load(from + i * from_stride);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < W / 2; i++) {
            const Lanes x = rows[i], y = rows[i + W / 2];
            mixed[2 * i] = __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            mixed[2 * i + 1] =
                __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        for (int i = 0; i < W; i++) rows[i] = mixed[i];
    }
    for (int i = 0; i < W; i++) store(to + i * to_stride, rows[i]);
}

// Lane t of the result is the sum of the lanes of row t: pairs of rows are folded into one, four times.
SSM_INLINE Lanes sum_rows(const float* rows) {
    Lanes a[W];
    for (int i = 0; i < W / 2; i++) {
        const Lanes x = load(rows + 2 * i * W), y = load(rows + (2 * i + 1) * W);
        a[i] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < W / 4; i++) {
        const Lanes x = a[2 * i], y = a[2 * i + 1];
        a[i] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    for (int i = 0; i < W / 8; i++) {
        const Lanes x = a[2 * i], y = a[2 * i + 1];
        a[i] = __builtin_shufflevector(x, y, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
               __builtin_shufflevector(x, y, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    }
    return __builtin_shufflevector(a[0], a[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a[0], a[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// ---- tiles (token, channel) of tensors ------------------------------------------------------------------------------

// A tensor (batch, channel, time) of any strides; of `repeat` channels of the scan each reads the same one.
struct Map {
    const float* data;
    int64_t batch, channel, time;
    int64_t repeat;
};

// Asks for tokens start .. start + count of `lanes` channels ahead of their use: each channel is a stream of its own, more
// than the hardware follows. Beyond the tensor it does nothing.
SSM_INLINE void prefetch(const Map& map, int64_t b, int64_t first, int lanes, int64_t start, int count) {
    if (map.time != 1) return;
    for (int c = 0; c < lanes; c++) {
        const float* source = map.data + b * map.batch + (first + c) / map.repeat * map.channel + start;
        for (int t = 0; t < count; t += W) __builtin_prefetch(source + t);
    }
}

// tile[t][c] = map[b, first + c, start + t] for t < tokens, c < lanes; the other lanes become 0.
SSM_INLINE void load_tile(float* tile, const Map& map, int64_t b, int64_t first, int lanes, int64_t start, int tokens) {
    if (lanes < W) std::memset(tile, 0, sizeof(float) * W * tokens);
    const float* source = map.data + b * map.batch + start * map.time;
    if (lanes == W && map.repeat == 1 && map.channel == 1) {
        for (int t = 0; t < tokens; t++) store(tile + t * W, load(source + first + t * map.time));
    } else if (lanes == W && map.repeat == 1 && map.time == 1 && tokens >= W) {
        source += first * map.channel;
        for (int t = 0; t < tokens; t += W) {
            const int at = t + W <= tokens ? t : tokens - W;  // the last block may overlap the one before
            transpose(source + at, map.channel, tile + at * W, W);
        }
    } else {
        for (int c = 0; c < lanes; c++)
            for (int t = 0; t < tokens; t++)
                tile[t * W + c] = source[(first + c) / map.repeat * map.channel + t * map.time];
    }
}

// rows[c][t] = tile[t][c]: into a contiguous (channel, time) tensor of `length` tokens.
SSM_INLINE void store_tile(float* rows, int64_t length, const float* tile, int lanes, int tokens) {
    if (lanes == W && tokens >= W) {
        for (int t = 0; t < tokens; t += W) {
            const int at = t + W <= tokens ? t : tokens - W;
            transpose(tile + at * W, W, rows + at, length);
        }
    } else {
        for (int c = 0; c < lanes; c++)
            for (int t = 0; t < tokens; t++) rows[c * length + t] = tile[t * W + c];
    }
}
