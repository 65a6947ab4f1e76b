"""PAPO by verl's `model.external_lib`, on stand-ins with the signatures of verl 0.9.1."""

import functools
import importlib
import inspect
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from papo_fast.errors import InputError
from papo_fast.integrations.processor import load_processor
from papo_fast.integrations.verl import StatsOutput
from support import verl_stand_in
from support.family_checkpoints import write_checkpoint
from support.verl_stand_in import MicroBatch

NAME = "papo_fast.integrations.verl_engine"
RECORD = json.loads((Path(__file__).parent / "data" / "verl_interfaces.json").read_text())
SIGNATURES = RECORD["verl"]["engine"]["signatures"]
COEFFICIENTS = {"kl_prcp_coef": 0.7, "entropy_loss_coef": 0.2, "aug_entropy_loss_coef": 0.3}
SIGNS = {"kl_prcp": -0.7, "entropy": 0.2, "aug_entropy": 0.3}


@pytest.fixture(scope="module")
def engine_module():
    with pytest.MonkeyPatch.context() as patch:
        for name, module in verl_stand_in.modules().items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, NAME, raising=False)
        yield importlib.import_module(NAME)
        sys.modules.pop(NAME)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("verl") / "model", "qwen2_5_vl")


def engine_with(engine_module, folder, **papo):
    processor = load_processor(folder, min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    options = {"impl_backend": "torch", "papo": papo}
    config = types.SimpleNamespace(
        path=str(folder), model=model, hf_config=model.config, use_fused_kernels=True,
        fused_kernel_options=options, get_processor=lambda: processor,
    )  # fmt: skip
    engine = engine_module.PAPOEngine(config, None, None, None)
    engine.initialize()
    return engine


def micro_batch(config):
    """Two responses to one prompt with a picture of 4 × 4 patches, and one to another."""
    generator = torch.Generator().manual_seed(5)

    def text(n):
        return torch.randint(0, 200, (n,), generator=generator)

    image = torch.full((4,), config.image_token_id)
    first, second = (torch.cat([text(2), image, text(n)]) for n in (2, 3))
    prompts, responses = [first, first, second], [text(n) for n in (4, 2, 3)]
    one, other = torch.randn(2, 16, 1176, generator=generator)
    grid = torch.tensor([[1, 4, 4]])
    jagged = functools.partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    return MicroBatch(
        prompts=jagged(prompts),
        responses=jagged(responses),
        input_ids=jagged([torch.cat(pair) for pair in zip(prompts, responses, strict=True)]),
        response_mask=jagged([torch.ones(len(r), dtype=torch.long) for r in responses]),
        advantages=jagged([torch.randn(len(r), generator=generator) for r in responses]),
        multi_modal_inputs=[{"pixel_values": x, "image_grid_thw": grid} for x in (one, one, other)],
        temperature=0.7,
        dp_size=2,
        batch_num_tokens=20,
        global_batch_size=6,
    )


def actor_config(**changes):
    known = dict(loss_agg_mode="token-mean", entropy_coeff=0, global_batch_info={})
    return types.SimpleNamespace(**known | changes)


def loss_by_logits(model, engine, batch, pixels, average, aug_gradient):
    """verl's stand-in loss and PAPO's terms from two passes of whole logits."""
    inputs, _ = verl_stand_in.FSDPEngineWithLMHead.prepare_model_inputs(engine, batch)
    inputs = {k: v for k, v in inputs.items() if k != "temperature"}
    p = (model(**inputs).logits / 0.7).log_softmax(-1)
    with torch.set_grad_enabled(aug_gradient):
        q = (model(**{**inputs, "pixel_values": pixels}).logits / 0.7).log_softmax(-1)
    successors = inputs["input_ids"].roll(-1, -1)[..., None]
    whole = {
        "log_probs": p.gather(-1, successors)[..., 0],
        "kl_prcp": (p.exp() * (p - q)).sum(-1),
        "entropy": -(p.exp() * p).sum(-1),
        "aug_entropy": -(q.exp() * q).sum(-1),
    }
    total = 0
    for i, (prompt, advantage) in enumerate(
        zip(batch["prompts"].unbind(), batch["advantages"].unbind(), strict=True)
    ):
        scored = slice(len(prompt) - 1, len(prompt) - 1 + len(advantage))
        row = -advantage * whole["log_probs"][i, scored]
        row = row + sum(sign * whole[name][i, scored] for name, sign in SIGNS.items())
        total = total + row.sum()
    return total * 2 / {"token-mean": 20, "seq-mean-token-sum": 6}[average]


@pytest.mark.parametrize("aug", ["frozen", "trained"])
@pytest.mark.parametrize("average", ["token-mean", "seq-mean-token-sum"])
def test_the_engine_adds_papos_terms_to_verls_loss(engine_module, folder, average, aug):
    engine = engine_with(engine_module, folder, **COEFFICIENTS, aug=aug)
    batch = micro_batch(engine.module.config)
    config = actor_config(loss_agg_mode=average)
    loss_function = functools.partial(verl_stand_in.ppo_loss, config=config)
    loss, metrics = engine.forward_step(batch, loss_function, forward_only=False)
    loss.backward()
    ours = {name: p.grad for name, p in engine.module.named_parameters() if p.grad is not None}

    pixels = engine.prepare_model_inputs(batch)[0]["aug_pixel_values"]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    expected = loss_by_logits(model, engine, batch, pixels, average, aug == "trained")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    largest = max(g.abs().max() for g in theirs.values())
    for name, g in theirs.items():
        assert (ours[name] - g).abs().max() < 1e-4 * largest, name
    added = sum(SIGNS[name] * metrics[f"actor/{name}"].values[0] for name in SIGNS)
    assert metrics["actor/pg_loss"] + added == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["actor/kl_prcp"].aggregation == "sum" and abs(added) > 1e-3


def test_the_responses_of_a_prompt_see_the_same_corrupted_picture(engine_module, folder):
    engine = engine_with(engine_module, folder, kl_prcp_coef=0.02, corruption_ratio=0.5)
    batch = micro_batch(engine.module.config)
    inputs = engine.prepare_model_inputs(batch)[0]
    changed = (inputs["aug_pixel_values"] != inputs["pixel_values"]).any(-1).view(3, 16)
    assert changed.sum(-1).tolist() == [8, 8, 8]
    assert torch.equal(changed[0], changed[1]) and not torch.equal(changed[0], changed[2])
    assert torch.equal(engine.prepare_model_inputs(batch)[0]["aug_pixel_values"],
                       inputs["aug_pixel_values"])  # fmt: skip
    engine.lr_scheduler.last_epoch = 1  # the next step
    later = engine.prepare_model_inputs(batch)[0]["aug_pixel_values"]
    assert not torch.equal(later, inputs["aug_pixel_values"])
    engine.mode = "eval"  # log-probs before an update, and the reference's
    assert "aug_pixel_values" not in engine.prepare_model_inputs(batch)[0]


def test_a_dataset_may_bring_its_own_corrupted_pictures(engine_module, folder):
    engine = engine_with(engine_module, folder, kl_prcp_coef=0.02)
    batch = micro_batch(engine.module.config)
    for its in batch["multi_modal_inputs"]:
        its["aug_pixel_values"] = its["pixel_values"] / 2
    inputs = engine.prepare_model_inputs(batch)[0]
    assert torch.equal(inputs["aug_pixel_values"], inputs["pixel_values"] / 2)
    engine.mode = "eval"
    assert "aug_pixel_values" not in engine.prepare_model_inputs(batch)[0]


def test_statistics_of_a_packed_batch_lose_their_padding(engine_module, folder):
    engine = engine_with(engine_module, folder, **COEFFICIENTS)
    batch = micro_batch(engine.module.config)
    n = batch["input_ids"].values().numel()
    output = StatsOutput(*(torch.arange(n + 3.0)[None] + 100 * k for k in range(6)))
    found = engine.prepare_model_outputs(output, {"pad_size": 3}, batch, None)
    for k, name in enumerate(("log_probs", "entropy", "aug_log_probs", "aug_entropy", "kl_prcp")):
        if name != "aug_log_probs":
            assert torch.equal(found[name].values(), torch.arange(float(n)) + 100 * k), name
            assert torch.equal(found[name].offsets(), batch["input_ids"].offsets())


def test_without_coefficients_it_is_verls_own_loss(engine_module, folder):
    engine = engine_with(engine_module, folder)
    batch = micro_batch(engine.module.config)
    loss_function = functools.partial(verl_stand_in.ppo_loss, config=actor_config())
    loss, metrics = engine.forward_step(batch, loss_function, forward_only=False)
    assert set(metrics) == {"actor/pg_loss"} and loss.item() == metrics["actor/pg_loss"]
    assert "aug_pixel_values" not in engine.prepare_model_inputs(batch)[0]


def test_the_entropy_alone_needs_no_corrupted_stream(engine_module, folder):
    engine = engine_with(engine_module, folder, entropy_loss_coef=0.5)
    batch = micro_batch(engine.module.config)
    loss_function = functools.partial(verl_stand_in.ppo_loss, config=actor_config())
    loss, metrics = engine.forward_step(batch, loss_function, forward_only=False)
    (entropy,) = metrics["actor/entropy"].values
    assert entropy > 0.1
    assert loss.item() == pytest.approx(metrics["actor/pg_loss"] + 0.5 * entropy, rel=1e-6)
    assert "aug_pixel_values" not in engine.prepare_model_inputs(batch)[0]
    batch["multi_modal_inputs"] = [None] * 3  # and so needs no pictures
    batch["input_ids"] = torch.nested.nested_tensor_from_jagged(
        batch["input_ids"].values() % 200, batch["input_ids"].offsets()
    )
    engine.forward_step(batch, loss_function, forward_only=False)


def test_it_is_registered_for_both_fsdp_backends(engine_module):
    registered = verl_stand_in.EngineRegistry.registered
    for backend in ("fsdp", "fsdp2"):
        engine = registered["language_model", backend, "cuda", "nvidia"]
        assert engine is engine_module.PAPOEngine


def test_what_it_calls_has_the_published_signatures(engine_module):
    """bench/peers/compare_verl.py holds the same record against verl itself."""
    for place, published in SIGNATURES.items():
        module, _, dotted = place.partition(":")
        thing = sys.modules[module]
        for part in dotted.split("."):
            thing = getattr(thing, part)
        assert list(inspect.signature(thing).parameters) == published, place
        name = dotted.rpartition(".")[2]
        if dotted.startswith("FSDPEngineWithLMHead.") and name in engine_module.PAPOEngine.__dict__:
            ours = engine_module.PAPOEngine.__dict__[name]
            assert list(inspect.signature(ours).parameters) == published, name


def test_what_cannot_work_is_refused_by_name(engine_module, folder):
    with pytest.raises(InputError, match=r"papo\.kl_coef is unknown: expected one of kl_prcp_coef"):
        engine_with(engine_module, folder, kl_coef=1)
    with pytest.raises(InputError, match=r"papo\.aug is 'stored': expected frozen or trained"):
        engine_with(engine_module, folder, aug="stored")
    engine = engine_with(engine_module, folder)
    for nothing in (None, {"impl_backend": "torch"}):
        engine.model_config.fused_kernel_options = nothing
        engine.initialize()
        assert engine.papo == engine_module.PAPOSettings()
    engine = engine_with(engine_module, folder, **COEFFICIENTS)
    batch = micro_batch(engine.module.config)
    with pytest.raises(InputError, match="PAPO's terms are added to verl's ppo_loss"):
        engine.forward_step(batch, functools.partial(max), forward_only=False)
    rewarded = functools.partial(verl_stand_in.ppo_loss, config=actor_config(entropy_coeff=0.1))
    with pytest.raises(InputError, match=r"actor\.entropy_coeff = 0\.1 rewards the entropy"):
        engine.forward_step(batch, rewarded, forward_only=False)
    batch["multi_modal_inputs"] = [None] * 3
    with pytest.raises(InputError, match="a micro-batch has no picture"):
        engine.prepare_model_inputs(batch)
    engine.model_config.use_fused_kernels = False
    with pytest.raises(InputError, match="use_fused_kernels is False"):
        engine.initialize()
    engine.model_config.use_fused_kernels = True
    engine.model_config.get_processor = lambda: object()
    with pytest.raises(InputError, match="has no image processor"):
        engine.initialize()


def test_without_verl_the_import_says_what_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    for module in verl_stand_in.modules():
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"imported by verl and needs it.*install verl 0\.9\.1"):
        importlib.import_module(NAME)
