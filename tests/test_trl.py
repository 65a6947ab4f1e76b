"""PAPO on TRL's trainer: its loss beside TRL's own and beside ours."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from support.family_checkpoints import FAMILIES
from support.groups import group_of
from support.trl_runs import TERMS, build, loss_and_gradients, write_files  # first: it asks for TRL

# isort: split
from trl import GRPOConfig, GRPOTrainer

from papo_fast.config import ModelConfig
from papo_fast.data.encoded import EncodedPrompt
from papo_fast.integrations.trl import PAPOTrainer, use_token_stats
from papo_fast.model.packing import pack
from papo_fast.model.policy import Policy
from papo_fast.objective import objective
from papo_fast.token_batch import Denominators, TokenBatch

pytestmark = pytest.mark.filterwarnings("ignore")
NO_TERMS = dict(kl_prcp_coef=0.0)
LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("trl"))


def sampled(trainer, prompts=2):
    """A scored batch of `prompts` groups, with responses of several lengths and old log-probs."""
    rows = [trainer.train_dataset[i] for i in range(prompts) for _ in range(4)]
    batch = trainer._generate_and_score_completions(rows)
    b, t = batch["completion_ids"].shape
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, t + 1, (b,), generator=generator)
    batch["completion_mask"] = (torch.arange(t) < lengths[:, None]).long()
    batch["num_items_in_batch"] = lengths.sum()
    batch["advantages"] = torch.randn(b, generator=generator)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    with torch.no_grad():
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            mask,
            t,
            **{name: batch[name] for name in names},
        )
    noise = 0.2 * torch.randn(b, t, generator=generator)
    return {
        **batch,
        "old_per_token_logps": logprobs + noise,
        "ref_per_token_logps": logprobs - 0.3 * noise,
    }


def relative_error(ours, theirs):
    """Norm of the difference of two sets of gradients, relative to the second's."""
    assert ours.keys() == theirs.keys()
    square = sum(x.double().square().sum() for x in theirs.values())
    return (sum((ours[n] - x).double().square().sum() for n, x in theirs.items()) / square).sqrt()


def flat(batch, values):
    return values[batch["completion_mask"].bool()]


def packed(trainer, batch, counted=None, **changes):
    """Our trainer's own loss and gradients of the same batch: packed, no padding, both streams."""
    goal = replace(trainer.goal, **changes)
    policy = Policy.load(
        ModelConfig(str(trainer.model.name_or_path), "float32"), [], torch.device("cpu")
    )
    corrupted = trainer.corrupted(batch).split(batch["image_grid_thw"].prod(-1).tolist())
    pixels = batch["pixel_values"].split(batch["image_grid_thw"].prod(-1).tolist())
    groups = []
    for i, mask in enumerate(batch["completion_mask"].bool()):
        kept = batch["prompt_mask"][i].bool()
        prompt = EncodedPrompt(
            batch["prompt_ids"][i][kept],
            batch["mm_token_type_ids"][i][: len(kept)][kept],
            pixels[i],
            batch["image_grid_thw"][i : i + 1],
        )
        groups.append(group_of(prompt, [batch["completion_ids"][i][mask].tolist()], corrupted[i]))
    positions = policy.prompt_positions
    together = pack(groups, positions, aug=goal.aug == "trained")
    frozen = None
    if goal.aug != "trained":
        frozen = pack(groups, positions, full=False, aug=True)
    stats, _ = policy.stats(together, frozen_aug=frozen)
    old = flat(batch, batch["old_per_token_logps"])
    vectors = dict(
        old_logprobs=old,
        advantages=batch["advantages"][together.sequence_ids_N],
        ref_logprobs=flat(batch, batch["ref_per_token_logps"]),
        sequence_ids=together.sequence_ids_N,
        **stats._asdict(),
    )
    if counted is not None:
        vectors = {name: x[counted] for name, x in vectors.items()}
    n = vectors["logprobs"].numel()
    loss, _ = objective(TokenBatch(**vectors), goal, Denominators(n, len(groups)))
    loss.backward()
    named = policy.model.named_parameters()
    return loss.item(), {n: p.grad for n, p in named if p.grad is not None}


