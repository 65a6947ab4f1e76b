"""PAPO in EasyR1's actor, on a stand-in with EasyR1's names, arguments and order of calls."""

import inspect
import json
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from papo_fast.data.corruption import PatchCorruption, prompt_seed
from papo_fast.errors import InputError
from papo_fast.integrations.easyr1 import papo_actor
from support import easyr1_stand_in
from support.easyr1_stand_in import DataParallelPPOActor, average_loss
from support.family_checkpoints import write_checkpoint

RECORD = json.loads((Path(__file__).parent / "data" / "verl_interfaces.json").read_text())
COEFFICIENTS = {"kl_prcp_coef": 0.7, "entropy_loss_coef": 0.2, "aug_entropy_loss_coef": 0.3}
SIGNS = {"kl_prcp": -0.7, "entropy": 0.2, "aug_entropy": 0.3}
PROMPT, RESPONSE = 8, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("easyr1") / "model", "qwen2_5_vl")


def actor_of(kind, folder, packed=False, average="token"):
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    config = types.SimpleNamespace(padding_free=packed, ulysses_size=1, loss_avg_mode=average)
    return kind(config, model, actor_optimizer=object())


def batch_of(model, rows=3):
    """Rows of one prompt each, padded left, and responses padded right; the first two are equal
    but for the response."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 200, (rows, PROMPT + RESPONSE), generator=generator)
    ids[1, :PROMPT] = ids[0, :PROMPT]
    ids[:, 3:7] = model.config.image_token_id
    mask = torch.ones_like(ids)
    mask[:, 0], mask[0, -1], mask[2, -2:] = 0, 0, 0
    types_ = (ids == model.config.image_token_id).long()
    grid = torch.tensor([[1, 4, 4]])
    places, _ = model.model.get_rope_index(
        ids, image_grid_thw=grid.repeat(rows, 1), attention_mask=mask, mm_token_type_ids=types_
    )
    one, other = torch.randn(2, 16, 1176, generator=generator)
    pictures = np.empty(rows, dtype=object)
    for i, pixels in enumerate((one, one, other)):
        pictures[i] = {"pixel_values": pixels, "image_grid_thw": grid}
    text = (mask.cumsum(-1) - 1).clamp(min=0)[None]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.cat([text, places]).transpose(0, 1),
        "responses": ids[:, PROMPT:],
        "response_mask": mask[:, PROMPT:],
        "old_log_probs": -5 + 0.1 * torch.randn(rows, RESPONSE, generator=generator),
        "advantages": torch.randn(rows, RESPONSE, generator=generator),
        "multi_modal_inputs": pictures,
    }


def gradients(actor):
    named = actor.actor_module.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


def by_logits(folder, data, average, trained):
    """EasyR1's own loss and PAPO's terms from whole logits, and the gradients of their sum."""
    plain = actor_of(DataParallelPPOActor, folder, average=average)
    loss = plain.update_policy(data)["loss"]
    corrupt = PatchCorruption.of(AutoImageProcessor.from_pretrained(folder), 0.6)
    black = []
    for ids, mask, its in zip(
        data["input_ids"], data["attention_mask"], data["multi_modal_inputs"], strict=True
    ):
        prompt = ids[:PROMPT][mask[:PROMPT].bool()]
        seed = prompt_seed(0, 0, zlib.crc32(prompt.numpy().tobytes()))
        black.append(corrupt(its["pixel_values"], its["image_grid_thw"], seed))
    assert torch.equal(black[0], black[1]) and not torch.equal(black[0], black[2])
    real = [its["pixel_values"] for its in data["multi_modal_inputs"]]
    streams = []
    for pixels in (real, black):
        logits = plain.actor_module(
            input_ids=data["input_ids"],
            attention_mask=data["attention_mask"],
            position_ids=data["position_ids"].transpose(0, 1),
            pixel_values=torch.cat(pixels),
            image_grid_thw=torch.tensor([[1, 4, 4]] * 3),
        ).logits
        streams.append((logits[:, -RESPONSE - 1 : -1] / 0.7).log_softmax(-1))
    p, q = streams
    if not trained:
        q = q.detach()
    values = {
        "kl_prcp": (p.exp() * (p - q)).sum(-1),
        "entropy": -(p.exp() * p).sum(-1),
        "aug_entropy": -(q.exp() * q).sum(-1),
    }
    terms = {k: average_loss(x, data["response_mask"], mode=average) for k, x in values.items()}
    added = sum(SIGNS[k] * x for k, x in terms.items())
    added.backward()
    return loss + added.item(), terms, gradients(plain)


@pytest.mark.parametrize(
    ("average", "aug"), [("token", "frozen"), ("token", "trained"), ("seq", "frozen")]
)
def test_the_terms_are_those_of_whole_logits(folder, average, aug):
    ours = actor_of(
        papo_actor(DataParallelPPOActor, **COEFFICIENTS, aug=aug), folder, average=average
    )
    data = batch_of(ours.actor_module)
    loss, terms, expected = by_logits(folder, data, average, aug == "trained")
    own = easyr1_stand_in.compute_policy_loss
    metrics = ours.update_policy(data)
    assert easyr1_stand_in.compute_policy_loss is own  # EasyR1's other actors have theirs
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    for name, term in terms.items():
        assert metrics[name] == pytest.approx(term.item(), rel=1e-4)
    assert abs(SIGNS["kl_prcp"] * metrics["kl_prcp"]) > 1e-3
    found = gradients(ours)
    assert found.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, g in expected.items():
        assert (found[name] - g).abs().max() < 2e-5 * largest, name


def test_without_settings_the_loss_is_the_actors_own(folder):
    ours = actor_of(papo_actor(DataParallelPPOActor), folder)
    plain = actor_of(DataParallelPPOActor, folder)
    data = batch_of(plain.actor_module)
    counted = data["response_mask"].bool()
    log_probs = ours.compute_log_prob(data)
    assert torch.allclose(log_probs[counted], plain.compute_log_prob(data)[counted], atol=1e-5)
    assert not log_probs[~counted].any()
    mine, theirs = (actor.update_policy(data) for actor in (ours, plain))
    assert mine == pytest.approx(theirs, rel=1e-5)
    expected, found = gradients(plain), gradients(ours)
    largest = max(g.abs().max() for g in expected.values())
    assert max((found[k] - g).abs().max() for k, g in expected.items()) < 1e-5 * largest


def test_a_packed_row_has_the_statistics_of_the_padded_one(folder):
    """One row alone: several need flash-attn, which bench/peers/easyr1.sh has a stand-in for."""
    kind = papo_actor(DataParallelPPOActor, **COEFFICIENTS)
    padded, packed = actor_of(kind, folder), actor_of(kind, folder, packed=True)
    row = {k: v[2:] for k, v in batch_of(padded.actor_module).items()}
    one, other = padded.update_policy(row), packed.update_policy(row)
    assert other == pytest.approx(one, rel=1e-5)
    largest = max(g.abs().max() for g in gradients(padded).values())
    for name, g in gradients(padded).items():
        assert (gradients(packed)[name] - g).abs().max() < 1e-5 * largest, name


def test_a_dataset_may_bring_its_own_corrupted_pictures(folder):
    ours = actor_of(papo_actor(DataParallelPPOActor, kl_prcp_coef=0.7), folder)
    data = batch_of(ours.actor_module)
    rows = data["multi_modal_inputs"]
    equal = [{**its, "aug_pixel_values": its["pixel_values"]} for its in rows]
    before = ours.compute_log_prob(data)
    data["multi_modal_inputs"] = np.array(equal, dtype=object)
    assert torch.equal(ours.compute_log_prob(data), before)  # one stream: they are left alone
    assert ours.update_policy(data)["kl_prcp"] == pytest.approx(0, abs=1e-6)
    data["multi_modal_inputs"] = rows
    assert ours.update_policy(data)["kl_prcp"] > 1e-3


def test_what_cannot_work_is_refused(folder):
    with pytest.raises(InputError, match=r"papo_actor\.kl_coef is unknown: expected one of kl_prc"):
        papo_actor(DataParallelPPOActor, kl_coef=0.1)
    with pytest.raises(InputError, match=r"papo_actor\.aug is 'live': expected frozen or trained"):
        papo_actor(DataParallelPPOActor, aug="live")
    ours = actor_of(papo_actor(DataParallelPPOActor, kl_prcp_coef=0.7), folder)
    data = batch_of(ours.actor_module)
    data["multi_modal_inputs"] = np.array([{}, {}, {}], dtype=object)
    with pytest.raises(InputError, match="a micro-batch has no picture"):
        ours.update_policy(data)


def test_the_stand_in_has_the_published_arguments():
    """The stand-in leaves out what the hook hands through; what it has is there, in that order."""
    for name, published in RECORD["EasyR1"]["signatures"].items():
        thing = easyr1_stand_in
        for part in name.split("."):
            thing = getattr(thing, part)
        found = list(inspect.signature(thing).parameters)
        assert found == [x for x in published if x in found], name
