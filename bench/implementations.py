"""What each implementation of PAPO computes: one batch, each term alone, three settings.

    PYTHONPATH=.:kernels python bench/implementations.py [--write docs/implementations.md]

The batch is made here: a policy of stated entropy over 4096 words and its version with a corrupted
picture, at several distances. Everything is float64 except where a row says bf16, whose logits are
rounded as a 16-bit lm_head rounds them. Gradients are those of the hidden states of both streams,
which is what reaches the model.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from papo_fast.config import ObjectiveConfig
from papo_fast.consoles import as_command
from papo_fast.objective import objective
from papo_fast.token_batch import Denominators, TokenBatch

V, D, SEQUENCES, LONGEST = 4096, 64, 16, 24
SHARPNESS = 8.0
DISTANCES = (0.3, 0.03, 0.003)
SETTINGS = {
    "official": dict(parity="official"),
    "paper": dict(parity="paper"),
    "exact": dict(parity="ours", aug="trained"),
}
TERMS = {
    "perception KL": dict(kl_prcp_coef=1.0),
    "entropy": dict(kl_prcp_coef=0.0, entropy_coef=1.0),
    "entropy, corrupted": dict(kl_prcp_coef=0.0, aug_entropy_coef=1.0),
}
MARKS = "<!-- numbers -->\n", "<!-- end of numbers -->\n"


@dataclass
class Batch:
    """One policy and its corrupted stream; hidden states (N, D), one sampled token for each."""

    hidden: Tensor
    aug_hidden: Tensor
    weight: Tensor
    targets: Tensor
    sequence_ids: Tensor

    @classmethod
    def make(cls, distance: float, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        lengths = torch.randint(3, LONGEST + 1, (SEQUENCES,), generator=generator)
        n = int(lengths.sum())
        weight = normal(V, D) / D**0.5
        hidden = SHARPNESS * normal(n, D)
        p = (hidden @ weight.T).softmax(-1)
        return cls(
            hidden,
            hidden + distance * SHARPNESS * normal(n, D),
            weight,
            torch.multinomial(p, 1, generator=generator)[:, 0],
            torch.arange(SEQUENCES).repeat_interleave(lengths),
        )

    def logits(self, bf16: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Leaves of both streams, and their logits."""
        leaves = [x.clone().requires_grad_() for x in (self.hidden, self.aug_hidden)]
        z = [x @ self.weight.T for x in leaves]
        if bf16:  # rounded in value, not in gradient
            z = [x + (x.detach().bfloat16().to(x) - x.detach()) for x in z]
        return *leaves, *z


def term(batch: Batch, goal: ObjectiveConfig, *, bf16: bool = False, expected: bool = False):
    """(value, gradient of hidden, gradient of aug_hidden) of the term that `goal` weighs by 1.

    `expected`: averaged over what the policy might have sampled, instead of the tokens it did.
    """
    hidden, aug_hidden, z, z_aug = batch.logits(bf16)
    log_p, log_q = z.log_softmax(-1), z_aug.log_softmax(-1)
    if goal.aug != "trained":
        log_q = log_q.detach()
    p = log_p.exp()
    exact = dict(
        entropy=-(p * log_p).sum(-1),
        aug_entropy=-(log_q.exp() * log_q).sum(-1),
        kl_prcp=(p * (log_p - log_q)).sum(-1),
        kl_reverse=(log_q.exp() * (log_q - log_p)).sum(-1),
    )
    ids = batch.sequence_ids
    over = Denominators.from_lengths(ids.bincount(), LONGEST)
    if expected and goal.kl_prcp_estimator == "sampled":
        loss = _expected(log_p, log_q, goal)
    else:
        targets = batch.targets[:, None]
        logprobs = log_p.gather(1, targets)[:, 0]
        tokens = TokenBatch(
            logprobs=logprobs,
            old_logprobs=logprobs.detach(),
            advantages=torch.zeros_like(logprobs),
            sequence_ids=ids,
            aug_logprobs=log_q.gather(1, targets)[:, 0],
            **exact,
        )
        loss, _ = objective(tokens, goal, over)
    gradients = (None, None)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, (hidden, aug_hidden), allow_unused=True)
    zero = torch.zeros_like(hidden)
    return loss.item(), *(zero if g is None else g for g in gradients)


