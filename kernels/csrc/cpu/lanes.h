// Sixteen channels side by side: the unit of all loops here. They are one register with AVX-512, two with AVX2, four with
// SSE2 or NEON. Included by for_each_target.h, once for each.
//
// Elementary functions are polynomials, because calls into libm would not become vector operations. Their errors are
// about one unit in the last place; NaN stays NaN. (Without AVX-512, powers saturate at 1e-38 and
// 8e37 instead of 0 and infinity.)

constexpr int W = BLOCK;  // channels
constexpr int NATIVE = SSM_NATIVE, PARTS = W / NATIVE;

typedef float Native __attribute__((vector_size(4 * SSM_NATIVE)));
typedef int32_t NativeInts __attribute__((vector_size(4 * SSM_NATIVE)));

struct Lanes {
    Native v[PARTS];
};

#define SSM_PARTS for (int i = 0; i < PARTS; i++)

SSM_INLINE Lanes load(const float* from) {
    Lanes x;
    SSM_PARTS std::memcpy(&x.v[i], from + i * NATIVE, sizeof(Native));
    return x;
}

SSM_INLINE void store(float* to, Lanes x) { SSM_PARTS std::memcpy(to + i * NATIVE, &x.v[i], sizeof(Native)); }

SSM_INLINE Lanes everywhere(float value) {
    Lanes x;
    SSM_PARTS x.v[i] = value - Native{};  // minus 0 is nothing, plus 0 would change -0
    return x;
}

#define SSM_OPERATOR(op)                                   \
    SSM_INLINE Lanes operator op(Lanes x, Lanes y) {       \
        SSM_PARTS x.v[i] = x.v[i] op y.v[i];               \
        return x;                                          \
    }                                                      \
    SSM_INLINE Lanes operator op(Lanes x, float y) {       \
        SSM_PARTS x.v[i] = x.v[i] op y;                    \
        return x;                                          \
    }
SSM_OPERATOR(+)
SSM_OPERATOR(-)
SSM_OPERATOR(*)
SSM_OPERATOR(/)
#undef SSM_OPERATOR

SSM_INLINE void operator+=(Lanes& x, Lanes y) { x = x + y; }

SSM_INLINE void add_to(float* to, Lanes x) { store(to, load(to) + x); }

// The larger (smaller) of bound and x, and x where it is NaN: the processor's own operation, which compilers do not make of
// a comparison and a choice.
#if SSM_HAS_TARGETS && SSM_NATIVE == 16
SSM_INLINE Native larger(Native bound, Native x) { return (Native)_mm512_max_ps((__m512)bound, (__m512)x); }
SSM_INLINE Native smaller(Native bound, Native x) { return (Native)_mm512_min_ps((__m512)bound, (__m512)x); }
#elif SSM_HAS_TARGETS && SSM_NATIVE == 8
SSM_INLINE Native larger(Native bound, Native x) { return (Native)_mm256_max_ps((__m256)bound, (__m256)x); }
SSM_INLINE Native smaller(Native bound, Native x) { return (Native)_mm256_min_ps((__m256)bound, (__m256)x); }
#else
SSM_INLINE Native larger(Native bound, Native x) { return x < bound ? bound : x; }
SSM_INLINE Native smaller(Native bound, Native x) { return x > bound ? bound : x; }
#endif

SSM_INLINE Lanes at_least(Lanes x, float bound) {
    SSM_PARTS x.v[i] = larger(bound - Native{}, x.v[i]);
    return x;
}

SSM_INLINE Lanes at_most(Lanes x, float bound) {
    SSM_PARTS x.v[i] = smaller(bound - Native{}, x.v[i]);
    return x;
}

SSM_INLINE Lanes where_negative(Lanes x, Lanes yes, Lanes no) {
    SSM_PARTS x.v[i] = x.v[i] < 0.0f ? yes.v[i] : no.v[i];
    return x;
}

SSM_INLINE Lanes minus_magnitude(Lanes x) {
    SSM_PARTS x.v[i] = (Native)((NativeInts)x.v[i] | INT32_MIN);
    return x;
}

SSM_INLINE float sum_of(Lanes x) {
    alignas(64) float all[W];
    store(all, x);
    for (int width = W / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) all[i] += all[i + width];
    return all[0];
}

// ---- functions ------------------------------------------------------------------------------------------------------

// Several vectors that go through a function side by side, as far as there are registers: its steps depend on each
// other, and take four cycles each.
constexpr int SIDE = NATIVE / 4;

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

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold

// x 2^n, where shifted = n + MAGIC, by adding n to the exponent of x: integers, while multipliers are what is scarce here.
// Neither x nor the result may be outside of the normal numbers.
SSM_INLINE Lanes times_power_of_two(Lanes x, Lanes shifted) {
    SSM_PARTS x.v[i] = (Native)((NativeInts)x.v[i] + ((NativeInts)shifted.v[i] << 23));
    return x;
}

// 2^r for |r| <= 1/2: 1 + r q(r), exact at 0, because factors near 1 are multiplied thousands of times. Minimax, error 9e-8.
SSM_INLINE Group exp2_fraction(const Group& r) {
    constexpr float coefficients[] = {9.6715130e-3f, 5.5507336e-2f, 2.40222424e-1f, 6.93147004e-1f, 1.0f};
    Group q;
    SSM_EACH q.v[j] = everywhere(1.3264727e-3f);
    for (float c : coefficients) SSM_EACH q.v[j] = q.v[j] * r.v[j] + c;
    return q;
}

