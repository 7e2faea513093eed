// Sixteen channels side by side: the unit of all loops here, written so that any compiler turns them into vectors.
//
// Elementary functions are polynomials, because calls into libm would not vectorise. Errors are about two units in the
// last place; NaN stays NaN. (exp saturates at 1e-38 and 2e38 instead of 0 and infinity.)
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

// A loop whose turns do not depend on each other: the compiler need not prove that the tiles do not overlap.
#if defined(__GNUC__) && !defined(__clang__)
#define SSM_LANES(i, count) _Pragma("GCC ivdep") for (int i = 0; i < (count); i++)
#else
#define SSM_LANES(i, count) for (int i = 0; i < (count); i++)
#endif

SSM_INLINE float from_bits(int32_t i) {
    float f;
    std::memcpy(&f, &i, 4);
    return f;
}

SSM_INLINE int32_t to_bits(float f) {
    int32_t i;
    std::memcpy(&i, &f, 4);
    return i;
}

// e^x = 2^n e^r with |r| <= ln(2) / 2; e^r by a polynomial (Cephes' coefficients).
SSM_INLINE float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    const float shifted = x * 1.44269504088896341f + magic;
    const float n = shifted - magic;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t exponent = (to_bits(shifted) - to_bits(magic) + 127) << 23;
    return p * from_bits(exponent);
}

// log(1 + y) for 0 <= y <= 1, as 2 artanh(y / (2 + y)).
SSM_INLINE float log1p_unit(float y) {
    const float s = y / (2.0f + y), q = s * s;
    float p = 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    return 2.0f * s + 2.0f * s * q * p;
}

SSM_INLINE float softplus(float x) {
    const float magnitude = x < 0 ? -x : x;
    const float positive = x < 0 ? 0.0f : x;
    return x > 20.0f ? x : positive + log1p_unit(fast_exp(-magnitude));
}

SSM_INLINE float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// A tensor (batch, channel, time) of any strides; of `repeat` channels of the scan each reads the same one.
struct Map {
    const float* data;
    int64_t batch, channel, time;
    int64_t repeat;

};

// A W x W block of floats, turned over its diagonal in registers: log2(W) rounds of interleaving rows i and i + W/2.
typedef float Lanes __attribute__((vector_size(4 * W), aligned(4)));

SSM_INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    Lanes rows[W], mixed[W];
    for (int i = 0; i < W; i++) std::memcpy(&rows[i], from + i * from_stride, sizeof(Lanes));
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < W / 2; i++) {
            const Lanes x = rows[i], y = rows[i + W / 2];
            mixed[2 * i] = __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            mixed[2 * i + 1] =
                __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        for (int i = 0; i < W; i++) rows[i] = mixed[i];
    }
    for (int i = 0; i < W; i++) std::memcpy(to + i * to_stride, &rows[i], sizeof(Lanes));
}

// tile[t][c] = map[b, first + c, start + t] for t < tokens, c < lanes; the other lanes become 0.
SSM_INLINE void load_tile(float* tile, const Map& map, int64_t b, int64_t first, int lanes, int64_t start, int tokens) {
    if (lanes < W) std::memset(tile, 0, sizeof(float) * W * tokens);
    if (map.channel == 1 && map.repeat == 1) {
        const float* source = map.data + b * map.batch + first + start * map.time;
        for (int t = 0; t < tokens; t++)
            for (int c = 0; c < lanes; c++) tile[t * W + c] = source[t * map.time + c];
        return;
    }
    int done = 0;
    if (lanes == W && map.time == 1 && map.repeat == 1) {
        const float* source = map.data + b * map.batch + first * map.channel + start;
        for (; done + W <= tokens; done += W) transpose(source + done, map.channel, tile + done * W, W);
    }
    for (int c = 0; c < lanes; c++) {
        const float* source = map.data + b * map.batch + (first + c) / map.repeat * map.channel + start * map.time;
        for (int t = done; t < tokens; t++) tile[t * W + c] = source[t * map.time];
    }
}

// rows[c][t] = tile[t][c]: into a contiguous (channel, time) tensor of `length` tokens.
SSM_INLINE void store_tile(float* rows, int64_t length, const float* tile, int lanes, int tokens) {
    int done = 0;
    if (lanes == W)
        for (; done + W <= tokens; done += W) transpose(tile + done * W, W, rows + done, length);
    for (int c = 0; c < lanes; c++)
        for (int t = done; t < tokens; t++) rows[c * length + t] = tile[t * W + c];
}
