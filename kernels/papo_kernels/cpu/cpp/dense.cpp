// Gradients of the logits of rows that have all words, a block of words at a time.

#include "logit_gradients.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// One stream's block: (rows, count) logits z, and where their gradients go. They replace z, or are
// rounded to bfloat16 for the two products that they enter: `half` is (rows, count), and `pairs`
// holds rows 2 n and 2 n + 1 of each word in one number, (rows / 2 rounded up, stride_pairs).
// They are null for the former, and where the processor does not multiply bfloat16. `wanted` is 0
// where there are no gradients.
struct Block {
    float *z;
    uint16_t *half;
    uint32_t *pairs;
    int64_t wanted;
};

// d(logits) / d(products), as in equations.slope.
struct Slope {
    float temperature, softcap;
    vf operator()(vf z) const
    {
        if (softcap == 0) return splat(1 / temperature);
        vf t = z * (temperature / softcap);
        t = t > 1.f ? splat(1) : t < -1.f ? splat(-1) : t;
        return (1 - t * t) / temperature;
    }
};

static inline void put(const Block &to, int64_t at, int64_t some, vf dz)
{
#ifdef __AVX512BF16__
    if (to.half) {
        __m256bh nearest = _mm512_cvtneps_pbh((__m512)dz);
        memcpy(to.half + at, &nearest, some * 2);
        return;
    }
#endif
    memcpy(to.z + at, &dz, some * 4);
}

template <int STREAMS, bool REVERSE>
static void row(const Block *blocks, int64_t r, int64_t count, const float *fields, int64_t rows,
                int32_t target, Slope slope)
{
    auto field = [=](int i) { return splat(fields[i * rows + r]); };
    Rows a(field, 0), b(field, STREAMS == 2 ? STREAM_FIELDS : 0);
    Kls kls = {};
    if (STREAMS == 2) kls = Kls(field);
    vi lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    auto work = [&](int64_t v, int64_t some) {
        int64_t at = r * count + v;
        auto logits = [=](const Block &of) {
            return some == LANES ? load(of.z + at) : load_some(of.z + at, some, 0);
        };
        bool has_target = target >= v && target < v + LANES;
        vi is_target = lane + (int32_t)v == target;
        vf z = logits(blocks[0]);
        Own p(z, a, is_target, has_target);
        if (STREAMS == 1) {
            put(blocks[0], at, some, p.dz * slope(z));
            return;
        }
        vf z_aug = logits(blocks[1]);
        Both<REVERSE> both(p, Own(z_aug, b, is_target, has_target), kls);
        if (blocks[0].wanted) put(blocks[0], at, some, both.dz * slope(z));
        if (blocks[1].wanted) put(blocks[1], at, some, both.dz_aug * slope(z_aug));
    };
    int64_t whole = count / LANES * LANES;
    for (int64_t v = 0; v < whole; v += LANES) work(v, LANES);
    if (whole < count) work(whole, count - whole);
}

// Rows n and n + 1, which is missing where `n + 1 == rows`, as pairs.
static void pair(const Block &of, int64_t n, int64_t rows, int64_t count, int64_t stride_pairs)
{
    const uint16_t *low = of.half + n * count, *high = low + count;
    uint32_t *to = of.pairs + n / 2 * stride_pairs;
    if (n + 1 < rows)
        for (int64_t v = 0; v < count; v++) to[v] = low[v] | (uint32_t)high[v] << 16;
    else
        for (int64_t v = 0; v < count; v++) to[v] = low[v];
}

// fields: (5 or 14, rows), those of `Rows` for each stream and behind two of them those of `Kls`.
// targets: (rows,) where among the words a row's target stands, or -1. softcap: 0 for none.
extern "C" void dense_gradients(const Block *blocks, int64_t streams, int reverse, int64_t rows,
                                int64_t count, int64_t stride_pairs, const float *fields,
                                const int32_t *targets, float temperature, float softcap, int threads)
{
    auto work = streams == 1 ? row<1, false> : reverse ? row<2, true> : row<2, false>;
    split(rows, 2, threads, MANY, [=](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; n += 2) {
            for (int64_t r = n; r < n + 2 && r < last; r++)
                work(blocks, r, count, fields, rows, targets[r], Slope{temperature, softcap});
            for (int64_t s = 0; s < streams; s++)
                if (blocks[s].wanted && blocks[s].half)
                    pair(blocks[s], n, rows, count, stride_pairs);
        }
    });
}

// Rounds `count` numbers to bfloat16. torch's own copy would wake threads that wait in a loop when it
// is done, beside those of the product that comes next.
extern "C" void round_to_bf16(const float *from, uint16_t *to, int64_t count, int threads)
{
    split(count, 1 << 12, threads, MANY, [=](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) to[i] = rounded(from[i]);
    });
}
