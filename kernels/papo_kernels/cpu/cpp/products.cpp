// Products that torch has no operator for on the CPU: of bfloat16 in float32, and with rows of
// `weight` picked by index, read in place.

#include "vectors.h"

#include <algorithm>
#include <cstdlib>
#include <type_traits>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// ---- Whole products of bfloat16

#ifdef __AVX512BF16__
// Every lane is a column of the product: WORDS of them are packed so that one load holds a pair
// of terms of 16 columns, which ROWS rows of x share.
enum { ROWS = 12, WORDS = 32, PAIRS = FEATURES / 2 };

// Each column's terms stand one after the other: w is (columns, d).
static void pack_columns(const uint16_t *w, int64_t stride, int columns, int64_t d, uint32_t *packed)
{
    int64_t whole = d / 2;
    for (int64_t first = 0; first < whole; first += 16)  // one cache line of each column in turn
        for (int v = 0; v < columns; v++) {
            int64_t last = first + 16 < whole ? first + 16 : whole;
            const uint16_t *from = w + v * stride;
            for (int64_t k = first; k < last; k++)
                memcpy(packed + k * WORDS + v, from + 2 * k, 4);
        }
    if (d % 2)
        for (int v = 0; v < columns; v++) packed[whole * WORDS + v] = w[v * stride + d - 1];
    for (int v = columns; v < WORDS; v++)
        for (int64_t k = 0; k < (d + 1) / 2; k++) packed[k * WORDS + v] = 0;
}

// Each term's columns stand one after the other: w is (d, columns).
static void pack_terms(const uint16_t *w, int64_t stride, int columns, int64_t d, uint32_t *packed)
{
    for (int64_t k = 0; k < d; k += 2, w += 2 * stride, packed += WORDS) {
        if (k + 1 < d)
            for (int v = 0; v < columns; v++) packed[v] = w[v] | (uint32_t)w[stride + v] << 16;
        else
            for (int v = 0; v < columns; v++) packed[v] = w[v];
        for (int v = columns; v < WORDS; v++) packed[v] = 0;
    }
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
                       int64_t stride_w, bool by_terms, int64_t columns, int64_t d, float *z,
                       int64_t stride_z, bool add)
{
    int64_t all = (d + 1) / 2;
    uint32_t *packed = (uint32_t *)aligned_alloc(64, all * WORDS * 4);
    for (int64_t v = 0; v < columns; v += WORDS, z += WORDS) {
        int some = columns - v < WORDS ? columns - v : WORDS;
        if (by_terms)
            pack_terms(w + v, stride_w, some, d, packed);
        else
            pack_columns(w + v * stride_w, stride_w, some, d, packed);
        uint32_t mask = some == WORDS ? ~0u : (1u << some) - 1;
        __mmask16 low = mask & 0xffff, high = mask >> 16;
        for (int64_t k = 0; k < all; k += PAIRS) {
            int64_t pairs = all - k < PAIRS ? all - k : PAIRS, r = 0;
            const uint32_t *xk = x + k, *pk = packed + k * WORDS;
            bool more = add || k > 0;
#define SWEEP(rows)                                                                          \
    for (; r + rows <= n; r += rows)                                                         \
        product_block<rows>(xk + r * stride_x, stride_x, pk, pairs, z + r * stride_z, stride_z, low, \
                    high, more);
            SWEEP(ROWS) SWEEP(8) SWEEP(4) SWEEP(1)
        }
    }
    free(packed);
}
#endif

