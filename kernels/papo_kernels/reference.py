"""The specification: whole logits, plain autograd, nothing clever.

Equations: arXiv 2507.06448 (the perception KL and the double entropy), exact over the vocabulary.
"""

import torch

# Finite stand-in for log 0: a banned token contributes 0 * LOG_ZERO = 0 and not 0 * inf = NaN.
LOG_ZERO = -1e30


def bans(bias):
    """(V,) -inf for every banned word, one whose (V,) bias is LOG_ZERO or below; else 0.

    Numbers that low, such as the least float32 and bfloat16, are in use for "never". A soft cap
    turns -inf into -softcap, so bans are added before it and after it.
    """
    return torch.where(bias <= LOG_ZERO, -torch.inf, torch.zeros_like(bias))


def compute_dtype(*operands):
    """float64 if an operand is, else float32; None stands for an operand not given."""
    wide = any(x is not None and x.dtype == torch.float64 for x in operands)
    return torch.float64 if wide else torch.float32


def token_stats(
    hidden, weight, targets, *, aug_hidden, bias, temperature, softcap, ignore_index, aug_constant
):
    """Six (N,) tensors or None, as `rows.OUTPUTS` lists them."""
    dtype = compute_dtype(hidden, aug_hidden, weight, bias)
    kept = (targets != ignore_index).nonzero().squeeze(-1)
    kept_targets = targets[kept]
    wide_weight, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    banned = None if bias is None else bans(wide_bias.detach())

    def log_softmax(x):
        z = x[kept].to(dtype) @ wide_weight.T
        if bias is not None:
            z = z + wide_bias + banned
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
            z = z if bias is None else z + banned
        return torch.log_softmax(z / temperature, dim=-1)

    def target_logprob(log_p):
        valid = (kept_targets >= 0) & (kept_targets < weight.shape[0])
        chosen = log_p.gather(1, torch.where(valid, kept_targets, 0)[:, None]).squeeze(1)
        return torch.where(valid, chosen, torch.nan)

    def entropy(log_p):
        return -(log_p.exp() * log_p.clamp_min(LOG_ZERO)).sum(-1)

    def kl(log_p, log_q):
        # sum(q - p) is 0; with it every term is >= 0, and both gradients are exactly 0 at p = q.
        difference = log_p.clamp_min(LOG_ZERO) - log_q.clamp_min(LOG_ZERO)
        return (log_p.exp() * difference + log_q.exp() - log_p.exp()).sum(-1)

    def spread(values):
        return values.new_zeros(targets.shape).index_put((kept,), values)

    log_p = log_softmax(hidden)
    stats = [target_logprob(log_p), entropy(log_p)]
    if aug_hidden is not None:
        log_q = log_softmax(aug_hidden)
        if aug_constant:
            log_q = log_q.detach()
        stats += [target_logprob(log_q), entropy(log_q), kl(log_p, log_q), kl(log_q, log_p)]
    return tuple(map(spread, stats)) + (None,) * (6 - len(stats))
