// What torch has no operator for on the CPU, or only slow ones: products of bfloat16 in float32, row
// statistics of two streams, column levels, and products with rows of `weight` picked by index.
//
// Vectors are GCC's, so one source serves every processor; LANES is what its registers hold. NaN
// must stay NaN: no -ffast-math. Every function splits its work over `threads` in a way that does
// not change the result.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <type_traits>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
enum { LANES = 16, ACCUMULATORS = 24, WIDEST = 4 };
#elif defined(__AVX__)
enum { LANES = 8, ACCUMULATORS = 10, WIDEST = 2 };
#else
enum { LANES = 4, ACCUMULATORS = 12, WIDEST = 2 };
#endif
// Sums longer than this go to memory and start again: long ones lose several times more.
enum { FEATURES = 256 };
// Columns whose rows of `weight` are unpacked at a time.
enum { COLUMNS = 256 };

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

static const float LOG_ZERO = -1e30f;

static inline vf load(const float *p)
{
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void store(float *p, vf x) { memcpy(p, &x, sizeof x); }

static inline vf splat(float x) { return x - (vf){}; }

// The first n values at p, then `rest`.
static inline vf load_some(const float *p, int64_t n, float rest)
{
    vf x = splat(rest);
    memcpy(&x, p, n * 4);
    return x;
}

static inline float sum(vf x)
{
    float s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}

static inline vf larger(vf a, vf b) { return a > b ? a : b; }

static inline vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// e^x for x <= 1, relative error below 2e-7; 0 below -87, where it would be denormal soon.
static inline vf exponential(vf x)
{
    vi tiny = x < -87.f;
    vf y = tiny ? splat(-87.f) : x;
    const float round = 12582912.f;  // 1.5 * 2^23: adding it leaves no fraction
    vf n = (y * 1.44269504f + round) - round;
    vf r = (y - n * 0.693145752f) - n * 1.42860677e-6f;
    vf e = r * 1.3888889e-3f + 8.3333333e-3f;
    e = e * r + 4.1666667e-2f;
    e = e * r + 1.6666667e-1f;
    e = e * r + 0.5f;
    e = e * (r * r) + r + 1.f;
    vf scale = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    e *= scale;
    return tiny ? (vf){} : e;
}

static void split(int64_t count, int64_t grain, int threads,
                  const std::function<void(int64_t, int64_t)> &work)
{
    int64_t parts = (count + grain - 1) / grain;
    if (threads > parts) threads = parts;
    if (threads <= 1) {
        if (count) work(0, count);
        return;
    }
    int64_t each = (parts + threads - 1) / threads * grain;
    std::vector<std::thread> others;
    for (int64_t first = each; first < count; first += each)
        others.emplace_back(work, first, first + each < count ? first + each : count);
    work(0, each < count ? each : count);
    for (auto &t : others) t.join();
}

// ---- Row statistics

struct Stream {
    float peak, log_sum;
};

static Stream normaliser(const float *z, int64_t vocab)
{
    int64_t whole = vocab / LANES * LANES, rest = vocab - whole;
    vf top = splat(-INFINITY);
    for (int64_t v = 0; v < whole; v += LANES) top = larger(load(z + v), top);
    if (rest) top = larger(load_some(z + whole, rest, -INFINITY), top);
    float peak = LOG_ZERO;  // finite where everything is banned
    for (int i = 0; i < LANES; i++) peak = top[i] > peak ? top[i] : peak;
    vf total = {};
    for (int64_t v = 0; v < whole; v += FEATURES * LANES) {  // in two levels, for accuracy
        int64_t end = v + FEATURES * LANES < whole ? v + FEATURES * LANES : whole;
        vf part = {};
        for (int64_t w = v; w < end; w += LANES) part += exponential(load(z + w) - peak);
        total += part;
    }
    if (rest) total += exponential(load_some(z + whole, rest, -INFINITY) - peak);
    return {peak, logf(sum(total))};
}

static inline vf log_prob(vf z, Stream s)
{
    vf x = (z - s.peak) - s.log_sum;
    return x < LOG_ZERO ? splat(LOG_ZERO) : x;
}

// q - p as in row_math.q_minus_p: by a series where q is close to p.
static inline vf q_minus_p(vf p, vf q, vf x)
{
    vf series = x * (1 + x * (1 / 2.f) * (1 + x * (1 / 3.f) * (1 + x * (1 / 4.f) *
                    (1 + x * (1 / 5.f) * (1 + x * (1 / 6.f))))));
    return magnitude(x) < 0.25f ? p * series : q - p;
}

struct Sums {
    vf entropy, aug_entropy, kl, gap, ratio;
    void add(const Sums &s)
    {
        entropy += s.entropy, aug_entropy += s.aug_entropy, kl += s.kl, gap += s.gap;
        ratio += s.ratio;
    }
};

static inline void accumulate(Sums &s, vf z, Stream a)
{
    vf log_p = log_prob(z, a);
    s.entropy -= exponential(log_p) * log_p;
}

static inline void accumulate(Sums &s, vf z, vf z_aug, Stream a, Stream b)
{
    vf log_p = log_prob(z, a), log_q = log_prob(z_aug, b);
    vf p = exponential(log_p), q = exponential(log_q), x = log_q - log_p;
    vf gap = q_minus_p(p, q, x), drift = p * x;
    s.entropy -= p * log_p;
    s.aug_entropy -= q * log_q;
    s.kl += gap - drift;
    s.gap += magnitude(gap);
    s.ratio += magnitude(drift);
}

// (rows, vocab) logits to the fields of row_math.RowStats, out[field * stride + row]: 9 of them, or
// 3 where z_aug is null.
extern "C" void statistics(const float *z, const float *z_aug, int64_t rows, int64_t vocab,
                           float *out, int64_t stride, int threads)
{
    split(rows, 1, threads, [=](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
            const float *x = z + r * vocab, *y = z_aug ? z_aug + r * vocab : nullptr;
            Stream a = normaliser(x, vocab), b = y ? normaliser(y, vocab) : Stream{0, 0};
            int64_t whole = vocab / LANES * LANES, rest = vocab - whole;
            Sums total = {};
            for (int64_t v = 0; v < whole; v += FEATURES * LANES) {
                int64_t end = v + FEATURES * LANES < whole ? v + FEATURES * LANES : whole;
                Sums part = {};
                if (y)
                    for (int64_t w = v; w < end; w += LANES)
                        accumulate(part, load(x + w), load(y + w), a, b);
                else
                    for (int64_t w = v; w < end; w += LANES) accumulate(part, load(x + w), a);
                total.add(part);
            }
            if (rest && y)
                accumulate(total, load_some(x + whole, rest, -INFINITY),
                           load_some(y + whole, rest, -INFINITY), a, b);
            else if (rest)
                accumulate(total, load_some(x + whole, rest, -INFINITY), a);
            float *o = out + r;
            o[0] = a.peak, o[stride] = a.log_sum, o[2 * stride] = sum(total.entropy);
            if (!y) continue;
            o[3 * stride] = b.peak, o[4 * stride] = b.log_sum;
            o[5 * stride] = sum(total.aug_entropy), o[6 * stride] = sum(total.kl);
            o[7 * stride] = sum(total.gap), o[8 * stride] = sum(total.ratio);
        }
    });
}

