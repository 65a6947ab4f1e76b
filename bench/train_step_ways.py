"""Ways to make one policy update, from the authors' schedule to papo_fast's own.

A way is called on a `Case`, leaves the update's gradients in `.grad` and returns its loss. All ways
of one objective compute the same loss. Each includes the passes without gradient that its schedule
needs, gradient clipping (at infinity) and the optimizer's step (at learning rate 0), and leaves out
sampling and rewards.
"""

import itertools
from dataclasses import dataclass, replace

import torch

from papo_fast.config import Config, RolloutConfig, TrainConfig
from papo_fast.experience import add_logprobs
from papo_fast.model.batching import distribute, tree_tokens
from papo_fast.model.packing import pack
from papo_fast.model.policy import inference
from papo_fast.objective import objective
from papo_fast.presets import get_preset
from papo_fast.samples import all_samples
from papo_fast.token_batch import Denominators, TokenBatch
from papo_fast.update import Updater

# papo-g-7b has all the terms: γ = .02, η = .05, β = .01. Averages are over the global batch in the
# official objective too (the authors' are over micro-batches), so that the loss does not depend on
# what a way puts into one micro-batch.
PAPO = replace(get_preset("papo-g-7b").objective, parity="ours", aug="trained")
OBJECTIVES = {
    "both": PAPO,
    "official": replace(PAPO, parity="official", aug=None, average_over="global"),
    "grpo": get_preset("grpo").objective,
}


@dataclass(frozen=True)
class Way:
    """One schedule.

    Attributes:
        objective: a key of `OBJECTIVES`.
        layout: "padded" micro-batches through the model's own forward, "packed" without padding,
            both with whole logits of all positions; or "trainer", papo_fast as it is: response
            rows only, into `token_stats`.
        share: what of a group is computed once per micro-batch and stream: "nothing", "pictures",
            or "prompts", which includes their pictures.
        one_pass: both streams of an objective with gradient in both go through together.
        old_pass: a pass without gradient for the old log-probs.
    """

    name: str
    objective: str
    layout: str
    share: str = "nothing"
    one_pass: bool = False
    old_pass: bool = True

    def __call__(self, case):
        run = {"padded": _whole_logits, "packed": _whole_logits, "trainer": _trainer}[self.layout]
        return run(case, self)


PADDED = {
    "both": "one by one, padded, both streams",
    "official": "the authors' schedule",
}
OURS = {
    "both": "papo_fast",
    "official": "papo_fast, official parity",
    "grpo": "papo_fast, GRPO",
}
PACKED, PROMPTS_ONCE = "+ packed, no padding", "+ prompts once"
UNSHARED = "papo_fast, nothing shared"
# Several updates per rollout, as in the paper: the old log-probs need their pass.
OFF_POLICY = ", old pass"
WAYS = (
    Way(PADDED["both"], "both", "padded"),
    Way(PACKED, "both", "packed"),
    Way("+ pictures once", "both", "packed", "pictures"),
    Way(PROMPTS_ONCE, "both", "packed", "prompts"),
    Way("+ both streams in one pass", "both", "packed", "prompts", one_pass=True),
    Way("+ no old-log-prob pass", "both", "packed", "prompts", one_pass=True, old_pass=False),
    Way(OURS["both"], "both", "trainer", "prompts", one_pass=True, old_pass=False),
    Way(UNSHARED, "both", "trainer", "nothing", one_pass=True, old_pass=False),
    Way(PADDED["official"], "official", "padded"),
    Way(PACKED, "official", "packed"),
    Way("+ pictures once", "official", "packed", "pictures"),
    Way(PROMPTS_ONCE, "official", "packed", "prompts"),
    Way("+ no old-log-prob pass", "official", "packed", "prompts", old_pass=False),
    Way(OURS["official"], "official", "trainer", "prompts", old_pass=False),
    Way(OURS["grpo"], "grpo", "trainer", "prompts", old_pass=False),
    *[Way(OURS[o] + OFF_POLICY, o, "trainer", "prompts", o == "both") for o in OURS],
)


def config_of(case, name, old_pass=False):
    """A resolved configuration of one update over all groups.

    old_pass: as if several updates followed, so that the old log-probs need a pass.
    """
    prompts = len(case.groups)
    return Config(
        objective=OBJECTIVES[name].resolved(),
        rollout=RolloutConfig(
            prompts=2 * prompts if old_pass else prompts,
            group_size=case.group_size,
            max_new_tokens=max(len(s) for s in case.samples),
        ),
        train=TrainConfig(
            lr=0.0,
            grad_clip=float("inf"),
            update_prompts=prompts,
            max_tokens=case.size.micro_tokens,
        ),
    )


# papo_fast's own


def _trainer(case, way):
    config, groups = config_of(case, way.objective, way.old_pass), case.sharing(way.share)
    add_logprobs(groups, case.policy, case.reference, config)
    updater = Updater(config, case.policy, case.reference, 1)
    updater.optimizer = case.optimizer
    return updater.update(groups, lambda n: None)["loss"]


# What it is compared with


