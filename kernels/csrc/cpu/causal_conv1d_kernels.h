// One block of channels of the causal convolution, forward and backward; the plan is in causal_conv1d.cpp, which includes
// this once for every instruction set.
//
// With R = K - 1 both directions are y_t = sum_j v_j x_{t - before + j}, j = 0..R: forwards before = R and v is the weight,
// backwards before = 0 and v is the weight from its end.

#include "lanes.h"
#include "tiles.h"
#include "elements.h"

using Args = ConvArguments;

constexpr int TOKENS = 64;  // of a window: four of them fit the first-level cache

// The channels of a block and its taps, (K, W).
struct Block {
    int64_t b, first;
    int lanes;
    std::vector<float> taps;
    Lanes bias;
};

static Block make_block(const Args& a, int64_t b, int64_t index) {
    const int64_t first = index * W, left = a.dim - first;
    Block k = {b, first, static_cast<int>(left < W ? left : W), std::vector<float>(a.taps * W), {}};
    float bias[W] = {};
    for (int c = 0; c < k.lanes; c++) {
        for (int64_t j = 0; j < a.taps; j++)
            k.taps[j * W + c] = a.weight[(first + c) * a.taps + (a.reverse ? a.taps - 1 - j : j)];
        if (a.bias) bias[c] = a.bias[first + c];
    }
    k.bias = load(bias);
    return k;
}

// window[i] = tokens start .. start + count of a tensor, 0 outside of it
SSM_INLINE void load_window(float* window, const Args& a, const Map& map, const Block& k, int64_t start, int64_t count) {
    const int64_t from = start < 0 ? -start : 0;
    const int64_t to = start + count > a.length ? a.length - start : count;
    if (to <= from) {
        std::memset(window, 0, sizeof(float) * W * count);
        return;
    }
    std::memset(window, 0, sizeof(float) * W * from);
    if (map.channel == 1) {
        const int64_t place = k.b * map.batch + k.first + start * map.time;
        for (int64_t t = from; t < to; t++)
            store(window + t * W, load_any(map.data, map.dtype, place + t * map.time, k.lanes));
    } else {
        load_tile(window + from * W, map, k.b, k.first, k.lanes, start + from, static_cast<int>(to - from));
    }
    std::memset(window + to * W, 0, sizeof(float) * W * (count - to));
}

// y[i] = bias + sum_j v_j window[i + j] for i < count, a multiple of SIDE; the window goes on for SIDE tokens
SSM_INLINE void convolve(float* y, const float* window, const Args& a, const Block& k, int64_t count) {
    for (int64_t i = 0; i < count; i += SIDE) {
        Group sum;
        SSM_EACH sum.v[j] = k.bias;
        for (int64_t tap = 0; tap < a.taps; tap++) {
            const Lanes v = load(k.taps.data() + tap * W);
            const Group x = load_group(window + (i + tap) * W);
            SSM_EACH sum.v[j] += x.v[j] * v;
        }
        store(y + i * W, sum);
    }
}

// Tokens start .. start + count of a result in its layout; channels-last ones may be of half precision.
SSM_INLINE void store_result(
    const Args& a, const Buffer<float>& to, const Block& k, int64_t start, const float* tile, int64_t count) {
    if (a.channels_last) {
        const int64_t place = (k.b * a.length + start) * a.dim + k.first;
        for (int64_t t = 0; t < count; t++)
            store_any(to.data, to.dtype, place + t * a.dim, load(tile + t * W), k.lanes);
    } else {
        float* rows = to.data + (k.b * a.dim + k.first) * a.length + start;
        store_tile(rows, a.length, tile, k.lanes, static_cast<int>(count));
    }
}

#include "causal_conv1d_rows.h"

SSM_INLINE int64_t whole_groups(int64_t tokens) { return (tokens + SIDE - 1) / SIDE * SIDE; }

static void forward_block(const Args& a, int64_t b, int64_t index) {
    const Block k = make_block(a, b, index);
    const int64_t reach = a.taps - 1, before = a.reverse ? 0 : reach;
    std::vector<float> window((TOKENS + reach + SIDE) * W);
    alignas(64) float y[TOKENS * W];
    for (int64_t start = 0; start < a.length; start += TOKENS) {
        const int64_t count = a.length - start < TOKENS ? a.length - start : TOKENS;
        load_window(window.data(), a, a.x, k, start - before, count + reach);
        prefetch(a.x, b, k.first, k.lanes, start + TOKENS, TOKENS);
        convolve(y, window.data(), a, k, whole_groups(count));
        if (a.silu)
            for (int64_t i = 0; i < count * W; i += SIDE * W) {
                const Group x = load_group(y + i), open = sigmoid(x, exp_minus_magnitude(x));
                SSM_EACH store(y + i + j * W, x.v[j] * open.v[j]);
            }
        store_result(a, a.out, k, start, y, count);
    }
}

// Of a window: what its tokens get from the outputs that saw them, and what these give to the taps.
static void backward_block(const Args& a, int64_t b, int64_t index) {
    const Block k = make_block(a, b, index);
    const int64_t reach = a.taps - 1, after = a.reverse ? reach : 0;
    // outputs from `after` tokens before the window on; the tokens that they saw begin `reach` before it
    std::vector<float> x((TOKENS + 2 * reach + SIDE) * W), dy((TOKENS + reach + SIDE) * W), y(dy.size());
    std::vector<float> sums(a.taps * W);
    alignas(64) float dx[TOKENS * W];
    Lanes sum_dy = everywhere(0.0f);
    for (int64_t start = 0; start < a.length; start += TOKENS) {
        const int64_t count = a.length - start < TOKENS ? a.length - start : TOKENS;
        load_window(dy.data(), a, a.dout, k, start - after, count + reach);
        load_window(x.data(), a, a.x, k, start - reach, count + 2 * reach);
        if (a.silu) {
            convolve(y.data(), x.data(), a, k, whole_groups(count + reach));
            for (int64_t i = 0; i < (count + reach) * W; i += SIDE * W) {
                const Group z = load_group(y.data() + i), open = sigmoid(z, exp_minus_magnitude(z));
                SSM_EACH {
                    const Lanes slope = open.v[j] * (z.v[j] * (everywhere(1.0f) - open.v[j]) + 1.0f);
                    store(dy.data() + i + j * W, load(dy.data() + i + j * W) * slope);
                }
            }
        }
        for (int64_t t = 0; t < count; t++) {
            Lanes sum = everywhere(0.0f);
            for (int64_t j = 0; j < a.taps; j++)
                sum += load(k.taps.data() + j * W) * load(dy.data() + (t + reach - j) * W);
            store(dx + t * W, sum);
        }
        const float* own = dy.data() + after * W;  // of the outputs at the tokens of this window
        for (int64_t j = 0; j < a.taps; j++) {
            Lanes sum = load(sums.data() + j * W);
            for (int64_t t = 0; t < count; t++) sum += load(own + t * W) * load(x.data() + (t + after + j) * W);
            store(sums.data() + j * W, sum);
        }
        for (int64_t t = 0; t < count; t++) sum_dy += load(own + t * W);
        store_result(a, a.dx, k, start, dx, count);
    }
    float bias[W];
    store(bias, sum_dy);
    for (int c = 0; c < k.lanes; c++) {
        const int64_t channel = b * a.dim + k.first + c;
        a.dbias[channel] = bias[c];
        for (int64_t j = 0; j < a.taps; j++)
            a.dweight[channel * a.taps + (a.reverse ? a.taps - 1 - j : j)] = sums[j * W + c];
    }
}