// ---- Levels: see columns.py. stats: peak and log_sum of each stream, stats[i * stride + row].

extern "C" void levels(const float *z, const float *z_aug, const int64_t *order, int64_t rows,
                       int64_t vocab, int64_t tile, const float *stats, int64_t stride,
                       uint8_t *out, float per_nat, int threads)
{
    enum { BLOCK = 128 * LANES };
    split(vocab, BLOCK, threads, [=](int64_t begin, int64_t stop) {
        vf top[BLOCK / LANES];
        for (int64_t t = 0; t * tile < rows; t++)
            for (int64_t v = begin; v < stop; v += BLOCK) {
                int64_t size = stop - v < BLOCK ? stop - v : BLOCK, whole = size / LANES;
                int64_t last = (t + 1) * tile < rows ? (t + 1) * tile : rows;
                bool nan = false;
                for (auto &x : top) x = splat(-INFINITY);
                for (int64_t n = t * tile; n < last; n++)
                    for (int s = 0; s < (z_aug ? 2 : 1); s++) {
                        const float *x = (s ? z_aug : z) + order[n] * vocab + v;
                        const float *a = stats + 2 * s * stride + order[n];
                        float peak = a[0], log_sum = a[stride];
                        nan |= log_sum != log_sum;
                        for (int64_t i = 0; i < whole; i++)
                            top[i] = larger((load(x + i * LANES) - peak) - log_sum, top[i]);
                        if (size % LANES) {
                            vf y = load_some(x + whole * LANES, size % LANES, -INFINITY);
                            top[whole] = larger((y - peak) - log_sum, top[whole]);
                        }
                    }
                uint8_t *o = out + t * vocab + v;
                for (int64_t i = 0; i < size; i++) {
                    float level = top[i / LANES][i % LANES] * -per_nat;
                    level = level < 0 ? 0 : level > 255 ? 255 : level;
                    o[i] = nan ? 0 : (uint8_t)level;
                }
            }
    });
}

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

