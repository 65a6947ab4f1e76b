// Products that torch has no operator for on the CPU: of bfloat16 in float32, and with rows of
// `weight` picked by index, read in place.

#include "vectors.h"

#include <cstdlib>
#include <type_traits>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// Columns and features of `weight` that are unpacked at a time; they stay in the second-level cache.
enum { COLUMNS = 128, PANEL = 512 };

// ---- Whole products of bfloat16

#ifdef __AVX512BF16__
// Lanes are words: WORDS rows of w are packed so that one load holds a pair of features of 16
// words, and ROWS rows of x share it.
enum { ROWS = 12, WORDS = 32, PAIRS = FEATURES / 2 };

static void pack(const uint16_t *w, int64_t stride, int words, int64_t d, uint32_t *packed)
{
    int64_t whole = d / 2;
    for (int64_t first = 0; first < whole; first += 16)  // a cache line of every word in turn
        for (int v = 0; v < words; v++) {
            int64_t last = first + 16 < whole ? first + 16 : whole;
            const uint16_t *from = w + v * stride;
            for (int64_t k = first; k < last; k++)
                memcpy(packed + k * WORDS + v, from + 2 * k, 4);
        }
    if (d % 2)
        for (int v = 0; v < words; v++) packed[whole * WORDS + v] = w[v * stride + d - 1];
    for (int v = words; v < WORDS; v++)
        for (int64_t k = 0; k < (d + 1) / 2; k++) packed[k * WORDS + v] = 0;
}

template <int rows>
static void product_block(const uint32_t *x, int64_t stride_x, const uint32_t *packed, int64_t pairs,
                  float *z, int64_t stride_z, __mmask16 low, __mmask16 high, bool add)
{
    __m512 a[rows], b[rows];
    for (int r = 0; r < rows; r++) a[r] = b[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh w0 = (__m512bh)_mm512_load_si512(packed + k * WORDS);
        __m512bh w1 = (__m512bh)_mm512_load_si512(packed + k * WORDS + 16);
        for (int r = 0; r < rows; r++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[r * stride_x + k]);
            a[r] = _mm512_dpbf16_ps(a[r], pair, w0);
            b[r] = _mm512_dpbf16_ps(b[r], pair, w1);
        }
    }
    for (int r = 0; r < rows; r++, z += stride_z) {
        if (add) {
            a[r] = _mm512_add_ps(a[r], _mm512_maskz_loadu_ps(low, z));
            b[r] = _mm512_add_ps(b[r], _mm512_maskz_loadu_ps(high, z + 16));
        }
        _mm512_mask_storeu_ps(z, low, a[r]);
        _mm512_mask_storeu_ps(z + 16, high, b[r]);
    }
}

static void product_of(const uint32_t *x, int64_t n, int64_t stride_x, const uint16_t *w,
                       int64_t stride_w, int64_t vocab, int64_t d, float *z, int64_t stride_z)
{
    int64_t all = (d + 1) / 2;
    uint32_t *packed = (uint32_t *)aligned_alloc(64, all * WORDS * 4);
    for (int64_t v = 0; v < vocab; v += WORDS, z += WORDS) {
        int words = vocab - v < WORDS ? vocab - v : WORDS;
        pack(w + v * stride_w, stride_w, words, d, packed);
        uint32_t mask = words == WORDS ? ~0u : (1u << words) - 1;
        __mmask16 low = mask & 0xffff, high = mask >> 16;
        for (int64_t k = 0; k < all; k += PAIRS) {
            int64_t pairs = all - k < PAIRS ? all - k : PAIRS, r = 0;
            const uint32_t *xk = x + k, *pk = packed + k * WORDS;
#define SWEEP(rows)                                                                          \
    for (; r + rows <= n; r += rows)                                                         \
        product_block<rows>(xk + r * stride_x, stride_x, pk, pairs, z + r * stride_z, stride_z, low, \
                    high, k > 0);
            SWEEP(ROWS) SWEEP(8) SWEEP(4) SWEEP(1)
        }
    }
    free(packed);
}
#endif

