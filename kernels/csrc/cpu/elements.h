// Tensors of float32, float16 and bfloat16, read and written as sixteen floats. Included by the kernels for every
// instruction set, after lanes.h.

struct Float16 {
    uint16_t bits;
};
struct Bfloat16 {
    uint16_t bits;
};

typedef uint32_t NativeUnsigned __attribute__((vector_size(4 * SSM_NATIVE)));
typedef uint16_t NativeShorts __attribute__((vector_size(2 * SSM_NATIVE)));

SSM_INLINE NativeUnsigned choose(NativeInts which, NativeUnsigned yes, NativeUnsigned no) {
    return ((NativeUnsigned)which & yes) | (~(NativeUnsigned)which & no);
}

// Between shorts and integers: compilers do not make one instruction of a conversion to or from 512 bits.
#if SSM_HAS_TARGETS && SSM_NATIVE == 16
SSM_INLINE NativeUnsigned widen(const void* from, int part) {
    return (NativeUnsigned)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from) + part));
}

SSM_INLINE void narrow(void* to, int part, NativeUnsigned x) {
    _mm256_storeu_si256(static_cast<__m256i*>(to) + part, _mm512_cvtepi32_epi16((__m512i)x));
}
#else
SSM_INLINE NativeUnsigned widen(const void* from, int part) {
    NativeShorts x;
    std::memcpy(&x, static_cast<const uint16_t*>(from) + part * NATIVE, sizeof(x));
    return __builtin_convertvector(x, NativeUnsigned);
}

SSM_INLINE void narrow(void* to, int part, NativeUnsigned x) {
    const NativeShorts y = __builtin_convertvector(x, NativeShorts);
    std::memcpy(static_cast<uint16_t*>(to) + part * NATIVE, &y, sizeof(y));
}
#endif

SSM_INLINE Lanes load(const Bfloat16* from) {
    Lanes x;
    SSM_PARTS x.v[i] = (Native)(widen(from, i) << 16);
    return x;
}

// Rounded to the nearest, ties to even; NaN stays one.
SSM_INLINE void store(Bfloat16* to, Lanes x) {
    SSM_PARTS {
        const NativeUnsigned bits = (NativeUnsigned)x.v[i];
        const NativeUnsigned rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
        narrow(to, i, choose(x.v[i] == x.v[i], rounded, quiet));
    }
}

#if SSM_HAS_TARGETS && SSM_NATIVE == 16
SSM_INLINE Lanes load(const Float16* from) {
    Lanes x;
    x.v[0] = (Native)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return x;
}

SSM_INLINE void store(Float16* to, Lanes x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)x.v[0], nearest));
}
#else
SSM_INLINE Lanes load(const Float16* from) {
    Lanes x;
    SSM_PARTS {
        const NativeUnsigned bits = widen(from, i), sign = (bits & 0x8000) << 16;
        // the same exponent, 112 too small, also for what is below the normal numbers
        const Native magnitude = (Native)((bits & 0x7fff) << 13) * 0x1p112f;
        const NativeUnsigned finite = (NativeUnsigned)magnitude;
        x.v[i] = (Native)(sign | choose((bits & 0x7fff) >= 0x7c00, finite | 0x7f800000, finite));
    }
    return x;
}

// Rounded to the nearest, ties to even; from 65520 on infinite; NaN stays one.
SSM_INLINE void store(Float16* to, Lanes x) {
    SSM_PARTS {
        const NativeUnsigned bits = (NativeUnsigned)x.v[i], size = bits & 0x7fffffff;
        const NativeUnsigned normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
        // below the normal numbers all lie 2^-24 apart, as floats from 1/2 to 1 do
        const NativeUnsigned small = (NativeUnsigned)((Native)size + 0.5f) - 0x3f000000;
        NativeUnsigned half = choose(size < 0x38800000, small, normal);
        half = choose(size >= 0x477ff000, NativeUnsigned{} + 0x7c00, half);
        half = choose(x.v[i] == x.v[i], half, NativeUnsigned{} + 0x7e00);
        narrow(to, i, (bits >> 16 & 0x8000) | half);
    }
}
#endif

// `count` elements, the other lanes 0; the first `count` lanes.
template <typename E>
SSM_INLINE Lanes load_some(const E* from, int64_t count) {
    if (count >= W) return load(from);
    alignas(64) E all[W] = {};
    std::memcpy(all, from, sizeof(E) * count);
    return load(all);
}

template <typename E>
SSM_INLINE void store_some(E* to, Lanes x, int64_t count) {
    if (count >= W) return store(to, x);
    alignas(64) E all[W];
    store(all, x);
    std::memcpy(to, all, sizeof(E) * count);
}

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

// The same for SIDE vectors, which are `whole` where count is known to be enough for all.
template <bool whole, typename E>
SSM_INLINE Group load_group(const E* from, int64_t count) {
    Group x;
    if constexpr (whole)
        SSM_EACH x.v[j] = load(from + j * W);
    else
        SSM_EACH x.v[j] = count > j * W ? load_some(from + j * W, count - j * W) : Lanes{};
    return x;
}

template <bool whole, typename E>
SSM_INLINE void store_group(E* to, const Group& x, int64_t count) {
    if constexpr (whole)
        SSM_EACH store(to + j * W, x.v[j]);
    else
        SSM_EACH if (count > j * W) store_some(to + j * W, x.v[j], count - j * W);
}

// Calls function(whole, c, count) for the groups of a row of `dim` numbers: from c on, count of them; whole is a constant.
template <typename Function>
SSM_INLINE void for_each_group(int64_t dim, Function function) {
    int64_t c = 0;
    for (; c + SIDE * W <= dim; c += SIDE * W) function(std::true_type{}, c, int64_t(SIDE * W));
    if (c < dim) function(std::false_type{}, c, dim - c);
}

// x / (1 + e^-x)
SSM_INLINE Group silu(const Group& x) {
    Group y = sigmoid(x, exp_minus_magnitude(x));
    SSM_EACH y.v[j] = y.v[j] * x.v[j];
    return y;
}

// Calls function with an element of the type that `dtype` says.
template <typename Function>
SSM_INLINE void with_element(int64_t dtype, Function function) {
    if (dtype == FLOAT32) return function(float{});
    if (dtype == FLOAT16) return function(Float16{});
    function(Bfloat16{});
}
