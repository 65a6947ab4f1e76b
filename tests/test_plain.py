"""The plain path: families beyond Qwen's three, and Qwen's own forced onto it."""

from __future__ import annotations

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from papo_fast.cli import main
from papo_fast.config import CorruptionConfig, DataConfig, EvalConfig, ModelConfig
from papo_fast.data.corruption import PromptCorruption
from papo_fast.data.encoder import FAMILIES, PromptTooLong
from papo_fast.data.prompts import PromptDataset
from papo_fast.errors import InputError
from papo_fast.model.choice import is_plain, load_encoder
from papo_fast.model.plain import BANNED_UNDER_CAP, PlainPolicy, check_head
from papo_fast.model.policy import Policy, SharedReference, inference
from papo_fast.parallel import _weights_to_meta
from papo_fast.presets import get_preset
from papo_fast.rewards.scorer import Score
from papo_fast.rollout.engines import make_engine
from papo_fast.samples import Completion, Group, Sample
from support import SUPPORT
from support.in_float64 import logprobs_in_float64
from support.plain_checkpoints import PLAIN, write_plain_checkpoint
from support.ranks import launch
from support.small_runs import both_streams, png, run, small

DATA = DataConfig(min_pixels=56 * 56, max_pixels=112 * 112, prompt_suffix="", max_prompt_length=512)
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in PLAIN]
# One of each way to lay out pictures. They are trained as PAPO; the other families, which share
# their code, by the command, so that `make test` trains each once and `make test-all` in both ways.
KINDS = ("gemma3", "internvl", "smolvlm", "qwen3_5_moe", "glm4v")


def often(names):
    """All families, of which `make test` runs these."""
    rare = [pytest.mark.slow, pytest.mark.exhaustive]
    return [pytest.param(n, marks=rare if n not in names else pytest.mark.slow) for n in PLAIN]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    made = {}

    def of(name):
        if name not in made:
            made[name] = write_plain_checkpoint(folder / name, name)
        return made[name]

    return of


def loaded(path, forward="auto"):
    """Encoder and policy of a checkpoint, in float32."""
    model = ModelConfig(path=str(path), dtype="float32", forward=forward)
    encoder = load_encoder(model, DATA)
    kind = Policy if type(encoder).__name__ == "PromptEncoder" else PlainPolicy
    return encoder, kind.load(model, encoder.banned_token_ids, torch.device("cpu"))


def groups_of(encoder, questions, corruption=None, count=3):
    """Groups of two responses of unequal length to the first questions, with corrupted pictures."""
    corrupt = PromptCorruption(corruption or CorruptionConfig(), encoder)
    data = PromptDataset(str(questions), DATA, encoder)
    prompts = [data[i] for i in range(count)]
    made = []
    for i, prompt in enumerate(prompts):
        ids = [[65 + i, 66, 67, 68, 69], [70, 71 + i]]
        samples = [Sample(Completion(x, [0.0] * len(x), True)) for x in ids]
        made.append(Group(prompt, samples, aug_pixels=corrupt(prompt, 7 + i)))
    return made