def _whole_logits(case, way):
    """Log-probs of every position from logits that exist as a whole; streams one by one."""
    forward = _padded if way.layout == "padded" else _packed
    goal = OBJECTIVES[way.objective].resolved()
    groups = case.sharing(way.share)
    passes = [("old", case.policy, "full")] * way.old_pass
    passes += [("ref", case.reference, "full")]
    if goal.aug_stream == "stored":
        passes += [("aug", case.policy, "aug")]
    with inference(case.policy):
        for (field, policy, stream), batch in itertools.product(
            passes, _batches(case, way, groups, 1)
        ):
            [log_p], samples = forward(policy, batch, (stream,))
            labels, lengths = _labels(samples)
            found = _of_labels(log_p, labels).split(lengths)
            for sample, of_sample in zip(samples, found, strict=True):
                setattr(sample, field, of_sample)

    denominators = Denominators(
        tokens=float(case.tokens), sequences=float(len(case.samples)), constant=None
    )
    case.policy.train()
    case.optimizer.zero_grad(set_to_none=True)
    total = 0.0
    streams = ("full", "aug") if goal.aug_stream == "trained" else ("full",)
    for batch in _batches(case, way, groups, len(streams) if way.one_pass else 1):
        if way.one_pass:
            log_probs, samples = forward(case.policy, batch, streams)
        else:
            log_probs = []
            for stream in streams:
                one, samples = forward(case.policy, batch, (stream,))
                log_probs += one
        loss, _ = objective(_token_batch(log_probs, samples), goal, denominators)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(case.policy.parameters(), float("inf"))
    case.optimizer.step()
    return total


def _batches(case, way, groups, streams):
    """Micro-batches of `micro_tokens`: groups to pack, or groups of one sample to pad."""
    budget = case.size.micro_tokens
    if way.layout == "packed":
        [batches] = distribute(groups, budget, streams, case.policy.shape)
        return batches
    alone = [replace(group, samples=[sample]) for group in groups for sample in group.samples]
    longest = max(map(tree_tokens, alone))
    count = -(-len(alone) // (budget // longest))
    # micro-batches of equal size
    return [
        [group for i, group in enumerate(alone) if i * count // len(alone) == b]
        for b in range(count)
    ]


def _packed(policy, groups, streams):
    """([(N, V) log-probs of each stream], samples); logits of all T positions are computed."""
    packed = pack(groups, policy.prompt_positions, full="full" in streams, aug="aug" in streams)
    packed = packed.to(policy.device)
    everywhere = torch.arange(len(packed.input_ids_T), device=policy.device)
    [hidden_TD] = policy._hidden(replace(packed, predictors=(everywhere,)))
    with policy.autocast():
        logits_TV = policy.model.lm_head(hidden_TD).float()
    return [logits_TV[at].log_softmax(-1) for at in packed.predictors], packed.samples


def _padded(policy, groups, streams):
    """The same of groups of one sample padded on the right, through the model's own forward."""
    width = max(map(tree_tokens, groups))
    ids = torch.zeros(len(groups), width, dtype=torch.int64)
    mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
    predictors = torch.zeros_like(ids, dtype=torch.bool)
    for b, group in enumerate(groups):
        prompt, response = group.prompt.encoded, group.samples[0].completion.token_ids
        p, n = len(prompt), len(prompt) + len(response)
        ids[b, :n] = torch.cat([prompt.input_ids, torch.tensor(response)])
        mask[b, :n] = 1
        types[b, :p] = prompt.mm_token_type_ids
        predictors[b, p - 1 : n - 1] = True
    ids, mask, types, predictors = (x.to(policy.device) for x in (ids, mask, types, predictors))
    grids = torch.cat([group.prompt.encoded.image_grid_thw for group in groups])
    log_probs = []
    for stream in streams:
        pixels = [group.pixels(stream) for group in groups]
        policy.model.model.rope_deltas = None
        with policy.autocast():
            logits_BTV = policy.model(
                input_ids=ids,
                attention_mask=mask,
                mm_token_type_ids=types,
                pixel_values=torch.cat(pixels).to(policy.device),
                image_grid_thw=grids.to(policy.device),
                use_cache=False,
            ).logits
        log_probs.append(logits_BTV[predictors].float().log_softmax(-1))
    return log_probs, all_samples(groups)


def _labels(samples):
    return torch.tensor([t for s in samples for t in s.completion.token_ids]), list(
        map(len, samples)
    )


def _of_labels(log_p, labels):
    return log_p.gather(1, labels.to(log_p.device)[:, None])[:, 0]


def _token_batch(log_probs, samples):
    labels, lengths = _labels(samples)
    log_p = log_probs[0]
    index = torch.arange(len(samples)).repeat_interleave(torch.tensor(lengths)).to(log_p.device)
    logprobs = _of_labels(log_p, labels)
    values = {
        f"{field}_logprobs": torch.cat([getattr(s, field) for s in samples])
        for field in ("old", "ref", "aug")
        if getattr(samples[0], field) is not None
    }
    if len(log_probs) == 2:
        p, log_q = log_p.exp(), log_probs[1]
        values |= {
            "entropy": -(p * log_p).sum(-1),
            "aug_logprobs": _of_labels(log_q, labels),
            "aug_entropy": -(log_q.exp() * log_q).sum(-1),
            "kl_prcp": (p * (log_p - log_q)).sum(-1),
        }
    values = {"old_logprobs": logprobs.detach()} | values
    advantages = torch.tensor([s.advantage for s in samples], device=log_p.device)
    return TokenBatch(
        logprobs=logprobs, advantages=advantages[index], sequence_ids=index, **values
    )  # fmt: skip