// 2^(n + r) with n = shifted - MAGIC an integer and |r| <= 1/2
SSM_INLINE Group exp2_parts(const Group& shifted, const Group& r) {
    Group q = exp2_fraction(r);
    SSM_EACH q.v[j] = times_power_of_two(q.v[j], shifted.v[j]);
    return q;
}

// 2^x
#if SSM_HAS_TARGETS && SSM_NATIVE == 16
SSM_INLINE Group exp2(const Group& x) {
    Group r;
    SSM_EACH r.v[j].v[0] = (Native)_mm512_reduce_ps((__m512)x.v[j].v[0], 0);  // x minus the nearest integer
    Group q = exp2_fraction(r);
    SSM_EACH q.v[j].v[0] = (Native)_mm512_scalef_ps((__m512)q.v[j].v[0], (__m512)(x.v[j] - r.v[j]).v[0]);
    return q;
}
#else
SSM_INLINE Group exp2(Group x) {
    Group shifted;
    SSM_EACH x.v[j] = at_most(at_least(x.v[j], -126.0f), 126.0f);
    SSM_EACH shifted.v[j] = x.v[j] + MAGIC;
    SSM_EACH x.v[j] = x.v[j] - (shifted.v[j] - MAGIC);
    return exp2_parts(shifted, x);
}
#endif

// e^-|x|
SSM_INLINE Group exp_minus_magnitude(Group x) {
    Group shifted;
    SSM_EACH x.v[j] = at_least(minus_magnitude(x.v[j]), -87.0f);
    SSM_EACH shifted.v[j] = x.v[j] * LOG2_E + MAGIC;
    SSM_EACH x.v[j] = x.v[j] * LOG2_E - (shifted.v[j] - MAGIC);
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
    SSM_EACH q.v[j] += at_least(x.v[j], 0.0f);
    return q;
}

// 1 / x, of normal numbers
#if SSM_HAS_TARGETS && SSM_NATIVE == 16
// To 14 bits, then one step of Newton's: a division takes as long as sixteen products.
SSM_INLINE Lanes reciprocal(Lanes x) {
    Lanes y;
    y.v[0] = (Native)_mm512_rcp14_ps((__m512)x.v[0]);
    return y + y * (everywhere(1.0f) - x * y);
}
#else
SSM_INLINE Lanes reciprocal(Lanes x) { return everywhere(1.0f) / x; }
#endif

// 1 / (1 + e^-x), the derivative of softplus, given e^-|x|
SSM_INLINE Group sigmoid(const Group& x, const Group& power) {
    Group y;
    SSM_EACH y.v[j] = where_negative(x.v[j], power.v[j], everywhere(1.0f)) * reciprocal(power.v[j] + 1.0f);
    return y;
}

// ---- sixteen vectors at once ----------------------------------------------------------------------------------------

// The halves of x and y put together, lower or upper half of every `step` numbers: for step = NATIVE those of the whole.
template <int step, bool upper, std::size_t... I>
SSM_INLINE Native halves(Native x, Native y, std::index_sequence<I...>) {
    return SSM_SHUFFLE(NativeInts, x, y, int(I / (step / 2) * step + I % (step / 2) + upper * (step / 2))...);
}

template <int first, std::size_t... I>
SSM_INLINE Native interleave(Native x, Native y, std::index_sequence<I...>) {
    return SSM_SHUFFLE(NativeInts, x, y, int(I % 2 * NATIVE + I / 2 + first)...);
}

constexpr auto ALL = std::make_index_sequence<NATIVE>();

// A W x W block of floats, turned over its diagonal: squares of NATIVE rows are turned in registers, by rounds of
// interleaving rows i and i + NATIVE / 2.
SSM_INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    for (int square = 0; square < PARTS * PARTS; square++) {
        const int row = square / PARTS * NATIVE, column = square % PARTS * NATIVE;
        Native rows[NATIVE], mixed[NATIVE];
        for (int i = 0; i < NATIVE; i++) std::memcpy(&rows[i], from + (row + i) * from_stride + column, sizeof(Native));
        for (int round = 1; round < NATIVE; round *= 2) {
            for (int i = 0; i < NATIVE / 2; i++) {
                mixed[2 * i] = interleave<0>(rows[i], rows[i + NATIVE / 2], ALL);
                mixed[2 * i + 1] = interleave<NATIVE / 2>(rows[i], rows[i + NATIVE / 2], ALL);
            }
            for (int i = 0; i < NATIVE; i++) rows[i] = mixed[i];
        }
        for (int i = 0; i < NATIVE; i++) std::memcpy(to + (column + i) * to_stride + row, &rows[i], sizeof(Native));
    }
}

// rows[0..2 count) -> rows[0..count), pairs of them folded into one, until one is left
template <int count, int step>
SSM_INLINE void fold(Native* rows) {
    for (int i = 0; i < count; i++) {
        const Native x = rows[2 * i], y = rows[2 * i + 1];
        rows[i] = halves<step, false>(x, y, ALL) + halves<step, true>(x, y, ALL);
    }
    if constexpr (count > 1) fold<count / 2, step / 2>(rows);
}

// Lane t of the result is the sum of the lanes of row t.
SSM_INLINE Lanes sum_rows(const float* rows) {
    Lanes sums;
    for (int part = 0; part < PARTS; part++) {
        Native all[NATIVE];
        for (int t = 0; t < NATIVE; t++) {
            const Lanes row = load(rows + (part * NATIVE + t) * W);
            all[t] = row.v[0];
            for (int i = 1; i < PARTS; i++) all[t] += row.v[i];
        }
        fold<NATIVE / 2, NATIVE>(all);
        sums.v[part] = all[0];
    }
    return sums;
}
