// The causal convolution, forward, of tensors that are contiguous along the channels: tokens one by one, all channels of
// each, so that memory is read in order and a token's neighbours are still in the cache. Included by
// causal_conv1d_kernels.h.

// taps: (K, D'), bias: (D'), with D filled up to D', whole groups
template <typename E>
static void forward_tokens_of(
    const Args& a, const float* taps, const float* bias, int64_t padded, int64_t b, int64_t first, int64_t last) {
    const int64_t before = a.reverse ? 0 : a.taps - 1;
    const E* x = reinterpret_cast<const E*>(a.x.data) + b * a.x.batch;
    E* out = reinterpret_cast<E*>(a.out.data) + b * a.length * a.dim;
    for (int64_t t = first; t < last; t++) {
        const int64_t from = t < before ? before - t : 0;  // taps that see tokens
        const int64_t to = t - before + a.taps > a.length ? a.length - (t - before) : a.taps;
        for_each_group(a.dim, [&](auto whole, int64_t c, int64_t count) SSM_ALWAYS {
            Group sum = load_group(bias + c);
            for (int64_t tap = from; tap < to; tap++) {
                const Group v = load_group(taps + tap * padded + c);
                const Group seen = load_group<whole>(x + (t - before + tap) * a.x.time + c, count);
                SSM_EACH sum.v[j] += seen.v[j] * v.v[j];
            }
            if (a.silu) sum = silu(sum);
            store_group<whole>(out + t * a.dim + c, sum, count);
        });
    }
}

static void forward_tokens(
    const Args& a, const float* taps, const float* bias, int64_t padded, int64_t b, int64_t first, int64_t last) {
    with_element(
        a.x.dtype, [&](auto element) { forward_tokens_of<decltype(element)>(a, taps, bias, padded, b, first, last); });
}
