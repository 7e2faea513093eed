// Cross scan and cross merge on the CPU. Mathematics: kernels/ssm_ops/cross_scan/api.py.
//
// A route numbers the pixels of a map: the place of pixel (h, w) on it is linear in h and w, with steps (W, 1) along
// the rows, (1, H) along the columns, both negative backwards. So all routes, in every layout, are copies between two
// arrays (channel, row, column) with different strides. Tiles of them fit into the caches; where different axes are
// contiguous on the two sides, square blocks are turned over their diagonal in registers.
//
// Every number of a result is written by one tile, so nothing depends on the number of threads.
//
// Shapes: batch B, channels C, map H W, L = H * W, K = 4 routes. Plain C interface, no headers of PyTorch.

#include <cstdint>
#include <cstring>
#include <utility>

#include "interface.h"
#include "platform.h"

namespace {

using Args = CrossArguments;

enum Axis { CHANNEL, ROW, COLUMN };

constexpr int64_t PART = 4096, TILE = 16 * PART;  // numbers: the first-level cache holds parts, the second a tile

// An array over (channel, row, column); the stride of axis `unit` is 1 or -1.
template <typename T>
struct View {
    T* data;
    int64_t stride[3];
    int unit;

    void move(const int64_t* by) {
        for (int axis = 0; axis < 3; axis++) data += by[axis] * stride[axis];
    }

    void flip(int axis, int64_t n) {
        data += (n - 1) * stride[axis];
        stride[axis] = -stride[axis];
    }
};

// ---- copies ---------------------------------------------------------------------------------------------------------

// The first (second) halves of x and y by turns; Mask is a vector of integers as wide as its numbers
template <typename Mask, int N, int first, typename Vector, std::size_t... I>
SSM_INLINE Vector interleave(Vector x, Vector y, std::index_sequence<I...>) {
    return SSM_SHUFFLE(Mask, x, y, (I % 2 * N + I / 2 + first)...);
}

// to[j][i] = from[i][j] for i, j < N: log2(N) rounds of interleaving rows i and i + N/2. T is an unsigned integer.
template <int N, typename T>
SSM_INLINE void turn_block(T* to, int64_t to_stride, const T* from, int64_t from_stride) {
    typedef T Row __attribute__((vector_size(N * sizeof(T))));
    const auto places = std::make_index_sequence<N>{};
    Row rows[N], mixed[N];
    for (int i = 0; i < N; i++) std::memcpy(&rows[i], from + i * from_stride, sizeof(Row));
    for (int round = 1; round < N; round *= 2) {
        for (int i = 0; i < N / 2; i++) {
            mixed[2 * i] = interleave<Row, N, 0>(rows[i], rows[i + N / 2], places);
            mixed[2 * i + 1] = interleave<Row, N, N / 2>(rows[i], rows[i + N / 2], places);
        }
        for (int i = 0; i < N; i++) rows[i] = mixed[i];
    }
    for (int i = 0; i < N; i++) std::memcpy(to + i * to_stride, &rows[i], sizeof(Row));
}

// to[j][i] = from[i][j] for i < n, j < m, where both are at least N: the last blocks overlap those before them.
template <int N, typename T>
SSM_INLINE void turn_blocks(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t n, int64_t m) {
    for (int64_t j = 0; j < m; j += N) {
        const int64_t column = j < m - N ? j : m - N;
        for (int64_t i = 0; i < n; i += N) {
            const int64_t row = i < n - N ? i : n - N;
            turn_block<N>(to + column * to_stride + row, to_stride, from + row * from_stride + column, from_stride);
        }
    }
}

// As turn_blocks, for any n and m
template <typename T>
SSM_INLINE void turn(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t n, int64_t m) {
    const int64_t least = n < m ? n : m;
    if (sizeof(T) < 8 && least >= 16)
        turn_blocks<sizeof(T) < 8 ? 16 : 8>(to, to_stride, from, from_stride, n, m);
    else if (least >= 8)
        turn_blocks<8>(to, to_stride, from, from_stride, n, m);
    else if (least >= 4)
        turn_blocks<4>(to, to_stride, from, from_stride, n, m);
    else
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < m; j++) to[j * to_stride + i] = from[i * from_stride + j];
}

// to[i] = from[-i]
template <typename T>
SSM_INLINE void reverse(T* __restrict to, const T* from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = from[-i];
}