// d_x[r][:] += sum over columns g[c][r] w[c][:], one block of 4 vectors of features.
template <int R, int M>
static void state_block(const float *g, int64_t rows, const float *w, int64_t count, float *d_x,
                        int64_t stride)
{
    vf acc[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) acc[r][m] = load(d_x + r * stride + m * LANES);
    for (int64_t c = 0; c < count; c++) {
        vf v[M];
        for (int m = 0; m < M; m++) v[m] = load(w + c * M * LANES + m * LANES);
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) acc[r][m] += g[c * rows + r] * v[m];
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) store(d_x + r * stride + m * LANES, acc[r][m]);
}

// d_w[c][:] += sum over rows g[c][r] x[r][:]
template <int C, int M>
static void weight_block(const float *g, int64_t rows, const float *x, int64_t stride,
                         float *const *d_w, int64_t features)
{
    vf acc[C][M] = {};
    for (int64_t r = 0; r < rows; r++) {
        vf v[M];
        for (int m = 0; m < M; m++) v[m] = load(x + r * stride + m * LANES);
        for (int c = 0; c < C; c++)
            for (int m = 0; m < M; m++) acc[c][m] += g[c * rows + r] * v[m];
    }
    for (int c = 0; c < C; c++)
        if (features == M * LANES)
            for (int m = 0; m < M; m++)
                store(d_w[c] + m * LANES, load(d_w[c] + m * LANES) + acc[c][m]);
        else
            for (int64_t d = 0; d < features; d++) d_w[c][d] += acc[c][d / LANES][d % LANES];
}

