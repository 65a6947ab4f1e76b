// Statistics of rows of logits, and the levels of columns over tiles of rows.

#include "vectors.h"

#include <algorithm>

struct Stream {
    float peak, log_sum;
};

// Of `vocab` logits, one of which is -inf for a moment: beside the peak's 1, a sum would lose the other
// terms of a confident row.
static Stream normaliser(float *z, int64_t vocab)
{
    int64_t whole = vocab / LANES * LANES, rest = vocab - whole;
    vf top = splat(-INFINITY);
    for (int64_t v = 0; v < whole; v += LANES) top = larger(load(z + v), top);
    if (rest) top = larger(load_some(z + whole, rest, -INFINITY), top);
    float highest = -INFINITY;
    for (int i = 0; i < LANES; i++) highest = top[i] > highest ? top[i] : highest;
    float peak = highest > LOG_ZERO ? highest : LOG_ZERO;  // finite where everything is banned
    float *at = std::find(z, z + vocab, highest);
    if (at < z + vocab) *at = -INFINITY;
    vf total = {};
    for (int64_t v = 0; v < whole; v += FEATURES * LANES) {  // in two levels, for accuracy
        int64_t end = v + FEATURES * LANES < whole ? v + FEATURES * LANES : whole;
        vf part = {};
        for (int64_t w = v; w < end; w += LANES) part += exponential(load(z + w) - peak);
        total += part;
    }
    if (rest) total += exponential(load_some(z + whole, rest, -INFINITY) - peak);
    if (at < z + vocab) *at = highest;
    return {peak, log1pf(sum(total) + (expf(highest - peak) - 1))};
}

static inline vf log_prob(vf z, Stream s)
{
    vf x = (z - s.peak) - s.log_sum;
    return x < LOG_ZERO ? splat(LOG_ZERO) : x;
}

struct Sums {
    vf entropy, aug_entropy, kl, kl_reverse, prob_gap, log_ratio, aug_log_ratio;
    void add(const Sums &s)
    {
        entropy += s.entropy, aug_entropy += s.aug_entropy, kl += s.kl;
        kl_reverse += s.kl_reverse, prob_gap += s.prob_gap, log_ratio += s.log_ratio;
        aug_log_ratio += s.aug_log_ratio;
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
    vf gap = q_minus_p(p, q, x), drift = p * x, aug_drift = q * x;
    s.entropy -= p * log_p;
    s.aug_entropy -= q * log_q;
    s.kl += gap - drift;
    s.kl_reverse += aug_drift - gap;
    s.prob_gap += magnitude(gap);
    s.log_ratio += magnitude(drift);
    s.aug_log_ratio += magnitude(aug_drift);
}

// From (rows, vocab) logits, whose rows are stride_z apart and are left as they were, to the
// statistics that rows.statistics_names lists, in that order, at out[field * stride + row]: 11 of
// them, or 3 where z_aug is null.
extern "C" void statistics(float *z, float *z_aug, int64_t rows, int64_t vocab, int64_t stride_z,
                           float *out, int64_t stride, int threads)
{
    split(rows, 1, threads, MANY, [=](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
            float *x = z + r * stride_z, *y = z_aug ? z_aug + r * stride_z : nullptr;
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
            o[7 * stride] = sum(total.kl_reverse), o[8 * stride] = sum(total.prob_gap);
            o[9 * stride] = sum(total.log_ratio), o[10 * stride] = sum(total.aug_log_ratio);
        }
    });
}

// ---- Levels, which certificate.py explains. stats: peak and log_sum of each stream, at
// stats[i * stride + row].

extern "C" void levels(const float *z, const float *z_aug, const int64_t *order, int64_t rows,
                       int64_t vocab, int64_t stride_z, int64_t tile, const float *stats, int64_t stride,
                       uint8_t *out, float per_nat, int threads)
{
    enum { BLOCK = 128 * LANES };
    split(vocab, BLOCK, threads, MANY, [=](int64_t begin, int64_t stop) {
        vf top[BLOCK / LANES];
        for (int64_t t = 0; t * tile < rows; t++)
            for (int64_t v = begin; v < stop; v += BLOCK) {
                int64_t size = stop - v < BLOCK ? stop - v : BLOCK, whole = size / LANES;
                int64_t last = (t + 1) * tile < rows ? (t + 1) * tile : rows;
                bool nan = false;
                for (auto &x : top) x = splat(-INFINITY);
                for (int64_t n = t * tile; n < last; n++)
                    for (int s = 0; s < (z_aug ? 2 : 1); s++) {
                        const float *x = (s ? z_aug : z) + order[n] * stride_z + v;
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
