// The gate of a mixer on the CPU, y silu(z) scale, forward and backward. Mathematics: kernels/ssm_ops/silu_gate/api.py.
//
// Rows (tokens) are walked one by one, all channels of each, so that memory is read and written once and in order; they
// do not depend on each other. Plain C interface, no headers of PyTorch.

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "interface.h"

#define SSM_KERNELS "gate_kernels.h"
#include "for_each_target.h"

static Check check(const GateArguments& a) {
    Check c;
    const int64_t type = a.y.dtype, numbers = a.rows * a.dim;
    c.that(type == FLOAT32 || type == FLOAT16 || type == BFLOAT16, "y holds %s", name_of(type));
    c.that(a.threads >= 1 && a.z_row >= a.dim, "there are %d threads, and %lld numbers between rows of z", a.threads,
           (long long)a.z_row);
    c.buffer("y", a.y, type, numbers);
    c.dtype("z", a.z_dtype, type);
    return c;
}

static const char* run(const GateArguments& a, const Check& c, void (*rows)(const GateArguments&, int64_t, int64_t)) {
    if (c.problem()) return c.problem();
    constexpr int64_t some = 64;
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t first = 0; first < a.rows; first += some) {
        const FadeToZero fade;
        rows(a, first, first + some < a.rows ? first + some : a.rows);
    }
    return nullptr;
}

extern "C" {

SSM_EXPORT const char* silu_gate_forward(const GateArguments* arguments) {
    const GateArguments& a = *arguments;
    Check c = check(a);
    c.buffer("out", a.out, a.y.dtype, a.rows * a.dim);
    return run(a, c, SSM_BEST(forward_rows));
}

SSM_EXPORT const char* silu_gate_backward(const GateArguments* arguments) {
    const GateArguments& a = *arguments;
    Check c = check(a);
    c.buffer("dout", a.dout, a.y.dtype, a.rows * a.dim);
    c.buffer("dy", a.dy, a.y.dtype, a.rows * a.dim);
    c.buffer("dz", a.dz, a.y.dtype, a.rows * a.dim);
    return run(a, c, SSM_BEST(backward_rows));
}

}  // extern "C"