// Adds to d_x (rows, stride) and to rows `cols` of d_weight (of `width` features), where not null,
// the gradients of states x (rows, stride) from g (columns, rows). stride is a multiple of
// WIDEST * LANES, beyond `width` filled with 0.
template <typename T>
static void gradients_of(const T *weight, int64_t stride_w, const int64_t *cols, int64_t count,
                         const float *g, int64_t rows, const float *x, float *d_x, float *d_weight,
                         int64_t width, int64_t stride, int threads)
{
    enum { M = WIDEST, WIDTH = M * LANES, B = ACCUMULATORS / M };
    split(stride, WIDTH, threads, [=](int64_t first, int64_t last) {
        float *w = (float *)aligned_alloc(64, COLUMNS * WIDTH * 4);
        for (int64_t c = 0; c < count; c += COLUMNS) {
            int64_t size = count - c < COLUMNS ? count - c : COLUMNS;
            const float *gc = g + c * rows;
            for (int64_t d = first; d < last; d += WIDTH) {
                int64_t features = width - d < WIDTH ? width - d : WIDTH;
                if (features <= 0) break;
                if (d_x) {
                    for (int64_t i = 0; i < size; i++) {
                        const T *from = weight + cols[c + i] * stride_w + d;
                        float *to = w + i * WIDTH;
                        int64_t k = 0;
                        if (features == WIDTH)
                            for (; k < WIDTH; k++) to[k] = widen(from[k]);
                        else {
                            for (; k < features; k++) to[k] = widen(from[k]);
                            for (; k < WIDTH; k++) to[k] = 0;
                        }
                    }
                    int64_t r = 0;
                    for (; r + B <= rows; r += B)
                        state_block<B, M>(gc + r, rows, w, size, d_x + r * stride + d, stride);
                    for (; r < rows; r++)
                        state_block<1, M>(gc + r, rows, w, size, d_x + r * stride + d, stride);
                }
                if (!d_weight) continue;
                float *to[B];
                int64_t i = 0;
                for (; i + B <= size; i += B) {
                    for (int b = 0; b < B; b++) to[b] = d_weight + cols[c + i + b] * width + d;
                    weight_block<B, M>(gc + i * rows, rows, x + d, stride, to, features);
                }
                for (; i < size; i++) {
                    to[0] = d_weight + cols[c + i] * width + d;
                    weight_block<1, M>(gc + i * rows, rows, x + d, stride, to, features);
                }
            }
        }
        free(w);
    });
}

extern "C" void picked_gradients(const void *weight, int is_bf16, int64_t stride_w,
                                 const int64_t *cols, int64_t count, const float *g, int64_t rows,
                                 const float *x, float *d_x, float *d_weight, int64_t width,
                                 int64_t stride, int threads)
{
    if (is_bf16)
        gradients_of((const uint16_t *)weight, stride_w, cols, count, g, rows, x, d_x, d_weight,
                     width, stride, threads);
    else
        gradients_of((const float *)weight, stride_w, cols, count, g, rows, x, d_x, d_weight, width,
                     stride, threads);
}

// ---- Gradients of the logits of picked columns, and what the certificate needs to know of them

struct Rows {  // statistics and upstream gradients of LANES rows of one stream
    vf peak, log_sum, entropy, up_logprob, up_entropy, up_label;
    static Rows at(const float *p, int64_t stride)
    {
        return {load(p), load(p + stride), load(p + 2 * stride), load(p + 3 * stride),
                load(p + 4 * stride), load(p + 5 * stride)};
    }
};

struct Own {  // one word's p, log p and p (log p + H), and its gradient but for the KL's
    vf log_p, p, entropy, dz;
    Own(vf z, const Rows &s, vi is_label)
    {
        vf x = (z - s.peak) - s.log_sum;
        log_p = x < LOG_ZERO ? splat(LOG_ZERO) : x;
        p = exponential(log_p);
        entropy = p * (log_p + s.entropy);
        dz = (is_label ? s.up_label : (vf){}) - s.up_logprob * p - s.up_entropy * entropy;
    }
};

