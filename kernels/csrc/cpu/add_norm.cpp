// A residual addition and the norm of the sum on the CPU, for inference. Mathematics: kernels/ssm_ops/add_norm/api.py.
//
// A row (the channels of a token) is read once, kept in the first-level cache while its mean and variance are formed, and
// written once as the sum and once normalised, each in its own type. Rows do not depend on each other. Plain C interface,
// no headers of PyTorch.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>
#include <vector>

#include "interface.h"

#define SSM_KERNELS "add_norm_kernels.h"
#include "for_each_target.h"

static void check_floats(Check& c, const char* name, const Buffer<void>& b, int64_t count) {
    c.that(b.dtype == FLOAT32 || b.dtype == FLOAT16 || b.dtype == BFLOAT16, "%s holds %s", name, name_of(b.dtype));
    c.that(b.count == count, "%s holds %lld numbers, not %lld", name, (long long)b.count, (long long)count);
}

extern "C" SSM_EXPORT const char* add_norm_forward(const NormArguments* arguments) {
    const NormArguments& a = *arguments;
    Check c;
    c.that(a.dim >= 1 && a.rows >= 0 && a.threads >= 1, "there are %lld channels and %d threads", (long long)a.dim,
           a.threads);
    const int64_t numbers = a.rows * a.dim;
    check_floats(c, "x", a.x, numbers);
    check_floats(c, "out", a.out, numbers);
    if (a.branch.data) check_floats(c, "branch", a.branch, numbers), check_floats(c, "sum", a.sum, numbers);
    c.optional("weight", a.weight, FLOAT32, a.dim);
    c.optional("bias", a.bias, FLOAT32, a.dim);
    if (c.problem()) return c.problem();
    const auto rows = SSM_BEST(norm_rows);
    constexpr int64_t some = 16;
#pragma omp parallel num_threads(a.threads)
    {
        std::vector<float> row(a.dim + BLOCK);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < a.rows; first += some)
            rows(a, first, first + some < a.rows ? first + some : a.rows, row.data());
    }
    return nullptr;
}