// to[c, h, w] = from[c, h, w]
template <typename T>
SSM_INLINE void copy(View<T> to, View<T> from, const int64_t* size) {
    int64_t n[3] = {size[0], size[1], size[2]};
    const int unit = to.unit;
    for (int axis = 0; axis < 3; axis++)
        if (to.stride[axis] < 0) {
            to.flip(axis, n[axis]);
            from.flip(axis, n[axis]);
        }
    if (from.unit != unit) {
        const int other = from.unit, third = 3 - unit - other;
        if (from.stride[other] < 0) {
            to.flip(other, n[other]);
            from.flip(other, n[other]);
        }
        for (int64_t i = 0; i < n[third]; i++)
            turn(
                to.data + i * to.stride[third], to.stride[other], from.data + i * from.stride[third],
                from.stride[unit], n[unit], n[other]);
        return;
    }
    const int64_t step = from.stride[unit];
    for (int axis = 2; axis >= 0; axis--)  // an axis that continues the contiguous one on both sides lengthens it
        if (axis != unit && to.stride[axis] == n[unit] && from.stride[axis] == n[unit] * step) {
            n[unit] *= n[axis];
            n[axis] = 1;
        }
    const int outer = unit == CHANNEL ? ROW : CHANNEL, middle = 3 - unit - outer;
    for (int64_t i = 0; i < n[outer]; i++)
        for (int64_t j = 0; j < n[middle]; j++) {
            T* t = to.data + i * to.stride[outer] + j * to.stride[middle];
            const T* f = from.data + i * from.stride[outer] + j * from.stride[middle];
            if (step == 1)
                std::memcpy(t, f, n[unit] * sizeof(T));
            else
                reverse(t, f, n[unit]);
        }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// Sample b; channels, rows and columns first .. first + n.
struct Tile {
    int64_t b, first[3], n[3];
};

struct Tiling {
    int64_t n[3], count[3];
};

SSM_INLINE int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

// What is contiguous on either side is long. A tile is a PART, or where map and routes differ in that, a TILE of which
// each channel (each row, where channels come last in the routes) is no more than a PART.
SSM_INLINE Tiling make_tiling(const Args& a) {
    Tiling t;
    int64_t* n = t.n;
    if (a.map_last && a.routes_last) {
        n[CHANNEL] = at_most(a.size[CHANNEL], PART / 4);
        n[ROW] = 1;
        n[COLUMN] = at_most(a.size[COLUMN], PART / n[CHANNEL]);
    } else {
        const bool same = a.map_last == a.routes_last;
        n[ROW] = at_most(a.size[ROW], 64);
        n[COLUMN] = at_most(a.size[COLUMN], 64);
        n[CHANNEL] = at_most(a.size[CHANNEL], same ? PART / (n[ROW] * n[COLUMN]) : 64);
        if (!same && n[CHANNEL] > 16 && n[CHANNEL] * n[ROW] * n[COLUMN] > TILE) n[CHANNEL] = 16;
    }
    for (int axis = 0; axis < 3; axis++) t.count[axis] = (a.size[axis] + t.n[axis] - 1) / t.n[axis];
    return t;
}

SSM_INLINE Tile make_tile(const Args& a, const Tiling& tiling, int64_t index) {
    Tile tile;
    for (int axis = 2; axis >= 0; axis--) {
        tile.first[axis] = index % tiling.count[axis] * tiling.n[axis];
        tile.n[axis] = at_most(tiling.n[axis], a.size[axis] - tile.first[axis]);
        index /= tiling.count[axis];
    }
    tile.b = index;
    return tile;
}

// The tile on map k
template <typename T>
SSM_INLINE View<T> on_map(const Args& a, const Tile& tile, int k) {
    View<T> v = {static_cast<T*>(a.map) + tile.b * a.map_batch + k * a.map_route, {}, a.map_last ? CHANNEL : COLUMN};
    std::memcpy(v.stride, a.map_stride, sizeof(v.stride));
    v.move(tile.first);
    return v;
}

// The tile on route k
template <typename T>
SSM_INLINE View<T> on_route(const Args& a, const Tile& tile, int k) {
    const bool columns = a.columns >> k & 1, backwards = a.backwards >> k & 1;
    const int64_t height = a.size[ROW], width = a.size[COLUMN], step = backwards ? -a.route_place : a.route_place;
    View<T> v = {
        static_cast<T*>(a.routes) + tile.b * a.route_batch + k * a.route_route,
        {a.route_channel, columns ? step : width * step, columns ? height * step : step},
        a.routes_last ? CHANNEL : columns ? ROW : COLUMN};
    if (backwards) v.data += (height * width - 1) * a.route_place;
    v.move(tile.first);
    return v;
}

// A contiguous array of the size of the tile, in the order of the routes along the rows
template <typename T>
SSM_INLINE View<T> in_buffer(const Args& a, const Tile& tile, T* buffer) {
    const int64_t channels = tile.n[CHANNEL], height = tile.n[ROW], width = tile.n[COLUMN];
    if (a.routes_last) return {buffer, {1, width * channels, channels}, CHANNEL};
    return {buffer, {height * width, width, 1}, COLUMN};
}

template <typename Bits>
SSM_INLINE void scan(const Args& a, const Tile& tile) {
    alignas(64) Bits turned[TILE];
    View<Bits> x = on_map<Bits>(a, tile, 0);
    for (int k = 0; k < 4; k++) {
        if (k == 0 || a.one_by_one) {
            x = on_map<Bits>(a, tile, k);
            if (a.map_last != a.routes_last) {
                const View<Bits> to = in_buffer(a, tile, turned);
                copy(to, x, tile.n);
                x = to;
            }
        }
        copy(on_route<Bits>(a, tile, k), x, tile.n);
    }
}

template <typename Bits>
SSM_INLINE void unscan(const Args& a, const Tile& tile) {
    for (int k = 0; k < 4; k++) copy(on_map<Bits>(a, tile, k), on_route<Bits>(a, tile, k), tile.n);
}

template <typename Number>
SSM_INLINE void merge_part(const Args& a, const Tile& part, View<typename Number::Bits> to) {
    alignas(64) typename Number::Bits y[4][PART];
    for (int k = 0; k < 4; k++) copy(in_buffer(a, part, y[k]), on_route<typename Number::Bits>(a, part, k), part.n);
    const int64_t count = part.n[0] * part.n[1] * part.n[2];
    for (int64_t i = 0; i < count; i++) {  // the order of the additions is the reference's
        const auto rows = Number::widen(y[0][i]) + Number::widen(y[2][i]);
        const auto columns = Number::widen(y[1][i]) + Number::widen(y[3][i]);
        y[0][i] = Number::narrow(rows + columns);
    }
    copy(to, in_buffer(a, part, y[0]), part.n);
}

template <typename Number>
SSM_INLINE void merge(const Args& a, const Tile& tile) {
    using Bits = typename Number::Bits;
    const View<Bits> x = on_map<Bits>(a, tile, 0);
    if (a.map_last == a.routes_last) {
        merge_part<Number>(a, tile, x);
        return;
    }
    alignas(64) Bits sum[TILE];
    const View<Bits> whole = in_buffer(a, tile, sum);
    const int axis = a.routes_last ? ROW : CHANNEL;
    const int64_t n = tile.n[axis], step = PART * n / (tile.n[0] * tile.n[1] * tile.n[2]);
    for (int64_t i = 0; i < n; i += step) {
        Tile part = tile;
        part.first[axis] += i;
        part.n[axis] = at_most(n - i, step);
        View<Bits> to = whole;
        to.data += i * to.stride[axis];
        merge_part<Number>(a, part, to);
    }
    copy(x, whole, tile.n);
}

// ---- numbers --------------------------------------------------------------------------------------------------------

template <typename To, typename From>
SSM_INLINE To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <typename Float, typename Unsigned>
struct Whole {  // is added as it is
    using Bits = Unsigned;
    SSM_INLINE Float widen(Bits bits) { return same_bits<Float>(bits); }
    SSM_INLINE Bits narrow(Float x) { return same_bits<Bits>(x); }
};

struct Float16 {  // by hand: not every compiler has the type
    using Bits = uint16_t;
    SSM_INLINE float widen(Bits bits) {
        const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
        const float finite = same_bits<float>(magnitude) * 0x1p112f;  // subnormal numbers come out right
        const uint32_t value = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : same_bits<uint32_t>(finite);
        return same_bits<float>(value | static_cast<uint32_t>(bits & 0x8000) << 16);
    }
    SSM_INLINE Bits narrow(float x) {  // to the nearest, ties to even
        const uint32_t all = same_bits<uint32_t>(x), bits = all & 0x7fffffff;
        // below 2^-14: adding 1/2 leaves the bits of a subnormal number, rounded, in the last places
        const uint32_t small = same_bits<uint32_t>(same_bits<float>(bits) + 0.5f) - 0x3f000000;
        const uint32_t normal = (bits + 0xc8000fff + (bits >> 13 & 1)) >> 13;
        const uint32_t large = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
        const uint32_t magnitude = bits >= 0x47800000 ? large : bits < 0x38800000 ? small : normal;
        return magnitude | (all >> 16 & 0x8000);
    }
};

struct BFloat16 {  // the upper half of a float
    using Bits = uint16_t;
    SSM_INLINE float widen(Bits bits) { return same_bits<float>(static_cast<uint32_t>(bits) << 16); }
    SSM_INLINE Bits narrow(float x) {  // to the nearest, ties to even; adding could carry a NaN to infinity
        const uint32_t bits = same_bits<uint32_t>(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
        return x != x ? 0x7fc0 : rounded >> 16;
    }
};

SSM_VERSIONS void scan16(const Args& a, const Tile& tile) { scan<uint16_t>(a, tile); }
SSM_VERSIONS void scan32(const Args& a, const Tile& tile) { scan<uint32_t>(a, tile); }
SSM_VERSIONS void scan64(const Args& a, const Tile& tile) { scan<uint64_t>(a, tile); }
SSM_VERSIONS void unscan16(const Args& a, const Tile& tile) { unscan<uint16_t>(a, tile); }
SSM_VERSIONS void unscan32(const Args& a, const Tile& tile) { unscan<uint32_t>(a, tile); }
SSM_VERSIONS void unscan64(const Args& a, const Tile& tile) { unscan<uint64_t>(a, tile); }
SSM_VERSIONS void merge_float16(const Args& a, const Tile& tile) { merge<Float16>(a, tile); }
SSM_VERSIONS void merge_bfloat16(const Args& a, const Tile& tile) { merge<BFloat16>(a, tile); }
SSM_VERSIONS void merge_float32(const Args& a, const Tile& tile) { merge<Whole<float, uint32_t>>(a, tile); }
SSM_VERSIONS void merge_float64(const Args& a, const Tile& tile) { merge<Whole<double, uint64_t>>(a, tile); }

Check check(const Args& a) {
    Check c;
    c.dtype("the result", a.routes_dtype, a.map_dtype);
    c.that(a.map_routes == (a.one_by_one ? 4 : 1), "there are %lld maps", (long long)a.map_routes);
    const int64_t routes[] = {a.batch, 4, a.size[CHANNEL], a.size[ROW] * a.size[COLUMN]};
    c.shape("the routes", a.routes_size, routes);
    c.that(a.map_stride[a.map_last ? CHANNEL : COLUMN] == 1, "the map is not contiguous along its channels or columns");
    c.that((a.routes_last ? a.route_channel : a.route_place) == 1, "the routes are not contiguous along either dimension");
    c.that(a.threads >= 1, "there are %d threads", a.threads);
    return c;
}

using Run = void (*)(const Args&, const Tile&);

const char* for_tiles(const Args& a, const Check& check, Run run) {
    if (check.problem()) return check.problem();
    const Tiling tiling = make_tiling(a);
    const int64_t count = a.batch * tiling.count[0] * tiling.count[1] * tiling.count[2];
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t i = 0; i < count; i++) run(a, make_tile(a, tiling, i));
    return nullptr;
}

// A scan only moves: it asks for the size of a number alone.
const char* move(const Args& a, Run of_2_bytes, Run of_4_bytes, Run of_8_bytes) {
    Check c = check(a);
    const int64_t bytes = bytes_of(a.map_dtype);
    c.that(bytes != 0, "the map holds %s", name_of(a.map_dtype));
    return for_tiles(a, c, bytes == 2 ? of_2_bytes : bytes == 4 ? of_4_bytes : of_8_bytes);
}

}  // namespace

extern "C" {

SSM_EXPORT const char* cross_scan(const CrossArguments* a) { return move(*a, scan16, scan32, scan64); }

// Four routes into four maps
SSM_EXPORT const char* cross_unscan(const CrossArguments* a) { return move(*a, unscan16, unscan32, unscan64); }

// Four routes into their sum
SSM_EXPORT const char* cross_merge(const CrossArguments* a) {
    Check c = check(*a);
    const Run runs[] = {nullptr, merge_float32, merge_float16, merge_bfloat16, merge_float64};  // as in DType
    c.that(a->map_dtype >= FLOAT32 && a->map_dtype <= FLOAT64, "the map holds %s", name_of(a->map_dtype));
    return for_tiles(*a, c, c.problem() ? nullptr : runs[a->map_dtype]);
}

}  // extern "C"
