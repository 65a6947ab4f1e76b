"""What verl and EasyR1 call: the authors' numbers, whole logits, and the published signatures."""

import inspect
import json
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

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
    with pytest.raises(InputError, match="reduction"):
        verl.linear_cross_entropy(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1).long(), 1.0,
                                  "mean")  # fmt: skip
    with pytest.raises(InputError, match="one of them says what is scored"):
        verl.forward_with_token_stats(torch.nn.Linear(1, 1))