def _expected(log_p: Tensor, log_q: Tensor, goal: ObjectiveConfig) -> Tensor:
    """The sampled term summed over all words by their probability, as a token mean."""
    p = log_p.detach().exp()
    if goal.kl_prcp_coef:
        d = log_q - log_p
        values = -(d.exp() - d - 1)
    else:
        values = -(log_p if goal.entropy_coef else log_q)
    return (p * values).sum(-1).mean()


def config(setting: str, term_name: str) -> ObjectiveConfig:
    """The term alone, weighed by 1, as a token mean in every setting."""
    fields = dict(kl_coef=0.0, average="token", entropy_coef=0.0, aug_entropy_coef=0.0)
    return ObjectiveConfig(**(fields | SETTINGS[setting] | TERMS[term_name])).resolved()


def relative(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """Norm of the difference of both streams' gradients, relative to the truth's."""
    a, b = torch.cat(ours), torch.cat(truth)
    return ((a - b).norm() / b.norm()).item()


def cosine(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    a, b = torch.cat(ours), torch.cat(truth)
    size = a.norm() * b.norm()
    return (a * b).sum().item() / size.item() if a.norm() > 1e-12 * b.norm() else 0.0


def measure(distance: float) -> tuple[str, list[dict]]:
    """What the batch is, and one row per term and setting."""
    batch = Batch.make(distance)
    rows, stated = [], {}
    for name in TERMS:
        value, *truth = term(batch, config("exact", name))
        stated[name] = abs(value)
        for setting in SETTINGS:
            goal = config(setting, name)
            value, *gradients = term(batch, goal)
            _, *rounded = term(batch, goal, bf16=True)
            _, *mean = term(batch, goal, expected=True)
            rows.append(
                dict(
                    term=name,
                    setting=setting,
                    value=abs(value),
                    into_aug=(gradients[1].norm() / torch.cat(truth).norm()).item(),
                    cosine=cosine(tuple(gradients), tuple(truth)),
                    expected=cosine(tuple(mean), tuple(truth)),
                    bf16=relative(tuple(rounded), tuple(gradients)),
                )
            )
    text = (
        f"Perception KL {stated['perception KL']:.2g} nats, entropy {stated['entropy']:.2f} "
        f"(corrupted {stated['entropy, corrupted']:.2f}), {len(batch.targets)} tokens"
    )
    return text, rows


HEADER = (
    "| term | setting | value | gradient into the corrupted stream | cosine, this batch | "
    "cosine, expected | change by bf16 logits |\n| --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
)


def table(text: str, rows: list[dict]) -> str:
    lines = [
        f"| {r['term']} | {r['setting']} | {r['value']:.3g} | {r['into_aug']:.2f} | "
        f"{r['cosine']:.2f} | {r['expected']:.2f} | {_percent(r['bf16'])} |\n"
        for r in rows
    ]
    return f"{text}:\n\n{HEADER}{''.join(lines)}"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.0%}"


def averages() -> str:
    """The mean of the same per-token numbers, by each implementation's average."""
    batch = Batch.make(DISTANCES[0])
    goal = config("exact", "perception KL")
    lengths = batch.sequence_ids.bincount()
    halves = (lengths[: SEQUENCES // 2], lengths[SEQUENCES // 2 :])
    _, _, z, z_aug = batch.logits(False)
    log_p, log_q = z.log_softmax(-1), z_aug.log_softmax(-1)
    values = (log_p.exp() * (log_p - log_q)).sum(-1).detach()
    sequences = torch.stack([x.mean() for x in values.split(lengths.tolist())])
    micro = [x.mean() for x in values.split([int(h.sum()) for h in halves])]
    assert goal.average == "token"
    return (
        "| average | perception KL, nats |\n| --- | ---: |\n"
        f"| token mean over the global batch (exact) | {values.mean():.4f} |\n"
        f"| token mean per micro-batch of 8 sequences (official) | {sum(micro) / 2:.4f} |\n"
        f"| mean of sequence means (paper, PAPO-G) | {sequences.mean():.4f} |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="put the tables into this page")
    path = parser.parse_args().write
    text = "\n".join([*(table(*measure(d)) for d in DISTANCES), averages()])
    if path is None:
        print(text)
        return
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    path.write_text(before + MARKS[0] + "\n" + text + "\n" + MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(as_command(main))
