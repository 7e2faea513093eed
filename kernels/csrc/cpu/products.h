// Products of small matrices in the first-level cache. Included by the kernels for every instruction set, after lanes.h.
//
// A block of the result stays in registers while its factors are walked once: ROWS rows by COLUMNS vectors, which with
// what they read fill the registers of every instruction set.

constexpr int ROWS = NATIVE == 16 ? 8 : NATIVE == 8 ? 6 : 2;
constexpr int COLUMNS = NATIVE == 16 ? 2 : 1;

// Numbers lie `row` and `column` apart
struct Left {
    const float* data;
    int64_t row, column;
};

// Rows lie `row` apart, and are read in whole vectors
struct Right {
    const float* data;
    int64_t row;
};

struct Result {
    float* data;
    int64_t row;
};

SSM_INLINE int64_t whole_vectors(int64_t count) { return (count + W - 1) / W * W; }

template <int M, int N>
SSM_INLINE void product_block(const Left& x, const Right& y, const Result& z, int64_t inner) {
    Lanes sum[M][N] = {};
    for (int64_t k = 0; k < inner; k++) {
        Lanes right[N];
        for (int j = 0; j < N; j++) right[j] = load(y.data + k * y.row + j * W);
        for (int i = 0; i < M; i++) {
            const float left = x.data[i * x.row + k * x.column];
            for (int j = 0; j < N; j++) sum[i][j] += right[j] * left;
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) add_to(z.data + i * z.row + j * W, sum[i][j]);
}

// As many rows as are left, M at most
template <int M, int N>
SSM_INLINE void last_rows(const Left& x, const Right& y, const Result& z, int64_t inner, int64_t rows) {
    if constexpr (M > 0) {
        if (rows == M) return product_block<M, N>(x, y, z, inner);
        last_rows<M - 1, N>(x, y, z, inner, rows);
    }
}

template <int N>
SSM_INLINE void product_columns(Left x, const Right& y, Result z, int64_t inner, int64_t rows) {
    for (; rows >= ROWS; rows -= ROWS, x.data += ROWS * x.row, z.data += ROWS * z.row)
        product_block<ROWS, N>(x, y, z, inner);
    last_rows<ROWS - 1, N>(x, y, z, inner, rows);
}

// z += x y: x (rows, inner), y (inner, width) and z (rows, width), whose width is a multiple of W. What is added is summed
// for itself first, so that a long sum that comes in pieces loses little.
static void add_product(const Left& x, Right y, Result z, int64_t rows, int64_t inner, int64_t width) {
    for (; width >= COLUMNS * W; width -= COLUMNS * W, y.data += COLUMNS * W, z.data += COLUMNS * W)
        product_columns<COLUMNS>(x, y, z, inner, rows);
    if constexpr (COLUMNS > 1)
        if (width) product_columns<1>(x, y, z, inner, rows);
}
