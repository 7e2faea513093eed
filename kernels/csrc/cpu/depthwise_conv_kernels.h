// One row of the depthwise convolution; the plan is in depthwise_conv.cpp, which includes this once for every instruction
// set.

#include "lanes.h"
#include "elements.h"

template <bool whole, typename E>
SSM_INLINE Lanes load_channels(const E* from, int64_t count) {
    if constexpr (whole) return load(from);
    return load_some(from, count);
}

// What the pixels of a row share: the rows above, at and below it, null outside of the map; `count` channels from c on and
// what belongs to them.
template <typename E>
struct Strip {
    const E* rows[3];
    int64_t row, c, count;
    Lanes tap[9], offset;
};

// SIDE pixels from w on. whole: the channels fill a vector. inner: they and their neighbours are in the map.
template <bool whole, bool inner, typename E>
SSM_INLINE void convolve_pixels(const DepthwiseArguments& a, const Strip<E>& s, int64_t w) {
    Group sum;
    SSM_EACH sum.v[j] = s.offset;
    for (int i = 0; i < 3; i++) {
        if (!s.rows[i]) continue;
        Lanes seen[SIDE + 2];  // pixels w - 1 .. w + SIDE
        for (int j = 0; j < SIDE + 2; j++) {
            const int64_t pixel = w + j - 1;
            const bool inside = inner || (pixel >= 0 && pixel < a.width);
            seen[j] = inside ? load_channels<whole>(s.rows[i] + pixel * a.x.head + s.c, s.count) : Lanes{};
        }
        SSM_EACH for (int k = 0; k < 3; k++) sum.v[j] += seen[j + k] * s.tap[3 * i + k];
    }
    if (a.silu) sum = silu(sum);
    SSM_EACH if (inner || w + j < a.width)
        store_any(a.out.data, a.out.dtype, (s.row * a.width + w + j) * a.dim + s.c, sum.v[j], whole ? W : s.count);
}

template <bool whole, typename E>
SSM_INLINE void convolve_channels(
    const DepthwiseArguments& a, Strip<E>& s, const float* taps, const float* bias, int64_t padded) {
    s.offset = load(bias + s.c);
    for (int k = 0; k < 9; k++) s.tap[k] = load(taps + k * padded + s.c);
    convolve_pixels<whole, false>(a, s, 0);
    int64_t w = SIDE;
    for (; w + SIDE < a.width; w += SIDE) convolve_pixels<whole, true>(a, s, w);
    for (; w < a.width; w += SIDE) convolve_pixels<whole, false>(a, s, w);
}

// taps: (9, C'), bias: (C'), with C filled up to C'
template <typename E>
static void convolve_row_of(
    const DepthwiseArguments& a, const float* taps, const float* bias, int64_t padded, int64_t row) {
    const int64_t b = row / a.height, h = row % a.height;
    Strip<E> s;
    s.row = row;
    for (int i = 0; i < 3; i++) {
        const bool inside = h + i - 1 >= 0 && h + i - 1 < a.height;
        s.rows[i] = inside ? static_cast<const E*>(a.x.data) + b * a.x.batch + (h + i - 1) * a.x.token : nullptr;
    }
    for (s.c = 0; s.c < a.dim; s.c += W) {
        s.count = a.dim - s.c;
        if (s.count >= W)
            convolve_channels<true>(a, s, taps, bias, padded);
        else
            convolve_channels<false>(a, s, taps, bias, padded);
    }
}

static void convolve_row(
    const DepthwiseArguments& a, const float* taps, const float* bias, int64_t padded, int64_t row) {
    with_element(a.x.dtype, [&](auto element) { convolve_row_of<decltype(element)>(a, taps, bias, padded, row); });
}