// z[n, v] = sum over d of x[n, d] w[v, d]; rows of x are `stride_x` pairs of features, the last
// pair completed with zero. Returns 1 where the processor does not multiply bfloat16.
extern "C" int product(const uint32_t *x, int64_t n, int64_t stride_x, const uint16_t *w,
                       int64_t stride_w, int64_t vocab, int64_t d, float *z, int64_t stride_z,
                       int threads)
{
#ifdef __AVX512BF16__
    split(vocab, 64, threads, [=](int64_t first, int64_t last) {
        product_of(x, n, stride_x, w + first * stride_w, stride_w, last - first, d, z + first,
                   stride_z);
    });
    return 0;
#else
    return 1;
#endif
}

extern "C" int multiplies_bf16()
{
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

// ---- Products with picked rows of weight

static inline float widen(float x) { return x; }

static inline float widen(uint16_t x)  // bfloat16
{
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

// acc[w][m] += sum over k of weight[w][k] * x[k][m]: lanes are rows of x, which stands transposed,
// so that rows of weight are read in place.
template <int M, int W>
static void logit_block(const float *const *weight, const float *x, int64_t stride_x, int64_t size,
                        float *const *z, bool add)
{
    vf acc[W][M];
    for (int w = 0; w < W; w++)
        for (int m = 0; m < M; m++) acc[w][m] = add ? load(z[w] + m * LANES) : (vf){};
    for (int64_t k = 0; k < size; k++) {
        vf v[M];
        for (int m = 0; m < M; m++) v[m] = load(x + k * stride_x + m * LANES);
        for (int w = 0; w < W; w++)
            for (int m = 0; m < M; m++) acc[w][m] += weight[w][k] * v[m];
    }
    for (int w = 0; w < W; w++)
        for (int m = 0; m < M; m++) store(z[w] + m * LANES, acc[w][m]);
}

#ifdef __AVX512BF16__
// The same for pairs of bfloat16 features.
template <int M, int W>
static void logit_block(const uint32_t *const *weight, const uint32_t *x, int64_t stride_x,
                        int64_t size, float *const *z, bool add)
{
    vf acc[W][M];
    for (int w = 0; w < W; w++)
        for (int m = 0; m < M; m++) acc[w][m] = add ? load(z[w] + m * LANES) : (vf){};
    for (int64_t k = 0; k < size; k++) {
        __m512bh v[M];
        for (int m = 0; m < M; m++)
            v[m] = (__m512bh)_mm512_loadu_si512(x + k * stride_x + m * LANES);
        for (int w = 0; w < W; w++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32((int)weight[w][k]);
            for (int m = 0; m < M; m++)
                acc[w][m] = (vf)_mm512_dpbf16_ps((__m512)acc[w][m], pair, v[m]);
        }
    }
    for (int w = 0; w < W; w++)
        for (int m = 0; m < M; m++) store(z[w] + m * LANES, acc[w][m]);
}
#endif

// T: float, or uint32_t for a pair of bfloat16. M vectors of rows from x; z is (columns, stride_z).
template <int M, typename T>
static void logit_rows(const T *weight, int64_t stride_w, const int64_t *cols, int64_t first,
                       int64_t last, const T *x, int64_t stride_x, int64_t width, float *z,
                       int64_t stride_z)
{
    enum { W = ACCUMULATORS / M > 12 ? 12 : ACCUMULATORS / M };
    int64_t step = std::is_same<T, float>::value ? FEATURES : FEATURES / 2;
    for (int64_t c = first; c < last; c += W) {
        int64_t count = last - c < W ? last - c : W;
        for (int64_t k = 0; k < width; k += step) {
            int64_t size = width - k < step ? width - k : step;
            const T *rows[W];
            float *to[W];
            for (int w = 0; w < W; w++) {
                int64_t at = c + (w < count ? w : count - 1);
                rows[w] = weight + cols[at] * stride_w + k;
                to[w] = z + at * stride_z;
            }
            if (count == W)
                logit_block<M, W>(rows, x + k * stride_x, stride_x, size, to, k > 0);
            else
                for (int w = 0; w < count; w++)
                    logit_block<M, 1>(rows + w, x + k * stride_x, stride_x, size, to + w, k > 0);
        }
    }
}

// z[c][r] = sum over k of weight[cols[c]][k] * x[k][r], for `rows` (a multiple of LANES) rows.
template <typename T>
static void logits_of(const T *weight, int64_t stride_w, const int64_t *cols, int64_t count,
                      const T *x, int64_t rows, int64_t width, float *z, int threads)
{
    split(count, 64, threads, [=](int64_t first, int64_t last) {
        for (int64_t r = 0; r < rows;) {
            int64_t left = (rows - r) / LANES;
            const T *from = x + r;
            float *to = z + r;
            if (WIDEST >= 4 && left >= 4) {
                logit_rows<WIDEST>(weight, stride_w, cols, first, last, from, rows, width, to, rows);
                r += WIDEST * LANES;
            } else if (left >= 2) {
                logit_rows<2>(weight, stride_w, cols, first, last, from, rows, width, to, rows);
                r += 2 * LANES;
            } else {
                logit_rows<1>(weight, stride_w, cols, first, last, from, rows, width, to, rows);
                r += LANES;
            }
        }
    });
}

extern "C" int picked_logits(const void *weight, int is_bf16, int64_t stride_w, const int64_t *cols,
                             int64_t count, const void *x, int64_t rows, int64_t width, float *z,
                             int threads)
{
    if (!is_bf16) {
        logits_of((const float *)weight, stride_w, cols, count, (const float *)x, rows, width, z,
                  threads);
        return 0;
    }
#ifdef __AVX512BF16__
    logits_of((const uint32_t *)weight, stride_w / 2, cols, count, (const uint32_t *)x, rows,
              width / 2, z, threads);
    return 0;
#else
    return 1;
#endif
}

// d_x[r][:] += sum over columns g[c][r] w[at[c]][:], M vectors of features; rows of w are as long.
template <int R, int M>
static void state_block(const float *g, int64_t rows, const float *w, const int32_t *at,
                        int64_t count, float *d_x, int64_t stride)
{
    vf acc[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) acc[r][m] = load(d_x + r * stride + m * LANES);
    for (int64_t c = 0; c < count; c++) {
        vf v[M];
        for (int m = 0; m < M; m++) v[m] = load(w + at[c] * M * LANES + m * LANES);
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) acc[r][m] += g[c * rows + r] * v[m];
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) store(d_x + r * stride + m * LANES, acc[r][m]);
}

// d_w[at[c]][:] += sum over rows g[c][r] x[r][:]
template <int C, int M>
static void weight_block(const float *g, int64_t rows, const float *x, int64_t stride, float *d_w,
                         const int32_t *at)
{
    vf acc[C][M] = {};
    for (int64_t r = 0; r < rows; r++) {
        vf v[M];
        for (int m = 0; m < M; m++) v[m] = load(x + r * stride + m * LANES);
        for (int c = 0; c < C; c++)
            for (int m = 0; m < M; m++) acc[c][m] += g[c * rows + r] * v[m];
    }
    for (int c = 0; c < C; c++)
        for (int m = 0; m < M; m++) {
            float *to = d_w + at[c] * M * LANES + m * LANES;
            store(to, load(to) + acc[c][m]);
        }
}

// A tile's gradients g (count, rows) of the logits on `count` columns, given by their ascending places
// in the call's list of columns; its states x and, or null, d_x, (rows, stride).
struct TileGradients {
    const float *g;
    const int32_t *places;
    int64_t count, rows;
    const float *x;
    float *d_x;
};

// Adds the gradients of all tiles to their d_x and to rows `cols` of d_weight (of `width` features),
// where not null. stride is a multiple of WIDEST * LANES, x beyond `width` filled with 0. Column by
// column for all tiles, so that each row of the weight and of its gradient is touched once.
template <typename T>
static void gradients_of(const T *weight, int64_t stride_w, const int64_t *cols, int64_t count,
                         const TileGradients *tiles, int64_t n_tiles, float *d_weight,
                         int64_t width, int64_t stride, int threads)
{
    enum { M = WIDEST, WIDTH = M * LANES, B = ACCUMULATORS / M };
    split((width + WIDTH - 1) / WIDTH * WIDTH, WIDTH, threads, [=](int64_t first, int64_t last) {
        // (WIDTH features of COLUMNS columns), one block of features after the other
        float *w = (float *)aligned_alloc(64, COLUMNS * PANEL * 4);
        float *d_w = (float *)aligned_alloc(64, COLUMNS * PANEL * 4);
        std::vector<int64_t> at(n_tiles);
        std::vector<int32_t> place(COLUMNS);
        for (int64_t from = first; from < last; from += PANEL) {
            int64_t to = last - from < PANEL ? last : from + PANEL;
            for (auto &i : at) i = 0;
            for (int64_t c = 0; c < count; c += COLUMNS) {
                int64_t size = count - c < COLUMNS ? count - c : COLUMNS;
                for (int64_t i = 0; i < size; i++)
                    for (int64_t d = from; d < to; d += WIDTH) {
                        const T *row = weight + cols[c + i] * stride_w + d;
                        float *out = w + ((d - from) * COLUMNS + i * WIDTH);
                        int64_t k = 0, features = width - d < WIDTH ? width - d : WIDTH;
                        if (features == WIDTH)
                            for (; k < WIDTH; k++) out[k] = widen(row[k]);
                        for (; k < features; k++) out[k] = widen(row[k]);
                        for (; k < WIDTH; k++) out[k] = 0;
                    }
                memset(d_w, 0, COLUMNS * (to - from) * 4);
                for (int64_t t = 0; t < n_tiles; t++) {
                    const TileGradients &tile = tiles[t];
                    int64_t rows = tile.rows, some = 0;
                    const float *g = tile.g + at[t] * rows;
                    for (; at[t] < tile.count && tile.places[at[t]] < c + size; at[t]++)
                        place[some++] = (int32_t)(tile.places[at[t]] - c);
                    for (int64_t d = from; some && d < to; d += WIDTH) {
                        const float *wd = w + (d - from) * COLUMNS;
                        float *dd = d_w + (d - from) * COLUMNS;
                        int64_t r = 0, i = 0;
                        if (float *dx = tile.d_x ? tile.d_x + d : nullptr) {
                            for (; r + B <= rows; r += B)
                                state_block<B, M>(g + r, rows, wd, place.data(), some,
                                                  dx + r * stride, stride);
                            for (; r + 2 <= rows; r += 2)
                                state_block<2, M>(g + r, rows, wd, place.data(), some,
                                                  dx + r * stride, stride);
                            for (; r < rows; r++)
                                state_block<1, M>(g + r, rows, wd, place.data(), some,
                                                  dx + r * stride, stride);
                        }
                        if (!d_weight) continue;
                        for (; i + B <= some; i += B)
                            weight_block<B, M>(g + i * rows, rows, tile.x + d, stride, dd,
                                               place.data() + i);
                        for (; i < some; i++)
                            weight_block<1, M>(g + i * rows, rows, tile.x + d, stride, dd,
                                               place.data() + i);
                    }
                }
                for (int64_t i = 0; d_weight && i < size; i++)
                    for (int64_t d = from; d < to && d < width; d += WIDTH) {
                        int64_t features = width - d < WIDTH ? width - d : WIDTH;
                        float *out = d_weight + cols[c + i] * width + d;
                        const float *add = d_w + (d - from) * COLUMNS + i * WIDTH;
                        for (int64_t k = 0; k < features; k++) out[k] += add[k];
                    }
            }
        }
        free(w);
        free(d_w);
    });
}

extern "C" void picked_gradients(const void *weight, int is_bf16, int64_t stride_w,
                                 const int64_t *cols, int64_t count, const TileGradients *tiles,
                                 int64_t n_tiles, float *d_weight, int64_t width, int64_t stride,
                                 int threads)
{
    if (is_bf16)
        gradients_of((const uint16_t *)weight, stride_w, cols, count, tiles, n_tiles, d_weight,
                     width, stride, threads);
    else
        gradients_of((const float *)weight, stride_w, cols, count, tiles, n_tiles, d_weight, width,
                     stride, threads);
}

extern "C" int lanes() { return LANES; }
extern "C" int feature_block() { return WIDEST * LANES; }