def own_logprobs(path, encoder, groups, pixels_of):
    """log-probs of all response tokens by the family's own forward, one sequence at a time."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    for group in groups:
        prompt = group.prompt.encoded
        for sample in group.samples:
            response = torch.tensor(sample.completion.token_ids)
            inputs = {"input_ids": torch.cat([prompt.input_ids, response])[None]}
            n = inputs["input_ids"].shape[1]
            for name, value in getattr(prompt, "tokens", {}).items():
                inputs[name] = torch.zeros(1, n, dtype=torch.int64)
                inputs[name][:, : value.shape[1]] = value
            if prompt.pixel_values is not None:
                inputs |= prompt.pictures | {"pixel_values": pixels_of(group)}
            if "mm_token_type_ids" in inputs and path.name not in MROPE:
                del inputs["mm_token_type_ids"]
            with torch.no_grad():
                logits = model(**inputs).logits[0].float()
            logits[:, encoder.banned_token_ids] = -1e9
            rows = logits[len(prompt) - 1 : n - 1].log_softmax(-1)
            found.append(rows.gather(1, response[:, None])[:, 0])
    return torch.cat(found)


MROPE = ("qwen3_5", "qwen3_5_moe", "qwen3_vl_moe", "glm4v", "glm4v_moe")


@pytest.mark.parametrize("name", SLOW)
def test_statistics_are_those_of_the_familys_own_logits(name, tiny, questions):
    encoder, policy = loaded(tiny(name), "plain")
    groups = groups_of(encoder, questions)
    with inference(policy):
        full = policy.stats(policy.pack(groups))[0].logprobs
        both = policy.stats(policy.pack(groups, aug=True))[0]
    own = own_logprobs(tiny(name), encoder, groups, lambda g: g.prompt.encoded.pixel_values)
    torch.testing.assert_close(full, own, atol=1e-5, rtol=1e-5)
    aug = own_logprobs(tiny(name), encoder, groups, lambda g: g.aug_pixels)
    torch.testing.assert_close(both.aug_logprobs, aug, atol=1e-5, rtol=1e-5)
    # the third question has no picture; of those with one the corrupted stream differs
    differs = (both.aug_logprobs - both.logprobs).abs().split([7, 7, 7])
    assert differs[0].max() > 1e-3 and differs[1].max() > 1e-3 and differs[2].max() < 1e-5


def gradients(policy, *batches):
    policy.zero_grad(set_to_none=True)
    for groups in batches:
        stats = policy.stats(policy.pack(groups, aug=True))[0]
        loss = stats.logprobs.sum() - 0.1 * stats.kl_prcp.sum() + 0.2 * stats.aug_entropy.sum()
        loss.backward()
    return {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, most=1e-5):
    """To `most` of each weight's largest; some are 0, as of a bias that a softmax undoes."""
    assert ours.keys() == theirs.keys() and len(ours) > 20
    least = 1e-2 * max(grad.abs().max() for grad in theirs.values())
    for name, grad in ours.items():
        scale = theirs[name].abs().max().clamp(min=least)
        worst = (grad - theirs[name]).abs().max() / scale
        assert worst < most, (name, worst)


@pytest.mark.parametrize("name", often(KINDS))
def test_gradients_of_a_batch_are_those_of_one_sequence_after_the_other(name, tiny, questions):
    encoder, policy = loaded(tiny(name), "plain")
    groups = groups_of(encoder, questions)
    alone = [
        [dataclasses.replace(group, samples=[sample])]
        for group in groups
        for sample in group.samples
    ]
    policy.train()
    assert_same_gradients(gradients(policy, groups), gradients(policy, *alone))


@pytest.mark.parametrize("name", often(KINDS))
def test_a_batch_of_text_alone_can_run_the_vision_tower(name, tiny, questions):
    """As processes have to that share its weights; nothing else may change."""
    encoder, policy = loaded(tiny(name), "plain")
    groups = groups_of(encoder, questions)
    text = groups[2]
    assert not text.prompt.encoded.has_pictures
    policy.train()
    without = gradients(policy, [text])
    policy.always_run_vision = True
    with pytest.raises(ValueError, match="no stand_in"):
        policy.pack([text])
    policy.stand_in = encoder.one_picture
    including = gradients(policy, [text])
    assert_same_gradients({n: including[n] for n in without}, without)
    tower = including.keys() - without.keys()
    assert any("vis" in n for n in tower)
    assert not any(including[n].any() for n in tower)
    batch = policy.pack([text], aug=True)
    assert [len(s["input_ids"]) for s in batch.streams] == [3, 3]
    assert len(policy.pack(groups).streams[0]["input_ids"]) == 6  # they have pictures