// z[n, v] = sum over k < d of x[n, k] w[v, k], or of x[n, k] w[k, v] where `by_terms`, or that added
// to what z holds. Rows of x are `stride_x` pairs of terms, the last pair completed with zero.
// Returns 1 where the processor does not multiply bfloat16.
extern "C" int product(const uint32_t *x, int64_t n, int64_t stride_x, const uint16_t *w,
                       int64_t stride_w, int by_terms, int64_t columns, int64_t d, float *z,
                       int64_t stride_z, int add, int threads)
{
#ifdef __AVX512BF16__
    split(columns, 64, threads, [=](int64_t first, int64_t last) {
        product_of(x, n, stride_x, w + (by_terms ? first : first * stride_w), stride_w, by_terms,
                   last - first, d, z + first, stride_z, add);
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

// The tiles go through the vocabulary together, so many words at a time: the rows of `weight` that
// some tile picks among these words stay in the second-level cache until the last tile has used them.
enum { WORDS_AT_ONCE = 256 };

// acc[w][m] += sum over k of weight[w][k] * x[k][m]. Every lane is a row of x, and x stands
// transposed, so that rows of weight are read in place.
// `next` points to the W rows that will be read after these: the processor cannot foresee which rows
// were picked, so they are fetched ahead.
template <int M, int W>
static void logit_block(const float *const *weight, const float *const *next, const float *x,
                        int64_t stride_x, int64_t size, float *const *z, bool add)
{
    vf acc[W][M];
    for (int w = 0; w < W; w++)
        for (int m = 0; m < M; m++) acc[w][m] = add ? load(z[w] + m * LANES) : (vf){};
    for (int64_t k = 0; k < size; k++) {
        if (k % 16 == 0)
            for (int w = 0; w < W; w++) __builtin_prefetch(next[w] + k);
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
static void logit_block(const uint32_t *const *weight, const uint32_t *const *next,
                        const uint32_t *x, int64_t stride_x, int64_t size, float *const *z, bool add)
{
    vf acc[W][M];
    for (int w = 0; w < W; w++)
        for (int m = 0; m < M; m++) acc[w][m] = add ? load(z[w] + m * LANES) : (vf){};
    for (int64_t k = 0; k < size; k++) {
        if (k % 16 == 0)
            for (int w = 0; w < W; w++) __builtin_prefetch(next[w] + k);
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

// Products of the columns [first, last) of `cols` with M vectors of rows of x, W columns at a time.
// T is float, or uint32_t for a pair of bfloat16; z is (columns, stride_z). It returns the first
// column that is left over.
template <int M, int W, typename T>
static int64_t logit_columns(const T *weight, int64_t stride_w, const int64_t *cols, int64_t first,
                             int64_t last, const T *x, int64_t stride_x, int64_t width, float *z,
                             int64_t stride_z)
{
    int64_t step = std::is_same<T, float>::value ? FEATURES : FEATURES / 2, c = first;
    for (; c + W <= last; c += W)
        for (int64_t k = 0; k < width; k += step) {
            int64_t size = width - k < step ? width - k : step;
            const T *rows[W], *next[W];
            float *to[W];
            for (int w = 0; w < W; w++) {
                int64_t then = c + w + W < last ? c + w + W : last - 1;
                rows[w] = weight + cols[c + w] * stride_w + k;
                next[w] = weight + cols[then] * stride_w + k;
                to[w] = z + (c + w) * stride_z;
            }
            logit_block<M, W>(rows, next, x + k * stride_x, stride_x, size, to, k > 0);
        }
    return c;
}

template <int M, typename T>
static void logit_rows(const T *weight, int64_t stride_w, const int64_t *cols, int64_t first,
                       int64_t last, const T *x, int64_t stride_x, int64_t width, float *z,
                       int64_t stride_z)
{
    enum { W = ACCUMULATORS / M > 12 ? 12 : ACCUMULATORS / M };
#define COLUMNS_BY(n)                                                                           \
    first = logit_columns<M, n>(weight, stride_w, cols, first, last, x, stride_x, width, z, stride_z);
    COLUMNS_BY(W) COLUMNS_BY((W > 4 ? 4 : 1)) COLUMNS_BY(1)
}

// The products of one tile: z[c][r] = sum over k of weight[cols[c]][k] * x[k][r], for `count`
// ascending cols. `rows` is a multiple of LANES.
struct TileLogits {
    const int64_t *cols;
    int64_t count, rows;
    const void *x;
    float *z;
};

template <typename T>
static void tile_logits(const T *weight, int64_t stride_w, const TileLogits &tile, int64_t first,
                        int64_t last, int64_t width)
{
    int64_t rows = tile.rows;
    for (int64_t r = 0; r < rows;) {
        int64_t left = (rows - r) / LANES;
        const T *x = (const T *)tile.x + r;
        float *z = tile.z + r;
        if (WIDEST >= 4 && left >= 4) {
            logit_rows<WIDEST>(weight, stride_w, tile.cols, first, last, x, rows, width, z, rows);
            r += WIDEST * LANES;
        } else if (left >= 2) {
            logit_rows<2>(weight, stride_w, tile.cols, first, last, x, rows, width, z, rows);
            r += 2 * LANES;
        } else {
            logit_rows<1>(weight, stride_w, tile.cols, first, last, x, rows, width, z, rows);
            r += LANES;
        }
    }
}

// All tiles' products word by word, so that a row of the weight that many tiles pick is read once.
template <typename T>
static void logits_of(const T *weight, int64_t stride_w, int64_t vocab, const TileLogits *tiles,
                      int64_t n_tiles, int64_t width, int threads)
{
    auto place = [=](int64_t t, int64_t word) {
        const int64_t *cols = tiles[t].cols;
        return std::lower_bound(cols, cols + tiles[t].count, word) - cols;
    };
    auto below = [=](int64_t word) {
        int64_t n = 0;
        for (int64_t t = 0; t < n_tiles; t++) n += place(t, word);
        return n;
    };
    // Every thread gets an equal share of the picked columns. Equal parts of the vocabulary would not
    // do: frequent words have small numbers.
    std::vector<int64_t> bounds(threads + 1, 0);
    for (int i = 1; i <= threads; i++) {
        int64_t low = 0, high = vocab, wanted = below(vocab) * i / threads;
        while (low < high) {
            int64_t middle = (low + high) / 2;
            if (below(middle) < wanted)
                low = middle + 1;
            else
                high = middle;
        }
        bounds[i] = i == threads ? vocab : low;
    }
    split(threads, 1, threads, [&](int64_t part, int64_t end) {
        for (; part < end; part++) {
            std::vector<int64_t> at(n_tiles);
            for (int64_t t = 0; t < n_tiles; t++) at[t] = place(t, bounds[part]);
            for (int64_t word = bounds[part]; word < bounds[part + 1]; word += WORDS_AT_ONCE) {
                int64_t last = std::min<int64_t>(word + WORDS_AT_ONCE, bounds[part + 1]);
                for (int64_t t = 0; t < n_tiles; t++) {
                    int64_t first = at[t];
                    while (at[t] < tiles[t].count && tiles[t].cols[at[t]] < last) at[t]++;
                    tile_logits(weight, stride_w, tiles[t], first, at[t], width);
                }
            }
        }
    });
}

extern "C" int picked_logits(const void *weight, int is_bf16, int64_t stride_w, int64_t vocab,
                             const TileLogits *tiles, int64_t n_tiles, int64_t width, int threads)
{
    if (!is_bf16) {
        logits_of((const float *)weight, stride_w, vocab, tiles, n_tiles, width, threads);
        return 0;
    }
#ifdef __AVX512BF16__
    logits_of((const uint32_t *)weight, stride_w / 2, vocab, tiles, n_tiles, width / 2, threads);
    return 0;
#else
    return 1;
#endif
}

extern "C" int lanes() { return LANES; }