// z (columns, streams * padded) to g. rows: (6, padded) fields of `Rows`, those of the second stream
// behind them, and then, of two streams, the KL and its upstream gradient. labels: (padded,) where
// among the columns a row's label is. Sums over columns, (3 or 10, padded):
//   p, p (log p + H), |dz|; the same of q; |q - p|, p |log q - log p|, the KL's terms, |dz + dz_aug|.
extern "C" void column_gradients(const float *z, float *g, int64_t count, int64_t streams,
                                 int64_t padded, const float *rows, const int32_t *labels,
                                 float *sums)
{
    int64_t stride = streams * padded;
    for (int64_t r = 0; r < padded; r += LANES) {
        Rows a = Rows::at(rows + r, padded), b = a;
        vf kl = {}, up_kl = {};
        if (streams == 2) {
            b = Rows::at(rows + 6 * padded + r, padded);
            kl = load(rows + 12 * padded + r), up_kl = load(rows + 13 * padded + r);
        }
        vi label;
        memcpy(&label, labels + r, sizeof label);
        vf total[10] = {};
        for (int64_t first = 0; first < count; first += FEATURES) {
            int64_t last = first + FEATURES < count ? first + FEATURES : count;
            vf part[10] = {};
            for (int64_t c = first; c < last; c++) {
                const float *zc = z + c * stride + r;
                float *gc = g + c * stride + r;
                vi is_label = label == (int32_t)c;
                Own p(load(zc), a, is_label);
                part[0] += p.p, part[1] += p.entropy;
                if (streams == 1) {
                    part[2] += magnitude(p.dz);
                    store(gc, p.dz);
                    continue;
                }
                Own q(load(zc + padded), b, is_label);
                vf x = q.log_p - p.log_p, gap = q_minus_p(p.p, q.p, x), drift = p.p * x;
                vf dz = p.dz - up_kl * (drift + p.p * kl), dz_aug = q.dz + up_kl * gap;
                part[2] += magnitude(dz);
                part[3] += q.p, part[4] += q.entropy, part[5] += magnitude(dz_aug);
                part[6] += magnitude(gap), part[7] += magnitude(drift), part[8] += gap - drift;
                part[9] += magnitude(dz + dz_aug);
                store(gc, dz);
                store(gc + padded, dz_aug);
            }
            for (int i = 0; i < 10; i++) total[i] += part[i];
        }
        for (int i = 0; i < (streams == 2 ? 10 : 3); i++) store(sums + i * padded + r, total[i]);
    }
}

struct Sizes {  // |dz| of LANES rows of one column: both streams' and of their sum
    vf x[3];
    int count;
    Sizes(const float *g, int64_t streams, int64_t padded, bool net) : count(streams + net)
    {
        vf a = load(g);
        x[0] = magnitude(a);
        if (streams == 1) return;
        vf b = load(g + padded);
        x[1] = magnitude(b), x[2] = magnitude(a + b);
    }
};

// need[c]: the largest over rows of |dz| in units of what the row may still drop, which `room`
// (2 or 3, padded) gives the inverse of.
extern "C" void column_needs(const float *g, int64_t count, int64_t streams, int64_t padded, int net,
                             const float *room, float *need)
{
    for (int64_t c = 0; c < count; c++) {
        vf worst = {};
        for (int64_t r = 0; r < padded; r += LANES) {
            Sizes s(g + c * streams * padded + r, streams, padded, net);
            for (int i = 0; i < s.count; i++)
                worst = larger(s.x[i] * load(room + i * padded + r), worst);
        }
        float most = 0;
        for (int i = 0; i < LANES; i++) most = worst[i] > most ? worst[i] : most;
        need[c] = most;
    }
}

// How many columns, in this order, every row can drop within its allowance; what that drops.
extern "C" int64_t droppable(const float *g, const int64_t *order, int64_t count, int64_t streams,
                             int64_t padded, int net, const float *allowed, float *dropped)
{
    int64_t fields = streams + net;
    std::vector<float> next(fields * padded);
    for (int64_t n = 0; n < count; n++) {
        vi over = {};
        for (int64_t r = 0; r < padded; r += LANES) {
            Sizes s(g + order[n] * streams * padded + r, streams, padded, net);
            for (int i = 0; i < s.count; i++) {
                int64_t at = i * padded + r;
                vf sum = load(dropped + at) + s.x[i];
                over |= sum > load(allowed + at);
                store(next.data() + at, sum);
            }
        }
        for (int i = 0; i < LANES; i++)
            if (over[i]) return n;
        memcpy(dropped, next.data(), next.size() * 4);
    }
    return count;
}

extern "C" int lanes() { return LANES; }
extern "C" int feature_block() { return WIDEST * LANES; }