@pytest.fixture(scope="module")
def plain(files):
    """One trainer of TRL's own per family."""
    return {
        family: build(files, family, GRPOTrainer, GRPOConfig, beta=0.01, delta=3.0)
        for family in FAMILIES
    }


def test_what_is_overridden_is_there():
    ours = {n for n in vars(PAPOTrainer) if callable(getattr(GRPOTrainer, n, None))}
    assert ours == {"__init__", "_generate_and_score_completions", "_compute_loss"}
    # every other method of ours has a name of its own, so that TRL cannot begin to call it
    assert not {n for n in vars(PAPOTrainer) if n in dir(GRPOTrainer)} - ours - {
        "__module__", "__doc__", "__static_attributes__", "__firstlineno__",
        "_tag_names", "_name", "_paper",
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_terms_papo_is_trls_own_loss(files, plain, family):
    papo = build(files, family, **NO_TERMS, use_bias_correction_kl=True, epsilon_high=0.2)
    batch = sampled(plain[family])
    theirs, their_gradients = loss_and_gradients(plain[family], batch)
    ours, our_gradients = loss_and_gradients(papo, batch)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert relative_error(our_gradients, their_gradients) < 1e-5


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {"parity": "ours"}) for family in FAMILIES),
        ("qwen2_5_vl", {"parity": "official"}),
        ("qwen3_vl", {"parity": "paper"}),
        ("qwen2_5_vl", {"aug": "frozen", "kl_prcp_direction": "reverse"}),
    ],
    ids=str,
)
def test_the_loss_is_that_of_our_trainer(files, family, settings):
    papo = build(files, family, **TERMS, **settings)
    batch = sampled(papo)
    ours, our_gradients = packed(papo, batch, average="token", average_over="global")
    theirs, their_gradients = loss_and_gradients(papo, batch)
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert relative_error(their_gradients, our_gradients) < 1e-5
    # the terms are not too small for the comparison to see
    without, _ = packed(papo, batch, average="token", average_over="global", entropy_coef=0.0)
    assert abs(without - ours) > 1e-3


def test_tokens_of_tools_do_not_count(files):
    papo = build(files, "qwen2_5_vl", **TERMS, loss_type="bnpo")
    batch = sampled(papo)
    generator = torch.Generator().manual_seed(2)
    batch["tool_mask"] = (
        torch.rand(batch["completion_mask"].shape, generator=generator) < 0.7
    ).long()
    counted = flat(batch, batch["tool_mask"]).bool()
    ours, our_gradients = packed(papo, batch, counted, average="token", average_over="global")
    theirs, their_gradients = loss_and_gradients(papo, batch)
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert relative_error(their_gradients, our_gradients) < 1e-5


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_tokens_weigh_what_trl_weighs_them(files, plain, loss_type, monkeypatch):
    trainer = plain["qwen2_vl"]
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "beta", 0.0)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 3)
    monkeypatch.setattr(trainer.args, "steps_per_generation", 2)
    batch = sampled(trainer)
    del batch["old_per_token_logps"]
    # at a ratio of 1 the policy term is −A, so TRL's loss has the weights as its derivative; these
    # two multiply A by something else, which a perturbation of the log-probs brings out
    advantages = torch.randn(batch["completion_mask"].shape).requires_grad_()
    loss = trainer.compute_loss(trainer.model, {**batch, "advantages": advantages})
    (gradient,) = torch.autograd.grad(loss, advantages)
    weights = PAPOTrainer.token_weights(trainer, batch["completion_mask"], batch)
    if loss_type == "sapo":
        factor = 2 / torch.where(advantages > 0, trainer.args.sapo_temperature_pos,
                                 trainer.args.sapo_temperature_neg)  # fmt: skip
    elif loss_type in ("cispo", "vespo"):
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            advantages.shape[1],
            **{k: batch[k] for k in ("pixel_values", "image_grid_thw", "num_images")},
            mm_token_type_ids=batch["mm_token_type_ids"],
        )
        ratio = min(1.0, trainer.epsilon_high) if loss_type == "cispo" else 1.0
        factor = ratio * logprobs.detach()
    else:
        factor = 1.0
    expected = weights * factor
    assert torch.allclose(-gradient, expected, rtol=1e-4, atol=1e-7)
    assert weights.sum() > 0


