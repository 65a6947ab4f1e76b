"""What verl and EasyR1 call: the authors' numbers, whole logits, and the published signatures."""

import inspect
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen3MoeConfig, Qwen3MoeForCausalLM

from papo_fast.config import ObjectiveConfig
from papo_fast.errors import InputError
from papo_fast.integrations import verl
from papo_fast.rewards.shaping import group_advantages
from support.family_checkpoints import FAMILIES, write_checkpoint
from support.golden import AVERAGE, GOLDEN, TOLERANCE, official_config, relative_error

INTERFACES = json.loads((Path(__file__).parent / "data" / "verl_interfaces.json").read_text())
THEIR_AVERAGE = {  # config.average → both projects' names of it
    "token": ("token-mean", "token"),
    "sequence": ("seq-mean-token-mean", "seq"),
}


def golden_inputs(case):
    inputs = {
        name: torch.tensor(x, dtype=torch.float64 if name.endswith(("probs", "rewards")) else None)
        for name, x in case["inputs"].items()
    }
    advantages_B = group_advantages(inputs["rewards"], inputs["group_ids"], "grpo")
    mask = inputs["response_mask"]
    return inputs, advantages_B[:, None] * mask


@pytest.mark.parametrize("project", [0, 1], ids=["verl", "EasyR1"])
@pytest.mark.parametrize("name", GOLDEN)
def test_the_loss_and_its_gradients_are_the_authors(name, project):
    case = GOLDEN[name]
    inputs, advantages = golden_inputs(case)
    new, aug = (inputs[k].clone().requires_grad_() for k in ("logprobs", "aug_logprobs"))
    loss, metrics = verl.papo_loss(
        inputs["old_logprobs"],
        new,
        advantages,
        inputs["response_mask"],
        THEIR_AVERAGE[AVERAGE[case["config"]["avg"]]][project],
        official_config(case["config"]),
        ref_log_prob=inputs["ref_logprobs"],
        aug_log_prob=aug,
        correct=inputs["rewards"] > 0.5,
    )
    loss.backward()
    expected = case["expected"]
    errors = {"loss": relative_error(loss.detach(), torch.tensor(expected["loss"]).double())}
    for theirs, ours in (("pg_loss", "pg_loss"), ("kl_prcp", "kl_prcp"), ("kl_loss", "kl_ref")):
        if theirs in expected:
            value = torch.tensor(metrics[f"actor/{ours}"]).double()
            errors[theirs] = relative_error(value, torch.tensor(expected[theirs]).double())
    for leaf, tensor in (("logprobs", new), ("aug_logprobs", aug)):
        theirs = expected[f"grad_{leaf}"]
        if theirs is None:
            assert tensor.grad is None
        else:
            errors[leaf] = relative_error(tensor.grad, torch.tensor(theirs).double())
    assert max(errors.values()) <= TOLERANCE, errors


