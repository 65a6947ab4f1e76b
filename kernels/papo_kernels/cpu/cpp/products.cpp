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

// Pairs of terms of the left factor, and how far it is to the next row and to the next pair.
struct Left {
    const uint32_t *at;
    int64_t row, pair;
    Left from(int64_t r, int64_t k) const { return {at + r * row + k * pair, row, pair}; }
};

#ifdef __AVX512BF16__
// Every lane is a column of the product: WORDS of them are packed so that one load holds a pair
// of terms of 16 columns, which ROWS rows of x share.
enum { ROWS = 12, WORDS = 32, PAIRS = FEATURES / 2, ROWS_AT_ONCE = 40 * ROWS, PANEL = 16 * WORDS };

// 16 pairs of terms of 16 columns, of which each stands one after the other at w, the other way round.
static inline void transpose(const uint16_t *w, int64_t stride, uint32_t *packed)
{
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(w + i * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    // a[4 i + j] holds columns 4 i to 4 i + 3 of the pairs j, j + 4, j + 8 and j + 12
    for (int j = 0; j < 4; j++) {
        __m512i even = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88);
        __m512i odd = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd);
        __m512i even_after = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88);
        __m512i odd_after = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xdd);
        uint32_t *to = packed + j * WORDS;
        _mm512_store_si512(to, _mm512_shuffle_i32x4(even, even_after, 0x88));
        _mm512_store_si512(to + 4 * WORDS, _mm512_shuffle_i32x4(odd, odd_after, 0x88));
        _mm512_store_si512(to + 8 * WORDS, _mm512_shuffle_i32x4(even, even_after, 0xdd));
        _mm512_store_si512(to + 12 * WORDS, _mm512_shuffle_i32x4(odd, odd_after, 0xdd));
    }
}

// Each column's terms stand one after the other: w is (columns, d).
static void pack_columns(const uint16_t *w, int64_t stride, int columns, int64_t d, uint32_t *packed)
{
    int64_t whole = d / 2, done = columns == WORDS ? whole / 16 * 16 : 0;
    for (int64_t k = 0; k < done; k += 16)
        for (int v = 0; v < WORDS; v += 16)
            transpose(w + v * stride + 2 * k, stride, packed + k * WORDS + v);
    for (int v = 0; v < columns; v++)
        for (int64_t k = done; k < whole; k++)
            memcpy(packed + k * WORDS + v, w + v * stride + 2 * k, 4);
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

// A bias of LOG_ZERO or below bans a word: see reference.bans.
static inline __m512 bias_of(const float *bias, __mmask16 some)
{
    __m512 b = _mm512_maskz_loadu_ps(some, bias);
    __mmask16 banned = _mm512_cmp_ps_mask(b, _mm512_set1_ps(LOG_ZERO), _CMP_LE_OQ);
    return _mm512_mask_mov_ps(b, banned, _mm512_set1_ps(-INFINITY));
}

template <int rows>
static void product_block(Left x, const uint32_t *packed, int64_t pairs, float *z, int64_t stride_z,
                          __mmask16 low, __mmask16 high, bool add, const float *bias)
{
    __m512 a[rows], b[rows];
    for (int r = 0; r < rows; r++) a[r] = b[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh w0 = (__m512bh)_mm512_load_si512(packed + k * WORDS);
        __m512bh w1 = (__m512bh)_mm512_load_si512(packed + k * WORDS + 16);
        for (int r = 0; r < rows; r++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x.at[r * x.row + k * x.pair]);
            a[r] = _mm512_dpbf16_ps(a[r], pair, w0);
            b[r] = _mm512_dpbf16_ps(b[r], pair, w1);
        }
    }
    __m512 more = {}, more_high = {};
    if (bias) more = bias_of(bias, low), more_high = bias_of(bias + 16, high);
    for (int r = 0; r < rows; r++, z += stride_z) {
        if (add) {
            a[r] = _mm512_add_ps(a[r], _mm512_maskz_loadu_ps(low, z));
            b[r] = _mm512_add_ps(b[r], _mm512_maskz_loadu_ps(high, z + 16));
        }
        if (bias) a[r] = _mm512_add_ps(a[r], more), b[r] = _mm512_add_ps(b[r], more_high);
        _mm512_mask_storeu_ps(z, low, a[r]);
        _mm512_mask_storeu_ps(z + 16, high, b[r]);
    }
}

static void product_of(Left x, int64_t n, const uint16_t *w, int64_t stride_w, bool by_terms,
                       int64_t columns, int64_t d, float *z, int64_t stride_z, bool add,
                       const float *bias)
{
    alignas(64) uint32_t packed[PAIRS * WORDS];
    auto strip = [&](int64_t first, int64_t last, int64_t v, int64_t k) {
        int some = columns - v < WORDS ? columns - v : WORDS;
        int64_t terms = d - k < FEATURES ? d - k : FEATURES, pairs = (terms + 1) / 2, r = first;
        if (by_terms)
            pack_terms(w + k * stride_w + v, stride_w, some, terms, packed);
        else
            pack_columns(w + v * stride_w + k, stride_w, some, terms, packed);
        uint32_t mask = some == WORDS ? ~0u : (1u << some) - 1;
        __mmask16 low = mask & 0xffff, high = mask >> 16;
#define SWEEP(rows)                                                                           \
    for (; r + rows <= last; r += rows)                                                       \
        product_block<rows>(x.from(r, k / 2), packed, pairs, z + r * stride_z + v, stride_z, low, \
                            high, add || k > 0, bias && k + terms == d ? bias + v : nullptr);
        SWEEP(ROWS) SWEEP(8) SWEEP(4) SWEEP(1)
    };
    // The terms of so many rows stay in the second-level cache while the columns of a panel pass,
    // and so does much of the panel's product while the terms do. To pack anew costs little.
    for (int64_t r = 0; r < n; r += ROWS_AT_ONCE)
        for (int64_t c = 0; c < columns; c += PANEL)
            for (int64_t k = 0; k < d; k += FEATURES)
                for (int64_t v = c; v < columns && v < c + PANEL; v += WORDS)
                    strip(r, n - r < ROWS_AT_ONCE ? n : r + ROWS_AT_ONCE, v, k);
}
#endif

// z[n, v] = sum over k < d of x[n, k] w[v, k], or of x[n, k] w[k, v] where `by_terms`, or that added
// to what z holds. x holds pairs of terms, `stride_row` apart for rows and `stride_pair` for pairs,
// the last pair completed with zero. bias: for each column, added at the end; or null. Returns 1
// where the processor does not multiply bfloat16.
extern "C" int product(const uint32_t *x, int64_t n, int64_t stride_row, int64_t stride_pair,
                       const uint16_t *w, int64_t stride_w, int by_terms, int64_t columns, int64_t d,
                       float *z, int64_t stride_z, int add, const float *bias, int threads)
{
#ifdef __AVX512BF16__
    split(columns, 64, threads, MANY, [=](int64_t first, int64_t last) {
        product_of({x, stride_row, stride_pair}, n, w + (by_terms ? first : first * stride_w),
                   stride_w, by_terms, last - first, d, z + first, stride_z, add,
                   bias ? bias + first : nullptr);
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
    split(threads, 1, threads, FEW, [&](int64_t part, int64_t end) {
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
