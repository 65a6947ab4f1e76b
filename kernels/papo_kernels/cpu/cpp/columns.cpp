// Gradients of the logits of a tile's picked columns, the sums over them that the certificate needs,
// and which of them matter least. Matrices are (columns, rows of both streams).

#include "logit_gradients.h"

// Which of `count` columns are the target of a row.
static std::vector<char> target_columns(const int32_t *targets, int64_t padded, int64_t count)
{
    std::vector<char> some(count);
    for (int64_t r = 0; r < padded; r++)
        if (targets[r] >= 0 && targets[r] < count) some[targets[r]] = 1;
    return some;
}

enum { ONE_STREAM_SUMS = 3, TWO_STREAM_SUMS = 12 };

// As `column_gradients`. AUG: the second stream gets gradients. REVERSE: KL(q || p) has an upstream
// gradient.
template <int STREAMS, bool AUG, bool REVERSE>
static void gradients_of(const float *z, float *g, int64_t count, int64_t padded, const float *rows,
                         const int32_t *targets, float *sums)
{
    int64_t stride = STREAMS * padded, stride_g = AUG ? stride : padded;
    std::vector<char> some_target = target_columns(targets, padded, count);
    for (int64_t r = 0; r < padded; r += LANES) {
        auto field = [=](int i) { return load(rows + i * padded + r); };
        Rows a(field, 0), b(field, STREAMS == 2 ? STREAM_FIELDS : 0);
        Kls kls = {};
        if (STREAMS == 2) kls = Kls(field);
        vi target;
        memcpy(&target, targets + r, sizeof target);
        vf total[TWO_STREAM_SUMS] = {};
        for (int64_t first = 0; first < count; first += FEATURES) {
            int64_t last = first + FEATURES < count ? first + FEATURES : count;
            vf part[TWO_STREAM_SUMS] = {};
            for (int64_t c = first; c < last; c++) {
                const float *zc = z + c * stride + r;
                float *gc = g + c * stride_g + r;
                vi is_target = target == (int32_t)c;
                Own p(load(zc), a, is_target, some_target[c]);
                part[0] += p.p, part[1] += p.entropy;
                if (STREAMS == 1) {
                    part[2] += magnitude(p.dz);
                    store(gc, p.dz);
                    continue;
                }
                Own q(load(zc + padded), b, is_target, some_target[c]);
                Both<REVERSE> both(p, q, kls);
                if (REVERSE) {
                    part[10] += magnitude(both.aug_drift);
                    part[11] += both.aug_drift - both.gap;
                }
                part[2] += magnitude(both.dz);
                part[6] += magnitude(both.gap), part[7] += magnitude(both.drift);
                part[8] += both.gap - both.drift;
                store(gc, both.dz);
                if (!AUG) continue;
                part[3] += q.p, part[4] += q.entropy, part[5] += magnitude(both.dz_aug);
                part[9] += magnitude(both.dz + both.dz_aug);
                store(gc + padded, both.dz_aug);
            }
            for (int i = 0; i < TWO_STREAM_SUMS; i++) total[i] += part[i];
        }
        int fields = STREAMS == 2 ? TWO_STREAM_SUMS : ONE_STREAM_SUMS;
        for (int i = 0; i < fields; i++) store(sums + i * padded + r, total[i]);
    }
}

// From logits z (columns, streams * padded) to their gradients g, which have the same shape, or are
// (columns, padded) where the second of two streams gets none (`aug` is 0).
// rows: (5, padded) fields of `Rows`; where there are two streams, those of the second follow, and
// then those of `Kls`. targets: (padded,) where among the columns a row's target stands.
// sums: (3 or 12, padded) sums over the columns of
//   p, p (log p + H), |dz|; the same of q; |q - p|, p |log q - log p|, the KL's terms, |dz + dz_aug|;
//   q |log q - log p|, the terms of KL(q || p). Those of q, and the last ones, are 0 unless asked for.
extern "C" void column_gradients(const float *z, float *g, int64_t count, int64_t streams, int aug,
                                 int reverse, int64_t padded, const float *rows,
                                 const int32_t *targets, float *sums)
{
    auto work = streams == 1      ? gradients_of<1, false, false>
                : aug && reverse  ? gradients_of<2, true, true>
                : aug             ? gradients_of<2, true, false>
                : reverse         ? gradients_of<2, false, true>
                                  : gradients_of<2, false, false>;
    work(z, g, count, padded, rows, targets, sums);
}

// |dz| of LANES rows of one column: of each stream, and of their sum where `net` asks for it.
struct Sizes {
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

// The largest over rows of |dz| in units of what the row may still drop; `room` is 1 over that.
static float column_need(const float *g, int64_t streams, int64_t padded, bool net,
                         const std::vector<float> &room)
{
    vf worst = {};
    for (int64_t r = 0; r < padded; r += LANES) {
        Sizes s(g + r, streams, padded, net);
        for (int i = 0; i < s.count; i++)
            worst = larger(s.x[i] * load(room.data() + i * padded + r), worst);
    }
    float most = 0;
    for (int i = 0; i < LANES; i++) most = worst[i] > most ? worst[i] : most;
    return most;
}

// Columns in the order of how much some row needs them, the least needed first. The order is exact to
// an eighth of a power of two.
static std::vector<int32_t> by_need(const std::vector<float> &need)
{
    auto bucket = [&](size_t c) {
        int32_t bits;
        memcpy(&bits, &need[c], 4);
        return bits >> 20;
    };
    std::vector<int32_t> start(2050), order(need.size());
    for (size_t c = 0; c < need.size(); c++) start[bucket(c) + 1]++;
    for (size_t b = 1; b < start.size(); b++) start[b] += start[b - 1];
    for (size_t c = 0; c < need.size(); c++) order[start[bucket(c)]++] = (int32_t)c;
    return order;
}

// Drops the columns that matter least for as long as every row stays within what it may drop,
// `allowed` (2 or 3, padded). keep: the other columns, ascending; returns how many those are.
// dropped (2 or 3, padded): sums of |dz| over the columns that are dropped.
extern "C" int64_t drop_least(const float *g, int64_t count, int64_t streams, int64_t padded, int net,
                              const float *allowed, float *dropped, int64_t *keep)
{
    int64_t size = streams * padded, fields = (streams + net) * padded;
    std::vector<float> room(fields), need(count), next(fields);
    for (int64_t i = 0; i < fields; i++) room[i] = 1 / (allowed[i] > 1e-38f ? allowed[i] : 1e-38f);
    for (int64_t c = 0; c < count; c++)
        need[c] = column_need(g + c * size, streams, padded, net, room);
    std::vector<char> gone(count);
    memset(dropped, 0, fields * 4);
    for (int64_t c : by_need(need)) {
        vi over = {};
        for (int64_t r = 0; r < padded; r += LANES) {
            Sizes s(g + c * size + r, streams, padded, net);
            for (int i = 0; i < s.count; i++) {
                vf sum = load(dropped + i * padded + r) + s.x[i];
                over |= sum > load(allowed + i * padded + r);
                store(next.data() + i * padded + r, sum);
            }
        }
        bool full = false;
        for (int i = 0; i < LANES; i++) full |= over[i] != 0;
        if (full) break;
        memcpy(dropped, next.data(), fields * 4);
        gone[c] = 1;
    }
    int64_t kept = 0;
    for (int64_t c = 0; c < count; c++)
        if (!gone[c]) keep[kept++] = c;
    return kept;
}
