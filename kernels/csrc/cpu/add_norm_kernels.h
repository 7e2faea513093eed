// Some rows of a norm; the plan is in add_norm.cpp, which includes this once for every instruction set.

#include "lanes.h"
#include "elements.h"

// Sixteen numbers of a tensor whose type is known only here: one comparison for as many, and always with the same end.
SSM_INLINE Lanes load_any(const void* from, int64_t dtype, int64_t at, int64_t count) {
    if (dtype == FLOAT32) return load_some(static_cast<const float*>(from) + at, count);
    if (dtype == BFLOAT16) return load_some(static_cast<const Bfloat16*>(from) + at, count);
    return load_some(static_cast<const Float16*>(from) + at, count);
}

SSM_INLINE void store_any(void* to, int64_t dtype, int64_t at, Lanes x, int64_t count) {
    if (dtype == FLOAT32) return store_some(static_cast<float*>(to) + at, x, count);
    if (dtype == BFLOAT16) return store_some(static_cast<Bfloat16*>(to) + at, x, count);
    store_some(static_cast<Float16*>(to) + at, x, count);
}

SSM_INLINE float sum_of(Lanes x) {
    alignas(64) float all[W];
    store(all, x);
    for (int width = W / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) all[i] += all[i + width];
    return all[0];
}

// row: room for a.dim numbers, filled up to a multiple of W
static void norm_rows(const NormArguments& a, int64_t first, int64_t last, float* row) {
    const int64_t padded = (a.dim + W - 1) / W * W;
    for (int64_t r = first; r < last; r++) {
        const int64_t at = r * a.dim;
        Lanes total = everywhere(0.0f);
        for (int64_t c = 0; c < a.dim; c += W) {
            Lanes x = load_any(a.x.data, a.x.dtype, at + c, a.dim - c);
            if (a.branch.data) {
                x += load_any(a.branch.data, a.branch.dtype, at + c, a.dim - c);
                store_any(a.sum.data, a.sum.dtype, at + c, x, a.dim - c);
            }
            store(row + c, x);
            total += x;
        }
        const float mean = a.rms ? 0.0f : sum_of(total) / a.dim;
        for (int64_t c = a.dim; c < padded; c++) row[c] = mean;  // which adds nothing below
        Lanes squares = everywhere(0.0f);
        for (int64_t c = 0; c < padded; c += W) {
            const Lanes x = load(row + c) - everywhere(mean);
            squares += x * x;
        }
        const float scale = 1.0f / std::sqrt(sum_of(squares) / a.dim + a.eps);
        for (int64_t c = 0; c < a.dim; c += W) {
            Lanes x = (load(row + c) - everywhere(mean)) * scale;
            if (a.weight.data) x = x * load_some(a.weight.data + c, a.dim - c);
            if (a.bias.data) x += load_some(a.bias.data + c, a.dim - c);
            store_any(a.out.data, a.out.dtype, at + c, x, a.dim - c);
        }
    }
}