@pytest.fixture
def with_pictures(tmp_path):
    """A file of six rows, each with a picture wide or high enough that tiles are cut."""
    rows = [
        {"problem": "What?", "answer": str(i), "images": [png(i, ((64, 64), (120, 50))[i % 2])]}
        for i in range(6)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


def command(path, data, out, *more):
    """`papo-fast train grpo` on this model, two steps of four prompts."""
    return [
        *("train", "grpo", "--model.path", str(path), "--data.train", str(data)),
        *("--out", str(out), "--device", "cpu", "--model.dtype", "float32"),
        *("--data.min-pixels", "3136", "--data.max-pixels", "12544", "--reward.workers", "1"),
        *("--rollout.prompts", "4", "--rollout.group-size", "3", "--rollout.max-new-tokens", "6"),
        *("--train.steps", "2", "--train.update-prompts", "2", "--train.max-tokens", "400"),
        *more,
    ]


@pytest.mark.parametrize("name", often([n for n in PLAIN if n not in KINDS]))
def test_the_command_trains_every_family(name, tiny, with_pictures, tmp_path):
    assert main(command(tiny(name), with_pictures, tmp_path)) == 0
    [metrics] = tmp_path.glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(rows) == 2 and all(row["bad_updates"] == 0 for row in rows)
    # the sampler's log-probs are those of the policy that is scored
    assert all(row["sampler_mismatch"] < 1e-4 for row in rows)


@pytest.mark.parametrize("name", often(KINDS))
def test_papo_trains_each_family_and_its_model_is_read_back(name, tiny, questions, tmp_path):
    config = small(both_streams(get_preset("papo-g-7b")), tiny(name), questions, tmp_path)
    config = dataclasses.replace(config, eval=EvalConfig(samples=1, limit=3))
    folder, rows, summary = run(config)
    assert len(rows) == 2 and "accuracy_after_corrupted" in summary
    for row in rows:
        assert row["bad_updates"] == 0 and row["grad_norm"] > 0
        assert row["kl_prcp"] > 1e-5 and row["sampler_mismatch"] < 1e-4
    before = loaded(tiny(name))[1].state_dict()
    encoder, policy = loaded(folder / "model")
    moved = [n for n, v in policy.state_dict().items() if not torch.equal(v, before[n])]
    assert any("lm_head" in n or "embed" in n for n in moved)
    assert any(("vision" in n or "visual" in n) and "weight" in n for n in moved)
    groups = groups_of(encoder, questions)
    with inference(policy):
        once = policy.stats(policy.pack(groups))[0].logprobs
    policy.save(tmp_path / "again")
    encoder.save_pretrained(tmp_path / "again")
    again_encoder, again = loaded(tmp_path / "again")
    with inference(again):
        twice = again.stats(again.pack(groups_of(again_encoder, questions)))[0].logprobs
    torch.testing.assert_close(once, twice, atol=0, rtol=0)
    assert again_encoder.banned_token_ids == encoder.banned_token_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_both_paths_agree(name, tiny, checkpoints, questions):
    """On the families that have both: statistics and gradients."""
    path = checkpoints.get(name) or tiny(name)
    found, exact = {}, {}
    for forward in ("fast", "plain"):
        encoder, policy = loaded(path, forward)
        assert type(policy) is {"fast": Policy, "plain": PlainPolicy}[forward]
        groups = groups_of(encoder, questions)
        with inference(policy):
            stats = policy.stats(policy.pack(groups, aug=True))[0]
        found[forward] = encoder, groups, stats, gradients(policy, groups)
        if not name.startswith("qwen3_5") and "moe" not in name:  # float32 alone, in part
            exact[forward] = logprobs_in_float64(policy, policy.pack(groups), 1.0)
    (encoder, groups, fast, of_fast), (other, others, plain, of_plain) = found.values()
    assert encoder.banned_token_ids == other.banned_token_ids
    for ours, theirs in zip(groups, others, strict=True):
        assert torch.equal(ours.prompt.encoded.input_ids, theirs.prompt.encoded.input_ids)
        for a, b in (
            (ours.aug_pixels, theirs.aug_pixels),
            (ours.prompt.encoded.pixel_values, theirs.prompt.encoded.pixel_values),
        ):
            assert a is b is None or torch.equal(a, b)
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    if exact:
        torch.testing.assert_close(exact["fast"], exact["plain"], atol=1e-12, rtol=0)
        torch.testing.assert_close(exact["fast"].float(), fast.logprobs, atol=1e-5, rtol=1e-5)
    # of 9e-6 on one machine; chunks of linear attention round, and test_packing.py has float64
    assert_same_gradients(of_plain, of_fast, most=3e-5 if "qwen3_5" in name else 1e-5)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_hybrids_agree_with_adapters_a_reference_and_a_frozen_stream(name, tiny, questions):
    """All that a step asks of a policy, with layers that run again in the backward."""
    pytest.importorskip("peft", reason="pip install -e '.[lora]'")
    assert not is_plain(ModelConfig(path=str(tiny(name))))
    found = []
    for forward, kind in (("fast", Policy), ("plain", PlainPolicy)):
        model = ModelConfig(path=str(tiny(name)), dtype="float32", forward=forward, lora_rank=2)
        encoder = load_encoder(model, DATA)
        policy = kind.load(model, encoder.banned_token_ids, torch.device("cpu")).train()
        adapters = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
        torch.manual_seed(3)
        for weight in adapters.values():
            torch.nn.init.normal_(weight, std=0.1)
        groups = groups_of(encoder, questions)
        stats, kl = policy.stats(
            policy.pack(groups),
            frozen_aug=policy.pack(groups, full=False, aug=True),
            kl_to=SharedReference(policy),
        )
        assert policy.model.model.language_model.layers[0].gradient_checkpointing
        assert kl.min() > 1e-3 and stats.kl_prcp.max() > 1e-3
        loss = stats.logprobs.sum() - 0.1 * stats.kl_prcp.sum() + 0.2 * kl.sum()
        of_loss = torch.autograd.grad(loss, list(adapters.values()))
        found.append(([*stats, kl], dict(zip(adapters, of_loss, strict=True))))
    (fast, of_fast), (plain, of_plain) = found
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert any("linear_attn" in n for n in of_fast)
    assert_same_gradients(of_plain, of_fast, most=1e-4)  # float32 rounds here more than there


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("florence2", "it is an encoder and a decoder"),
        ("chameleon", "it reads pictures as codes"),
        ("deepseek_vl_hybrid", "writes pictures as two tensors"),
        ("gpt2", "model; supported are"),
    ],
)
def test_a_family_that_cannot_work_is_refused_by_name(family, why, tmp_path):
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": family}))
    with pytest.raises(InputError, match=f"{family}.*{why}"):
        load_encoder(ModelConfig(path=str(tmp_path)), DATA)


