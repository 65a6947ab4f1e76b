// Vectors, threads and the exponential, shared by the other files.
//
// The vector type is GCC's own, so that one source serves every processor; LANES is how many floats a
// register holds. NaN must stay NaN, so -ffast-math is not used. Every function splits its work over
// `threads` in a way that does not change the result.

#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#ifdef __AVX512F__
enum { LANES = 16, ACCUMULATORS = 24, WIDEST = 4 };
#elif defined(__AVX__)
enum { LANES = 8, ACCUMULATORS = 10, WIDEST = 2 };
#else
enum { LANES = 4, ACCUMULATORS = 12, WIDEST = 2 };
#endif
// A sum over more terms than this is made in parts: a longer one loses several times more bits.
enum { FEATURES = 256 };
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

static const float LOG_ZERO = -1e30f, LOG_HALF = -.692f;  // as in equations.py

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

static inline uint16_t rounded(float x)  // to bfloat16, to nearest, ties to even
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint16_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x == x ? nearest : 0x7fc0;
}

// Work on [0, count) in parts of whole grains, of which each thread takes the next one when it has done
// one. FEW parts, one for each thread, are for work that sets up something for each part. Else MANY:
// torch's own threads wait in a loop for some milliseconds behind each of its operators, and who shares
// a core with one of them does less.
enum Parts { FEW = 1, MANY = 8 };

static inline void split(int64_t count, int64_t grain, int threads, Parts of_a_thread,
                         const std::function<void(int64_t, int64_t)> &work)
{
    int64_t grains = (count + grain - 1) / grain;
    if (threads > grains) threads = grains;
    if (threads <= 1) {
        if (count) work(0, count);
        return;
    }
    int64_t parts = (int64_t)of_a_thread * threads, each = (grains + parts - 1) / parts * grain;
    std::atomic<int64_t> next(0);
    auto take = [&] {
        for (int64_t first; (first = next.fetch_add(each)) < count;)
            work(first, first + each < count ? first + each : count);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(take);
    take();
    for (auto &t : others) t.join();
}

// q - p as in equations.q_minus_p: by a series where q is close to p.
static inline vf q_minus_p(vf p, vf q, vf x)
{
    vf series = x * (1 + x * (1 / 2.f) * (1 + x * (1 / 3.f) * (1 + x * (1 / 4.f) *
                    (1 + x * (1 / 5.f) * (1 + x * (1 / 6.f))))));
    return magnitude(x) < 0.25f ? p * series : q - p;
}
