"""Tokens and FLOPs that pass through the vision tower, the language model and the lm_head."""

import contextlib
import functools
from dataclasses import dataclass, field

import torch

from papo_fast.model import policy as policy_module
from papo_fast.model.flops import ModelShape
from papo_kernels import record_certificates, token_stats

PARTS = ("vision", "language", "lm_head")


@dataclass
class Work:
    """Of one update. `tokens` counts a token once for every forward pass that it is in; `flops`
    counts a backward pass twice its forward (four times the forward of a head whose logits are
    computed anew). Pairs of tokens count where causal attention needs them.
    """

    tokens: dict = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    flops: dict = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    attention: float = 0.0
    """FLOPs of the language model's attention over pairs of tokens, which are in its FLOPs."""
    kept: float | None = None
    """Share of the vocabulary that the sparse backward of `token_stats` ran on."""

    def add(self, part, tokens, forward, backward=2.0):
        self.tokens[part] += tokens
        self.flops[part] += forward * (1 + backward * torch.is_grad_enabled())


@contextlib.contextmanager
def counted(models, trl=False):
    """Counts what the models do; yields the Work, complete when the context ends.

    trl: the models' heads are TRL's, which do every position and compute logits twice.
    """
    work, handles, with_gradient = Work(), [], 0.0
    shape = ModelShape.of(models[0].config)

    def vision(module, args, kwargs):
        pixels = args[0] if args else kwargs["hidden_states"]
        tokens = len(pixels) // shape.merge
        work.add("vision", tokens, shape.vision(tokens))
        # pixels get no gradient: one product less in the backward of what embeds them
        embedding = 2 * pixels.numel() * module.patch_embed.embed_dim
        work.flops["vision"] -= embedding * torch.is_grad_enabled()

    def language(module, args, kwargs):
        batch, length, _ = kwargs["inputs_embeds"].shape
        tree = kwargs.get("tree")
        pairs = batch * length * (length + 1) // 2 if tree is None else tree.pairs
        work.add("language", batch * length, shape.language(batch * length, pairs))
        work.attention += shape.language(0, pairs) * (1 + 2 * torch.is_grad_enabled())
        if trl:
            rows = batch * (length - 1)
            work.add("lm_head", rows, shape.head(rows), backward=3.0)

    def head(module, args):
        rows = args[0].shape[:-1].numel()
        work.add("lm_head", rows, shape.head(rows))

    def statistics(hidden, weight, targets, *, aug_hidden=None, **options):
        nonlocal with_gradient
        rows = len(targets) * (1 if aug_hidden is None else 2)
        forward = 2.0 * rows * weight.numel()
        work.add("lm_head", rows, forward, backward=0.0)
        with_gradient += forward * torch.is_grad_enabled()
        return token_stats(hidden, weight, targets, aug_hidden=aug_hidden, **options)

    for model in models:
        inner = model.model
        handles += [
            inner.visual.register_forward_pre_hook(vision, with_kwargs=True),
            inner.language_model.register_forward_pre_hook(language, with_kwargs=True),
            model.lm_head.register_forward_pre_hook(head),
        ]
    try:
        with record_certificates() as certificate, _statistics(statistics):
            yield work
    finally:
        for handle in handles:
            handle.remove()
    if certificate.rows:
        work.kept = certificate.kept
        work.flops["lm_head"] += 3 * work.kept * with_gradient


@contextlib.contextmanager
def _statistics(function):
    """papo_fast's policies compute their statistics with `function`."""
    policy_module.token_stats = function
    try:
        yield
    finally:
        policy_module.token_stats = token_stats


def dense_gradients():
    """Context in which `token_stats` leaves nothing out of the gradients."""
    return _statistics(functools.partial(token_stats, grad_budget=0.0))


def by_definition():
    """Context in which `token_stats` computes all logits, by plain torch."""
    return _statistics(functools.partial(token_stats, backend="reference"))
