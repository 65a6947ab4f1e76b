"""SmolLM2's states in one file under 40 MB, for a machine that has neither network nor the model.

    python bench/carry_states.py            # writes carried/states.pt, which bench/gpu.sh looks for

The weight is int8 with one scale a row (28 MB), the hidden states of `smollm2-0.6` and `-1.1` are
bfloat16. So the logits are not SmolLM2's to the last bit; the entropies and the KL that are shown
are always measured on what was loaded. torch is all that is needed to read the file.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from states import SAMPLED_ROWS, States, measured, smollm2, take, widen

CARRIED = Path(__file__).parents[1] / "carried" / "states.pt"
NAMES = ("smollm2-0.6", "smollm2-1.1")
# What repeated rows differ by, relative to the states' standard deviation.
FRESH_NOISE = 0.02
# Mean probability that `extend` gives to all words that it appends.
TAIL_MASS = 1e-4
# Rows that entropies and shares of mass are measured on.
MEASURED_ROWS = 256


def save(path, all_states):
    """Writes some States that share a weight."""
    weight = all_states[0].weight.float()
    scale = weight.abs().amax(1).clamp_min(1e-30) / 127
    kept = {
        s.name: {
            "hidden": s.hidden.bfloat16().contiguous(),
            "aug_hidden": s.aug_hidden.bfloat16().contiguous(),
            "targets": s.targets.int().contiguous(),
        }
        for s in all_states
    }
    rounded = (weight / scale[:, None]).round().to(torch.int8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save({"weight": rounded, "scale": scale, "states": kept}, partial)
    partial.replace(path)


def load(path, name, device="cpu"):
    """States called `name`, float32, as the file has them; their entropies are not measured yet."""
    found = torch.load(path, map_location=device, weights_only=True)
    rows = found["states"][name]
    weight = found["weight"].float() * found["scale"][:, None]
    return States(
        name, rows["hidden"].float(), rows["aug_hidden"].float(), weight, rows["targets"].long()
    )


def tile(states, count, seed=0):
    """`count` rows: the rows in their order, again and again, each with fresh noise.

    The noise is small beside the states, so that policies stay what they are, and the rows are
    still no copies of each other.
    """
    have = len(states.targets)
    g = torch.Generator(states.hidden.device).manual_seed(seed)
    at = torch.arange(count, device=states.targets.device) % have

    def repeated(x):
        noise = torch.randn(count, x.shape[1], generator=g, device=x.device)
        return x[at] + FRESH_NOISE * x.std() * noise

    return replace(
        states,
        hidden=repeated(states.hidden),
        aug_hidden=repeated(states.aug_hidden),
        targets=states.targets[at],
    )


def extend(states, vocab, seed=0):
    """States with `vocab` words, named "...-wide": a tail of rare words is appended.

    This is no bigger model. The tail's rows are those of words that are not among the likeliest
    tenth, drawn again and again, with noise of a tenth of their norm; and one feature, which is 1
    in all states and 0 in the words that were there, makes all of the tail less likely by one
    factor, so that its mean mass is TAIL_MASS. What a row puts on its likely words stays. How thin
    a bigger model's tail is, is not known here: SmolLM2's own rarer half holds 1e-7 in
    `smollm2-0.6`, so this tail is rather too thick than too thin for it.
    """
    have = len(states.weight)
    g = torch.Generator(states.weight.device).manual_seed(seed)
    few = slice(0, MEASURED_ROWS)
    logits = states.hidden[few] @ states.weight.T
    rarer = logits.softmax(-1).mean(0).argsort()[: have - have // 10]
    extra = vocab - have
    drawn = torch.randint(len(rarer), (extra,), generator=g, device=rarer.device)
    tail = states.weight[rarer[drawn]]
    noise = torch.randn(tail.shape, generator=g, device=tail.device)
    tail = tail + 0.1 * tail.norm(dim=1, keepdim=True) * noise / tail.shape[1] ** 0.5
    # Mass relative to the old words', which is what a common shift of the tail's logits scales.
    masses = (states.hidden[few] @ tail.T - logits.logsumexp(-1, keepdim=True)).exp().sum(-1)
    shift = (TAIL_MASS / masses.mean()).log()

    def with_feature(x, value):
        return torch.cat([x, value.expand(len(x), 1)], 1)

    one, zero = shift.new_ones(()), shift.new_zeros(())
    return replace(
        states,
        name=f"{states.name}-wide",
        hidden=with_feature(states.hidden, one),
        aug_hidden=with_feature(states.aug_hidden, one),
        weight=torch.cat([with_feature(states.weight, zero), with_feature(tail, shift)]),
    )


@torch.no_grad()
def carried(path, name, rows, width, device, vocab=None, cut=None):
    """States of `rows` rows and `width` features in bfloat16 on `device`, entropies measured.

    vocab: with so many words, by `extend`. cut: only the file's first (words, features), for an
    interpreter; that leaves nothing real.
    """
    states = load(path, name, device)
    if cut is not None:
        words, features = cut
        states = states.map(lambda x: x[:, :features])
        states = replace(
            states, weight=states.weight[:words], targets=states.targets % words
        )  # fmt: skip
    if vocab is not None:
        states = extend(states, vocab)
    states = widen(tile(states, rows), width).map(lambda x: x.bfloat16().contiguous())
    known = measured(take_rows(states, MEASURED_ROWS))
    return replace(
        states, entropy=known.entropy, aug_entropy=known.aug_entropy, kl_prcp=known.kl_prcp
    )


def take_rows(states, count):
    """The first rows, as many as there are up to `count`."""
    return replace(
        states,
        **{n: getattr(states, n)[:count] for n in ("hidden", "aug_hidden", "targets")},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=CARRIED)
    path = parser.parse_args().out
    save(path, [take(smollm2(name), SAMPLED_ROWS) for name in NAMES])
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    for name in NAMES:
        print(measured(load(path, name)).describe())


if __name__ == "__main__":
    main()
