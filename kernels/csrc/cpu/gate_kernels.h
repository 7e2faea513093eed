// Some rows of the gate, forward and backward; the plan is in gate.cpp, which includes this once for every instruction
// set.

#include "lanes.h"
#include "elements.h"

template <typename E>
static void forward_rows_of(const GateArguments& a, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const E* y = static_cast<const E*>(a.y.data) + row * a.dim;
        const E* z = static_cast<const E*>(a.z) + row * a.z_row;
        E* out = static_cast<E*>(a.out.data) + row * a.dim;
        for_each_group(a.dim, [&](auto whole, int64_t c, int64_t count) SSM_ALWAYS {
            Group x = load_group<whole>(y + c, count);
            const Group open = silu(load_group<whole>(z + c, count));
            SSM_EACH x.v[j] = x.v[j] * open.v[j] * a.scale;
            store_group<whole>(out + c, x, count);
        });
    }
}

static void forward_rows(const GateArguments& a, int64_t first, int64_t last) {
    with_element(a.y.dtype, [&](auto element) { forward_rows_of<decltype(element)>(a, first, last); });
}

template <typename E>
static void backward_rows_of(const GateArguments& a, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const E* y = static_cast<const E*>(a.y.data) + row * a.dim;
        const E* z = static_cast<const E*>(a.z) + row * a.z_row;
        const E* dout = static_cast<const E*>(a.dout.data) + row * a.dim;
        E* dy = static_cast<E*>(a.dy.data) + row * a.dim;
        E* dz = static_cast<E*>(a.dz.data) + row * a.dim;
        for_each_group(a.dim, [&](auto whole, int64_t c, int64_t count) SSM_ALWAYS {
            const Group gate = load_group<whole>(z + c, count), open = sigmoid(gate, exp_minus_magnitude(gate));
            const Group value = load_group<whole>(y + c, count), given = load_group<whole>(dout + c, count);
            Group to_y, to_z;
            SSM_EACH {
                const Lanes scaled = given.v[j] * a.scale;
                to_y.v[j] = scaled * (gate.v[j] * open.v[j]);
                // the derivative of z s(z) is s + z s (1 - s)
                to_z.v[j] = scaled * value.v[j] * open.v[j] * (gate.v[j] * (everywhere(1.0f) - open.v[j]) + 1.0f);
            }
            store_group<whole>(dy + c, to_y, count);
            store_group<whole>(dz + c, to_z, count);
        });
    }
}

static void backward_rows(const GateArguments& a, int64_t first, int64_t last) {
    with_element(a.y.dtype, [&](auto element) { backward_rows_of<decltype(element)>(a, first, last); });
}
