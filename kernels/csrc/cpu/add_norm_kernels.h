// Some rows of a norm; the plan is in add_norm.cpp, which includes this once for every instruction set.

#include "lanes.h"
#include "elements.h"

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