def test_the_fast_path_cannot_be_forced_on_others(tiny):
    with pytest.raises(InputError, match=r"takes qwen2_vl, .*--model\.forward auto"):
        load_encoder(ModelConfig(path=str(tiny("gemma3")), forward="fast"), DATA)


def test_a_too_long_prompt_names_the_options_that_help_where_max_pixels_may_not(tiny):
    encoder = load_encoder(ModelConfig(path=str(tiny("gemma3"))), DATA)
    encoder.max_prompt_length = 20
    with pytest.raises(PromptTooLong, match=r"raise --data\.max-prompt-length or give smaller"):
        encoder.encode("x" * 30, [])


def test_logits_that_are_not_the_heads_are_refused(tiny):
    """A model that caps its logits by a name that nothing here knows."""
    model = AutoModelForImageTextToText.from_pretrained(tiny("internvl"), dtype=torch.float32)
    check_head(model)
    model.config.text_config.final_logit_softcapping = 30.0  # its forward does not look at it
    with pytest.raises(InputError, match=r"internvl.*capped at 30\.0 and scaled by 1\.0"):
        check_head(model)


@pytest.mark.parametrize("setting", ["final_logit_softcapping", "logit_scale"])
def test_caps_and_scales_of_the_logits_are_part_of_the_statistics(setting, tiny, questions):
    """No family above has one, so a model is given it; its own logits show what is meant."""
    encoder, policy = loaded(tiny("internvl"), "plain")
    groups = groups_of(encoder, questions)
    with inference(policy):
        batch = policy.pack(groups)
        hidden = policy._hidden(batch)[0]
        policy._cap, policy._scale = (5.0, 1.0) if "cap" in setting else (None, 0.25)
        if policy._cap:
            policy.banned_V[policy.banned_V < 0] = BANNED_UNDER_CAP
        got = policy.stats(batch)[0]
    logits = (policy._scale * hidden @ policy.model.lm_head.weight.T).double()
    if policy._cap:
        logits = policy._cap * (logits / policy._cap).tanh()
    logits[:, encoder.banned_token_ids] = -torch.inf
    log = logits.log_softmax(-1)
    want = log.gather(1, batch.targets_N[:, None])[:, 0]
    torch.testing.assert_close(got.logprobs.double(), want, atol=1e-5, rtol=1e-5)
    entropy = -torch.special.xlogy(log.exp(), log.exp()).sum(-1)
    torch.testing.assert_close(got.entropy.double(), entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gemma3", "no token of a picture see"),
        ("glm4v_moe", "its experts compute something else"),
        ("internvl", "keeps the old head"),
    ],
)
def test_vllm_is_refused_where_it_does_not_sample_from_the_policy(name, why, tiny, tmp_path):
    config = small(get_preset("grpo"), tiny(name), "", tmp_path)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine="vllm"))
    encoder, policy = loaded(tiny(name))
    with pytest.raises(InputError, match=f"{why}.*rollout.engine hf"):
        make_engine(config, policy, encoder, tmp_path)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl_moe"])