def test_micro_batches_on_several_ranks_add_up_to_the_whole_batch():
    """verl's way: global denominators in each micro-batch, gradients averaged over dp_size."""
    case = GOLDEN["papo_g_7b"]
    inputs, advantages = golden_inputs(case)
    goal = ObjectiveConfig(
        parity="paper", kl_prcp_coef=0.02, entropy_coef=0.05, aug_entropy_coef=0.05
    )

    def loss(rows, mode, **denominators):
        names = ("old_logprobs", "logprobs")
        return verl.papo_loss(
            *(inputs[n][rows] for n in names),
            advantages[rows],
            inputs["response_mask"][rows],
            mode,
            goal,
            ref_log_prob=inputs["ref_logprobs"][rows],
            aug_log_prob=inputs["aug_logprobs"][rows],
            **denominators,
        )[0]

    sizes = dict(batch_num_tokens=inputs["response_mask"].sum(), global_batch_size=8, dp_size=2)
    for mode in ("token-mean", "seq-mean-token-mean"):
        whole = loss(slice(0, 8), mode)
        parts = [loss(slice(i, j), mode, **sizes) for i, j in ((0, 3), (3, 4), (4, 8))]
        assert sum(parts) / 2 == pytest.approx(whole.item(), rel=1e-9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("verl")


def prompt_with_picture(model, family):
    """(1, 12) ids with a picture of four merged patches, and what the model takes beside them."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 200, (1, 12), generator=generator)
    ids[0, 2:6] = model.config.image_token_id
    vision = model.config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(16, width, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_forward_gives_both_streams_of_whole_logits(folder, family):
    path = write_checkpoint(folder / family, family)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    inputs = prompt_with_picture(model, family)
    aug = 0.3 * inputs["pixel_values"].flip(0)
    with torch.no_grad():
        p, q = (
            (model(**{**inputs, "pixel_values": x}).logits / 0.7).double().log_softmax(-1)
            for x in (inputs["pixel_values"], aug)
        )
    successors = inputs["input_ids"].roll(-1, -1)[..., None]
    expected = {
        "log_probs": p.gather(-1, successors)[..., 0],
        "entropy": -(p.exp() * p).sum(-1),
        "aug_log_probs": q.gather(-1, successors)[..., 0],
        "aug_entropy": -(q.exp() * q).sum(-1),
        "kl_prcp": (p.exp() * (p - q)).sum(-1),
    }
    model.forward = types.MethodType(verl.forward_with_token_stats, model)
    out = model(**inputs, temperature=0.7, aug_pixel_values=aug, use_cache=False, return_dict=True)
    for name, theirs in expected.items():
        assert torch.allclose(out[name].double(), theirs, atol=1e-5), name
    assert expected["kl_prcp"].mean() > 1e-3
    out.kl_prcp.sum().backward()
    assert model.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0
    # the actor's slice is that of the response
    assert torch.equal(out.log_probs[:, -5 - 1 : -1].double() > -1e9, torch.ones(1, 5).bool())


def model_and_inputs(folder, family):
    path = write_checkpoint(folder / family, family)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    return model, prompt_with_picture(model, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_without_token_types_are_refused_in_every_family(folder, family):
    """Qwen2.5-VL by itself takes picture tokens for text and says nothing."""
    model, inputs = model_and_inputs(folder, family)
    expected = model(**inputs).logits.log_softmax(-1)
    model.forward = types.MethodType(verl.forward_with_token_stats, model)
    grid, types_ = inputs["image_grid_thw"], inputs.pop("mm_token_type_ids")
    with pytest.raises(InputError, match="mm_token_type_ids is missing next to pixel_values"):
        model(**inputs)
    text = torch.arange(12)[None]
    with pytest.raises(InputError, match="mm_token_type_ids"):  # positions of text alone
        model(**inputs, position_ids=text)
    # verl and EasyR1 hand over the positions themselves
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], image_grid_thw=grid, mm_token_type_ids=types_
    )
    out = model(**inputs, position_ids=positions)
    successors = inputs["input_ids"].roll(-1, -1)[..., None]
    assert torch.allclose(out.log_probs, expected.gather(-1, successors)[..., 0], atol=1e-5)
    assert not torch.equal(positions[0], text)
    model(input_ids=inputs["input_ids"][:, :2])  # text needs none


def test_labels_of_a_sequence_that_ulysses_splits_come_from_the_actor(folder, monkeypatch):
    model, inputs = model_and_inputs(folder, "qwen2_vl")
    p = model(**inputs).logits.log_softmax(-1)
    model.forward = types.MethodType(verl.forward_with_token_stats, model)
    # a part's own successors are wrong in its last place, whose true one is on the next rank
    successors = torch.cat([inputs["input_ids"][:, 1:], torch.tensor([[77]])], 1)
    ulysses = types.SimpleNamespace(get_ulysses_sequence_parallel_world_size=lambda: 2)
    monkeypatch.setitem(sys.modules, "verl.utils.ulysses", ulysses)
    with pytest.raises(InputError, match="shift_labels is missing: 2 ranks"):
        model(**inputs)
    with pytest.raises(InputError, match="shift_labels is missing"):
        model(**inputs, labels=inputs["input_ids"])
    out = model(**inputs, shift_labels=successors)
    expected = p.gather(-1, successors[..., None])[..., 0]
    assert torch.allclose(out.log_probs, expected, atol=1e-5)
    with pytest.raises(InputError, match=r"labels have shape \(12,\): expected \(1, 12\)"):
        model(**inputs, shift_labels=successors[0])


def test_the_forward_of_an_adapted_model_is_set_on_its_base_model(folder):
    peft = pytest.importorskip("peft", reason="peft is missing: pip install '.[lora]'")
    model, inputs = model_and_inputs(folder, "qwen2_5_vl")
    plain = model(**inputs).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    logits = adapted(**inputs).logits
    assert (logits - plain).abs().max() > 0.1
    with pytest.raises(InputError, match=r"peft's wrapper: pass model.get_base_model\(\)"):
        verl.forward_with_token_stats(adapted, **inputs)
    base = adapted.get_base_model()
    base.forward = types.MethodType(verl.forward_with_token_stats, base)
    out = adapted(**inputs)
    successors = inputs["input_ids"].roll(-1, -1)[..., None]
    expected = logits.log_softmax(-1).gather(-1, successors)[..., 0]
    assert torch.allclose(out.log_probs, expected, atol=1e-5)
    out.log_probs.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in adapted.parameters())


def test_models_with_a_router_loss_are_refused():
    sizes = dict(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    ids = torch.arange(6)[None]
    expected = model(input_ids=ids).logits.log_softmax(-1)
    out = verl.forward_with_token_stats(model, ids)
    scored = expected.gather(-1, ids.roll(-1, -1)[..., None])[..., 0]
    assert torch.allclose(out.log_probs, scored, atol=1e-5)
    with pytest.raises(InputError, match="returns router logits"):
        verl.forward_with_token_stats(model, ids, output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(InputError, match="returns router logits"):
        verl.forward_with_token_stats(model, ids)


def test_metrics_of_a_micro_batch_without_counted_tokens_are_numbers():
    x = torch.randn(2, 3, requires_grad=True)
    arguments = [x.detach(), x, x.detach(), torch.zeros(2, 3), "token-mean"]
    goal = ObjectiveConfig(parity="official", entropy_coef=0.1, aug_entropy_coef=0.1)
    others = dict(ref_log_prob=x.detach(), aug_log_prob=x.detach(), batch_num_tokens=7)
    loss, metrics = verl.papo_loss(*arguments, goal, **others, global_batch_size=4)
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()
    assert metrics.pop("actor/ratio_max") == metrics.pop("actor/ratio_min") == 1
    assert set(metrics.values()) == {0.0}
    # a rank of no responses at all, too; every rank has the same names
    _, of_none = verl.papo_loss(*(a[:0] for a in arguments[:4]), "token-mean", goal,
                                **{k: v[:0] for k, v in list(others.items())[:2]})  # fmt: skip
    assert set(of_none.values()) == {0.0, 1.0} and metrics.keys() < of_none.keys()


def test_both_functions_are_whole_logits():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 50, (2, 5), generator=generator)
    p = (hidden @ weight.T / 0.5).log_softmax(-1)
    expected = p.gather(-1, labels[..., None])[..., 0], -(p.exp() * p).sum(-1)
    for outputs in (
        verl.linear_cross_entropy(hidden, weight, labels, 0.5, "none"),
        verl.FusedLinearForPPO(chunk_size=512).forward(
            hidden_states=hidden, vocab_weights=weight, input_ids=labels, temperature=0.5
        ),
    ):
        for ours, theirs in zip(outputs, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
        assert outputs[0].requires_grad and outputs[1].requires_grad
    flat = verl.linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), 0.5)
    assert flat[0].shape == (10,)
    # as Megatron has them
    states, row = hidden.reshape(10, 1, 8), labels.reshape(1, 10)
    for given in (states, row), (hidden, labels.flatten()):
        logprobs, _ = verl.linear_cross_entropy(given[0], weight, given[1], 0.5)
        assert logprobs.shape == given[1].shape
        assert torch.allclose(logprobs.flatten(), expected[0].flatten(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("FusedLinearForPPO.forward", verl.FusedLinearForPPO("self").forward),
        ("linear_cross_entropy", verl.linear_cross_entropy),
        ("forward_with_torch_backend", verl.forward_with_token_stats),
        ("policy_loss", verl.papo_loss),
    ],
)
def test_arguments_have_the_published_names_order_and_defaults(name, ours):
    published = INTERFACES["verl"][name]["signature"]
    parameters = list(inspect.signature(ours).parameters.values())
    for (theirs, default), parameter in zip(published, parameters, strict=False):
        assert parameter.name == theirs
        if default is not None and theirs != "loss_agg_mode":  # None there: as the config says
            assert parameter.default == default
    assert len(parameters) >= len(published)
    for parameter in parameters[len(published) :]:
        assert parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )


def test_the_averages_have_the_published_names():
    modes = INTERFACES["verl"]["policy_loss"]["modes"]
    modes += INTERFACES["EasyR1"]["compute_policy_loss"]["modes"]
    assert sorted(modes) == sorted(verl.AVERAGES)


def test_bad_input_is_named():
    x = torch.zeros(2, 3)
    mask = torch.ones(2, 3)
    with pytest.raises(InputError, match="loss_agg_mode"):
        verl.papo_loss(x, x, x, mask, "median")
    with pytest.raises(InputError, match="advantages has shape"):
        verl.papo_loss(x, x, x[:, :2], mask, "token-mean")
    with pytest.raises(InputError, match="kl_prcp is missing"):
        verl.papo_loss(x, x, x, mask, "token-mean", ObjectiveConfig(kl_coef=0))
    for views in (dict(margin_coef=0.1), dict(dvrp_sensitivity=0.1)):
        with pytest.raises(InputError, match=r"two corrupted views.*papo_loss takes one view"):
            verl.papo_loss(x, x, x, mask, "token-mean", ObjectiveConfig(kl_coef=0, **views))
    with pytest.raises(InputError, match="reduction"):
        verl.linear_cross_entropy(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1).long(), 1.0,
                                  "mean")  # fmt: skip
    for labels in (torch.zeros(3, 2).long(), torch.zeros(1, 6).long(), torch.zeros(2).long()):
        with pytest.raises(InputError, match=r"labels have shape .*: expected \(2, 3\)"):
            verl.linear_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(5, 4), labels)
    with pytest.raises(InputError, match="one of them says what is scored"):
        verl.forward_with_token_stats(torch.nn.Linear(1, 1))