def test_a_group_shares_one_mask_of_the_asked_share(files):
    papo = build(files, "qwen2_5_vl", corruption_ratio=0.6)
    batch = papo._generate_and_score_completions(
        [papo.train_dataset[i] for i in range(2) for _ in range(4)]
    )
    rows = batch["image_grid_thw"].prod(-1).tolist()
    changed = (papo.corrupted(batch) != batch["pixel_values"]).any(-1)
    black = papo.corrupted(batch) == papo._corruption.black.repeat_interleave(2 * 14 * 14)
    masks = black.all(-1).split(rows)
    for mask in masks:
        assert mask.sum() == round(0.6 * len(mask))
    assert not changed[~torch.cat(masks)].any()
    for first, other in itertools.product((0, 4), range(4)):
        assert torch.equal(masks[first], masks[first + other])
    assert not torch.equal(masks[0], masks[4])


def test_two_pictures_of_one_prompt(files):
    papo = build(files, "qwen3_vl", **TERMS)
    one, two = papo.train_dataset[0], papo.train_dataset[1]
    places = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
    two = {**two, "prompt": places, "images": two["images"] * 2}
    batch = papo._generate_and_score_completions([one] * 4 + [two] * 4)
    loss, gradients = loss_and_gradients(papo, batch)
    assert math.isfinite(loss) and gradients
    kl = papo._head.stats.kl_prcp[:, -batch["completion_ids"].shape[1] :] * batch["completion_mask"]
    assert (kl.sum(-1) > 1e-4).all()
    # the masks follow the sequences, also where one of them has no picture at all
    whole = papo.corrupted(batch).split(batch["image_grid_thw"].prod(-1).tolist())
    later = {
        "pixel_values": batch["pixel_values"].split(batch["image_grid_thw"].prod(-1).tolist())[4:6],
        "image_grid_thw": batch["image_grid_thw"][4:6],
        "num_images": [0, 2],
        "corruption_seeds": batch["corruption_seeds"][[0, 4]],
    }
    alone = papo.corrupted({**later, "pixel_values": torch.cat(later["pixel_values"])})
    assert torch.equal(alone, torch.cat(whole[4:6]))


def test_a_batch_without_pictures_has_no_perception_kl(files):
    papo = build(files, "qwen2_5_vl", **TERMS)
    text = [{"role": "user", "content": [{"type": "text", "text": "Compute 1+1."}]}]
    batch = papo._generate_and_score_completions(
        [{"prompt": text, "images": [], "answer": "2"} for _ in range(4)]
    )
    papo.compute_loss(papo.model, batch)
    stats = papo._head.stats
    assert not stats.kl_prcp.any() and torch.equal(stats.entropy, stats.aug_entropy)


def test_the_small_hook_leaves_trls_loss_as_it_is(files, plain):
    trainer = build(files, "qwen2_5_vl", GRPOTrainer, GRPOConfig, beta=0.01, delta=3.0)
    batch = sampled(trainer)
    expected, gradients = loss_and_gradients(plain["qwen2_5_vl"], batch)
    head = use_token_stats(trainer, grad_budget=0.0)
    loss, ours = loss_and_gradients(trainer, batch)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert relative_error(ours, gradients) < 1e-5
    assert head.stats.kl_prcp is None
    # the reference model has the hook too: its own log-probs are those of the policy at the start
    again = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)
    assert trainer.ref_model.forward.__func__.__code__.co_filename.endswith("integrations/trl.py")
    trainer.compute_loss(trainer.model, again)
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(0, abs=1e-6)
