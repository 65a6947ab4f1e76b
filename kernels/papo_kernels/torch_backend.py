"""Row-chunked statistics and gradients in plain torch, never more than a chunk of logits."""

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from papo_kernels.reference import LOG_ZERO, compute_dtype

# Logits of one chunk and stream: 64 MiB of float32.
CHUNK_ELEMENTS = 1 << 24
# Elements of a low-precision weight that are upcast at a time.
UPCAST_ELEMENTS = 1 << 22


def token_stats(
    hidden, weight, targets, *, aug_hidden, bias, temperature, softcap, ignore_index, grad_budget
):
    """Five (N,) tensors or None: logprobs, entropy, aug_logprobs, aug_entropy, kl_prcp."""
    del grad_budget  # The dense backward leaves nothing out, which every budget allows.
    head = Head(compute_dtype(hidden, aug_hidden, weight, bias), temperature, softcap)
    return ChunkedStats.apply(hidden, aug_hidden, weight, bias, targets, ignore_index, head)


@dataclass(frozen=True)
class Head:
    """Everything between hidden states and log-probabilities; `dtype` is that of all arithmetic."""

    dtype: torch.dtype
    temperature: float
    softcap: float | None

    def log_softmax(self, x, weight, bias):
        """(R, D) states to (R, V) log-probabilities, and d(logits)/d(x @ weight.T + bias)."""
        z = self.project(x, weight)
        slope = 1 / self.temperature
        if bias is not None:
            z += bias.to(self.dtype)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_()
            slope = (1 - z * z).mul_(slope)
            z *= self.softcap
        z /= self.temperature
        return torch.log_softmax(z, dim=-1), slope

    def project(self, x, weight):
        """x @ weight.T for x (R, D)."""
        x = x.to(self.dtype)
        if weight.dtype == self.dtype:
            return x @ weight.T
        z = x.new_empty(x.shape[0], weight.shape[0])
        for block in self._blocks(weight):
            torch.mm(x, weight[block].to(self.dtype).T, out=z[:, block])
        return z

    def project_back(self, dz, weight):
        """dz @ weight for dz (R, V)."""
        if weight.dtype == self.dtype:
            return dz @ weight
        dx = dz.new_zeros(dz.shape[0], weight.shape[1])
        for block in self._blocks(weight):
            dx.addmm_(dz[:, block], weight[block].to(self.dtype))
        return dx

    @staticmethod
    def _blocks(weight):
        size = max(1, UPCAST_ELEMENTS // max(1, weight.shape[1]))
        return (slice(v, v + size) for v in range(0, weight.shape[0], size))


def row_chunks(targets, ignore_index, vocab):
    """Index objects that cover, once each, the rows whose target is not `ignore_index`."""
    size = max(1, CHUNK_ELEMENTS // vocab)
    kept = (targets != ignore_index).nonzero().squeeze(-1)
    if len(kept) < len(targets):
        return kept.split(size) if len(kept) else ()
    return tuple(slice(n, n + size) for n in range(0, len(targets), size))


def label_logprobs(log_p, labels):
    """(R,) log-probs of (R,) labels; NaN for a label outside [0, V), which went unchecked."""
    valid = (labels >= 0) & (labels < log_p.shape[1])
    chosen = log_p.gather(1, torch.where(valid, labels, 0)[:, None]).squeeze(1)
    return torch.where(valid, chosen, torch.nan)


def entropy(p, log_p):
    return -(p * log_p).sum(-1)


def q_minus_p(p, log_p, log_q):
    """q - p with a small relative error where q is close to p, which subtraction would lose."""
    log_ratio = log_q - log_p
    return torch.where(log_ratio.abs() < 1, p * torch.expm1(log_ratio), log_q.exp() - p)


def kl(p, log_p, log_q):
    """KL(p || q) with terms >= 0: sum(q - p) is 0, and with it first-order errors cancel."""
    return (p * (log_p - log_q) + q_minus_p(p, log_p, log_q)).sum(-1)


class ChunkedStats(torch.autograd.Function):
    """Recomputes the logits of each chunk in the backward instead of keeping them."""

    @staticmethod
    def forward(ctx, hidden, aug_hidden, weight, bias, targets, ignore_index, head):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, aug_hidden, weight, bias, targets)
        ctx.ignore_index, ctx.head = ignore_index, head
        two = aug_hidden is not None
        stats = [targets.new_zeros(targets.shape, dtype=head.dtype) for _ in range(5 if two else 2)]
        for rows in row_chunks(targets, ignore_index, weight.shape[0]):
            log_p, _ = head.log_softmax(hidden[rows], weight, bias)
            stats[0][rows] = label_logprobs(log_p, targets[rows])
            log_p.clamp_min_(LOG_ZERO)
            p = log_p.exp()
            stats[1][rows] = entropy(p, log_p)
            if two:
                log_q, _ = head.log_softmax(aug_hidden[rows], weight, bias)
                stats[2][rows] = label_logprobs(log_q, targets[rows])
                log_q.clamp_min_(LOG_ZERO)
                stats[4][rows] = kl(p, log_p, log_q)
                stats[3][rows] = entropy(torch.exp(log_q, out=p), log_q)
        return tuple(stats) if two else (*stats, None, None, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return (*ChunkedStats._gradients(ctx, upstream), None, None, None)

    @staticmethod
    def _gradients(ctx, upstream):
        hidden, aug_hidden, weight, bias, targets = ctx.saved_tensors
        head = ctx.head
        needs_hidden, needs_aug, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        needs_shared = needs_weight or needs_bias
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_aug = torch.zeros_like(aug_hidden) if needs_aug else None
        # One rounding at the end: sums over rows in 16 bits diverge.
        d_weight = torch.zeros_like(weight, dtype=head.dtype) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=head.dtype) if needs_bias else None

        def propagate(dz, slope, x, d_x, rows):
            dz *= slope
            if d_x is not None:
                d_x[rows] = head.project_back(dz, weight).to(d_x.dtype)
            if needs_weight:
                d_weight.addmm_(dz.T, x[rows].to(head.dtype))
            if needs_bias:
                d_bias.add_(dz.sum(0))

        full_used = any(g is not None for g in (upstream[0], upstream[1], upstream[4]))
        aug_used = any(g is not None for g in upstream[2:])
        full_wanted = full_used and (needs_hidden or needs_shared)
        aug_wanted = aug_used and (needs_aug or needs_shared)
        for rows in row_chunks(targets, ctx.ignore_index, weight.shape[0]):
            labels = targets[rows]
            g = [None if u is None else u[rows][:, None].to(head.dtype) for u in upstream]
            if full_wanted or g[4] is not None:
                log_p, slope = head.log_softmax(hidden[rows], weight, bias)
                log_p.clamp_min_(LOG_ZERO)
            if aug_wanted or g[4] is not None:
                log_q, aug_slope = head.log_softmax(aug_hidden[rows], weight, bias)
                log_q.clamp_min_(LOG_ZERO)
            if full_wanted:
                dz = d_stream(log_p, labels, g[0], g[1])
                if g[4] is not None:
                    dz += d_kl_full(log_p, log_q, g[4])
                propagate(dz, slope, hidden, d_hidden, rows)
            if aug_wanted:
                dz = d_stream(log_q, labels, g[2], g[3])
                if g[4] is not None:
                    dz += g[4] * q_minus_p(log_p.exp(), log_p, log_q)
                propagate(dz, aug_slope, aug_hidden, d_aug, rows)
        if needs_weight:
            d_weight = d_weight.to(weight.dtype)
        if needs_bias:
            d_bias = d_bias.to(bias.dtype)
        return d_hidden, d_aug, d_weight, d_bias


def d_stream(log_p, labels, g_logprob, g_entropy):
    """(R, V) gradient of logits from their own log-prob and entropy; upstream (R, 1) or None."""
    dz = None
    if g_logprob is not None:
        valid = (labels >= 0) & (labels < log_p.shape[1])
        column = torch.where(valid, labels, 0)[:, None]
        dz = log_p.exp().mul_(-g_logprob)
        dz.scatter_add_(1, column, torch.where(valid[:, None], g_logprob, torch.nan))
    if g_entropy is not None:
        p = log_p.exp()
        p.mul_(log_p + entropy(p, log_p)[:, None]).mul_(-g_entropy)
        dz = p if dz is None else dz.add_(p)
    return torch.zeros_like(log_p) if dz is None else dz


def d_kl_full(log_p, log_q, g_kl):
    """(R, V) gradient of the full stream's logits from the perception KL."""
    p = log_p.exp()
    return p.mul_(log_p - log_q - kl(p, log_p, log_q)[:, None]).mul_(g_kl)
