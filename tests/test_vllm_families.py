"""vLLM samples from families beyond Qwen's three as the trainer scores them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from papo_fast.config import CorruptionConfig
from papo_fast.data.corruption import PromptCorruption
from papo_fast.errors import InputError
from papo_fast.rollout.engines import make_engine
from papo_fast.rollout.vllm_requests import RequestFormat, engine_options
from papo_fast.rollout.vllm_serve import server_command
from support.groups import as_prompt
from support.plain_checkpoints import write_plain_checkpoint
from support.vllm_checks import at_hand, needs_vllm, picture, run_alone

pytestmark = pytest.mark.xdist_group("vllm")  # one process, one engine at a time

FAMILY = """
import sys
from pathlib import Path
from support.plain_checkpoints import write_plain_checkpoint
from support.vllm_checks import (
    CPU, at_hand, check_agreement_after_every_sync, check_corrupted_pictures, mixed_prompts,
)
from papo_fast.rollout.vllm import VLLMRollout
from papo_fast.rollout.vllm_server import VLLMServerRollout

folder, name, engine = Path(sys.argv[1]), *sys.argv[2:]
write_plain_checkpoint(folder / "model", name, vllm=True)
config, encoder, policy = at_hand(folder / "model", max_prompt_length=450, engine=engine)
kind, where = (VLLMRollout, CPU) if engine == "vllm" else (VLLMServerRollout, folder)
engine = kind(config, encoder, where)
prompts = mixed_prompts(encoder)
if name == "llava_onevision":
    prompts = prompts[1:]  # the first has two pictures, which it does not cut and vLLM does
check_agreement_after_every_sync(engine, policy, encoder, prompts)
if encoder.tiles is not None:
    check_corrupted_pictures(engine, policy, encoder)
engine.close()
"""
RARE = pytest.mark.exhaustive
FAMILIES = [
    "internvl",
    pytest.param("smolvlm", marks=RARE),
    pytest.param("idefics3", marks=RARE),
    pytest.param("llava_onevision", marks=RARE),
    "glm4v",
]


@needs_vllm
@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_trainer_agree(family, tmp_path):
    run_alone(FAMILY, tmp_path, family, "vllm")


@needs_vllm
@RARE
def test_sampler_and_trainer_agree_over_a_server_too(tmp_path):
    run_alone(FAMILY, tmp_path, "internvl", "vllm_server")


@pytest.mark.parametrize(
    ("family", "part"), [("gemma3", "vision_tower."), ("qwen3_vl_moe", ".experts.")]
)
def test_weights_go_over_as_published_checkpoints_have_them(family, part, tmp_path):
    """Where the model's own are named or laid out otherwise."""
    folder = write_plain_checkpoint(tmp_path, family, vllm=True)
    _, _, policy = at_hand(folder)
    file = load_file(folder / "model.safetensors")
    published = {n.removeprefix("model."): w for n, w in file.items() if part in n}
    sent = {n.removeprefix("model."): w for n, w in policy.whole_weights() if part in n}
    assert sent.keys() == published.keys() and sent
    assert all(torch.equal(weight, published[name]) for name, weight in sent.items())


@pytest.fixture(scope="module")
def internvl(tmp_path_factory):
    """Configuration, encoder and policy of a family whose pictures are tiles."""
    folder = tmp_path_factory.mktemp("tiles") / "model"
    return at_hand(write_plain_checkpoint(folder, "internvl", vllm=True))


def test_vllm_gets_pictures_as_they_came_and_the_text_alone(internvl):
    """Nothing of the processor's: its ids, expanded by hand, are those of the whole prompt."""
    config, encoder, _ = internvl
    images = [picture(1, (100, 60)), picture(2)]
    prompt = encoder.encode("<image> or <image>?", images)
    ids, sent = RequestFormat(encoder).prompt(prompt)
    assert [x.tobytes() for x in sent] == [x.tobytes() for x in images]
    assert ids.count(encoder.image_token_id) == 2
    one = [encoder.tokenizer.convert_tokens_to_ids(t) for t in ("<img>", "</img>")]
    expanded = []
    lengths = [int(n) for n in run_lengths(prompt.mm_token_type_ids.tolist())]
    for token in ids:
        if token == encoder.image_token_id:
            expanded += [one[0], *[token] * lengths.pop(0), one[1]]
        else:
            expanded.append(token)
    assert expanded == prompt.input_ids.tolist()
    # the pixel limits are of another layout
    assert engine_options(config, encoder)["mm_processor_kwargs"] == {"use_fast": False}


def test_where_files_name_no_mean_the_processor_normalises_and_not_the_model(tmp_path):
    """vLLM would look for it in the files alone, and give the model values of 0 to 255."""
    folder = write_plain_checkpoint(tmp_path / "model", "glm4v", vllm=True)
    config, encoder, _ = at_hand(folder)
    command, _ = server_command(config, encoder, "http://node7:8123", "secret")
    assert "--no-mm-device-do-normalize" in command
    # GLM counts the pixels of both frames of a patch
    [size] = json.loads(command[command.index("--mm-processor-kwargs") + 1]).values()
    assert size["shortest_edge"] == 2 * config.data.min_pixels
    file = folder / "preprocessor_config.json"
    named = json.loads(file.read_text()) | {"image_mean": [0.4] * 3, "image_std": [0.3] * 3}
    file.write_text(json.dumps(named))
    assert "mm_device_do_normalize" not in engine_options(config, encoder)


def run_lengths(flags):
    """Lengths of the runs of 1."""
    return [len(run) for run in "".join(map(str, flags)).split("0") if run]


def test_pictures_that_were_corrupted_go_to_vllm_and_tiles_that_were_are_refused(internvl):
    _, encoder, _ = internvl
    image = picture(1, (100, 60))
    prompt = replace(as_prompt(encoder.encode("?", [image])), images=[image])
    format = RequestFormat(encoder)
    raw = PromptCorruption(CorruptionConfig(kind="official", ratio=0.5), encoder)
    corrupted = raw.prompt(prompt, 5)
    _, [sent] = format.prompt(corrupted.encoded)
    [expected] = raw.on_images([image], 5)
    assert sent.tobytes() == expected.tobytes() != image.tobytes()
    tiles = PromptCorruption(CorruptionConfig(kind="patch"), encoder).prompt(prompt, 5)
    with pytest.raises(InputError, match=r"kind is patch.*use official or diffusion"):
        format.prompt(tiles.encoded)


def test_an_evaluation_that_vllm_cannot_sample_is_refused_at_the_start(internvl, tmp_path):
    config, encoder, policy = internvl
    config = replace(
        config,
        rollout=replace(config.rollout, engine="vllm"),
        data=replace(config.data, test="questions.parquet"),
        corruption=CorruptionConfig(kind="blur"),
    )
    assert config.eval.corrupted
    with pytest.raises(InputError, match=r"kind is blur.*'internvl'.*--eval\.no-corrupted"):
        make_engine(config, policy, encoder, tmp_path)