def test_a_sampler_is_told_the_shapes_that_it_gets(name, tiny):
    """Under the names of published checkpoints, which are not those of the model in memory."""
    _, policy = loaded(tiny(name))
    got = {name: tuple(weight.shape) for name, weight in policy.whole_weights()}
    assert list(policy.whole_shapes()) == list(got.items())
    in_memory = {n: tuple(p.shape) for n, p in policy.model.named_parameters()}
    assert got != in_memory and got.keys() & in_memory.keys()


def test_weights_that_two_layers_share_stay_one_without_values(tiny):
    """Else one process gathers one weight more than the others."""
    model = AutoModelForImageTextToText.from_pretrained(tiny("internvl"), dtype=torch.float32)
    names = [n for n, _ in model.named_parameters()]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    _weights_to_meta(model)
    model.to("meta")
    assert [n for n, p in model.named_parameters() if p.is_meta] == names
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "smolvlm", "qwen3_5_moe"])
def test_adapters_and_a_frozen_tower(name, tiny, questions):
    pytest.importorskip("peft", reason="pip install -e '.[lora]'")
    model = ModelConfig(path=str(tiny(name)), dtype="float32", forward="plain")
    encoder = load_encoder(model, DATA)
    bans = encoder.banned_token_ids
    for vision in (True, False):
        settings = dataclasses.replace(model, lora_rank=2, train_vision=vision)
        policy = PlainPolicy.load(settings, bans, torch.device("cpu"))
        got = gradients(policy, groups_of(encoder, questions))
        assert got and all("lora" in n for n in got)
        assert any("vis" in n for n in got) == vision
    frozen = dataclasses.replace(model, train_vision=False)
    policy = PlainPolicy.load(frozen, bans, torch.device("cpu"))
    got = gradients(policy, groups_of(encoder, questions))
    assert got and not any("vis" in n or "project" in n or "connector" in n for n in got)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("internvl", PlainPolicy), ("qwen3_5", Policy)])
def test_two_ranks_train_as_one(name, kind, tiny, questions, tmp_path):
    """Sharded, each rank runs its share of the padded sequences, or of the trees.

    In two of the updates one of the ranks has text alone.
    """
    path = tiny(name)
    config = small(both_streams(get_preset("papo-g-7b")), path, questions, tmp_path)
    encoder = load_encoder(config.model, config.data)
    groups = groups_of(encoder, questions, count=6)
    for i, sample in enumerate(s for group in groups for s in group.samples):
        sample.advantage = 0.5 * (i % 3) - 0.4
        sample.score = Score(0.0, 0.0, 0.0, False)
    job = {
        "config": config,
        "groups": groups,
        "bans": encoder.banned_token_ids,
        "kind": kind,
        "stand_in": getattr(encoder, "one_picture", None),
    }
    torch.save(job, tmp_path / "job.pt")
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"ranks{ranks}"
        launch(ranks, [str(SUPPORT / "parallel_worker.py"), str(tmp_path / "job.pt"), str(out)])
        weights = load_file(out / "model.safetensors")
        found.append((weights, torch.load(out / "rows.pt", weights_only=False)))
    (alone, rows), (sharded, of_two) = found
    assert len(rows) == 3
    for one, two in zip(rows, of_two, strict=True):
        assert one["kl_prcp"] == pytest.approx(two["kl_prcp"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    before = load_file(path / "model.safetensors")
    for name, weight in alone.items():
        step = (weight - before[name]).abs().max()
        assert (weight - sharded[name]).abs().max() <= 0.05 * step + 1e-6, name
