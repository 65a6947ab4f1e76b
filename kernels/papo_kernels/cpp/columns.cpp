// Gradients of the logits of a tile's picked columns, what the certificate needs to know of them, and
// which of them matter least. Matrices are (columns, rows of both streams).

#include "vectors.h"

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
