// Gradients of LANES logits at a time: of one word in some rows, or of some words in one row.
// equations.py has the same for tensors.

#pragma once

#include "vectors.h"

enum { STREAM_FIELDS = 5 };

// Statistics and upstream gradients of rows in one stream. `field(i)` are those of number i.
struct Rows {
    vf peak, log_sum, entropy, up_logprob, up_entropy;
    template <typename F>
    Rows(F field, int first)
        : peak(field(first)), log_sum(field(first + 1)), entropy(field(first + 2)),
          up_logprob(field(first + 3)), up_entropy(field(first + 4))
    {
    }
};

// KL(p || q) and its upstream gradient, KL(q || p) and its own. They stand behind both streams.
struct Kls {
    vf kl, up_kl, reverse, up_reverse;
    Kls() = default;
    template <typename F>
    explicit Kls(F field)
        : kl(field(2 * STREAM_FIELDS)), up_kl(field(2 * STREAM_FIELDS + 1)),
          reverse(field(2 * STREAM_FIELDS + 2)), up_reverse(field(2 * STREAM_FIELDS + 3))
    {
    }
};

// p, log p and p (log p + H), and the logit's gradient without the KLs' part.
// equations.py explains what becomes of a word with more than half of the mass.
struct Own {
    vf log_p, p, entropy, dz;
    Own(vf z, const Rows &s, vi is_target, bool some_target)
    {
        vf x = (z - s.peak) - s.log_sum;
        x = x > LOG_HALF ? -s.log_sum : x;
        log_p = x < LOG_ZERO ? splat(LOG_ZERO) : x;
        p = exponential(log_p);
        entropy = p * (log_p + s.entropy);
        dz = -s.up_logprob * p;
        if (some_target) dz = is_target ? -s.up_logprob * q_minus_p(splat(1), p, log_p) : dz;
        dz -= s.up_entropy * entropy;
    }
};

// Both streams' gradients with the KLs' part. REVERSE: KL(q || p) has an upstream gradient.
template <bool REVERSE> struct Both {
    vf gap, drift, aug_drift, dz, dz_aug;  // q - p, p (log q - log p), q (log q - log p)
    Both(const Own &p, const Own &q, const Kls &s)
    {
        vf x = q.log_p - p.log_p;
        gap = q_minus_p(p.p, q.p, x), drift = p.p * x, aug_drift = q.p * x;
        dz = p.dz - s.up_kl * (drift + p.p * s.kl), dz_aug = q.dz + s.up_kl * gap;
        if (REVERSE) {
            dz -= s.up_reverse * gap;
            dz_aug += s.up_reverse * (aug_drift - q.p * s.reverse);
        }
    }
};
