"""Sampling on the device, by transformers' model and by vLLM's server: log-probs against the
trainer's, tokens/s, seconds that new weights take."""

import importlib.util
from contextlib import closing
from dataclasses import replace

import torch
from gpu_train_record import LeftOut
from gpu_train_update import case_of, configured
from update_memory import Case, experience, write_checkpoint

from papo_fast.digits.model import build_checkpoint
from papo_fast.model.choice import load_encoder, load_policy
from papo_fast.model.packing import pack
from papo_fast.model.policy import Policy, inference
from papo_fast.presets import get_preset
from papo_fast.rollout.hf import HFRollout
from papo_fast.rollout.vllm_server import VLLMServerRollout, write_weights
from papo_fast.samples import Group, Sample

# Largest difference of a log-prob of the sampler and of the trainer; keys and values of bfloat16
# are rounded otherwise in a cache than in a packed tree.
MOST = {"float32": 2e-3, "bfloat16": 0.3}
SPEED_TOKENS = 64
SPEED = Case("qwen2_5_vl", 1024, 4096, 12, 32_768, 320, 4, (40, 64), 120, 350, 8, 8, 4, 128, 80)


def sampled(engine, groups, n, new, seed=0):
    """`n` responses of up to `new` tokens to each of the groups' prompts."""
    return engine.generate(
        [group.prompt.encoded for group in groups],
        n,
        temperature=1.1,
        max_new_tokens=new,
        seed=seed,
        advance=lambda _: None,
    )


def rollout(recorder):
    """Both families: what the sampler says of its tokens, the trainer must say too."""
    new = 8 if recorder.small else 40
    for family in ("qwen2_5_vl", "qwen3_vl"):
        case = case_of(recorder, family)
        path = recorder.folder / family
        write_checkpoint(case, path)
        groups = experience(case)
        for dtype in ("float32", "bfloat16"):
            with recorder.part(f"{family}, {dtype}"):
                policy = Policy.load(
                    configured(case, path, dtype).model, [1, 2, 3, 4], recorder.device
                )
                engine = HFRollout(policy, [0], 0, 64)
                made = sampled(engine, groups, 5, new)
                again = sampled(engine, groups, 5, new)
                same = [[c.token_ids for c in group] for group in made] == [
                    [c.token_ids for c in group] for group in again
                ]
                recorder.note(f"{family} {dtype}: the same seed, the same tokens", same)
                worst, mean = difference(policy, groups, made)
                recorder.note(f"{family} {dtype}: mean difference", mean)
                recorder.check(f"{family} {dtype}: largest difference", worst, MOST[dtype])


def difference(policy, groups, completions):
    """(largest, mean) difference of the log-probs of sampler and trainer."""
    trees = [
        Group(group.prompt, [Sample(c) for c in some], group.aug_pixels)
        for group, some in zip(groups, completions, strict=True)
    ]
    batch = pack(trees, policy.prompt_positions).to(policy.device)
    with inference(policy):
        stats, _ = policy.stats(batch, temperature=1.1)
    said = torch.tensor([x for s in batch.samples for x in s.completion.logprobs])
    gap = (stats.logprobs.cpu() - said).abs()
    return gap.max().item(), gap.mean().item()


def servers(recorder):
    """A run's own server gets new weights in each way: bit for bit those that it loads from files.

    With `ipc` it shares the GPU; `nccl` takes a second one.
    """
    if importlib.util.find_spec("vllm") is None:
        raise LeftOut("vLLM is not installed")
    path = recorder.folder / "model"
    build_checkpoint(path, seed=0)
    preset = get_preset("tiny")
    for way in ("disk", "ipc", "nccl"):
        with recorder.part(way):
            if way != "disk" and not recorder.cuda:
                raise LeftOut("weights go from GPU to GPU")
            if way == "nccl" and torch.cuda.device_count() < 2:
                raise LeftOut("NCCL takes no two processes on one GPU")
            options = {"engine": "vllm_server", "server_transfer": way, "gpu_memory": 0.1}
            config = replace(
                preset,
                device=str(recorder.device),
                model=replace(preset.model, path=str(path)),
                data=replace(preset.data, max_prompt_length=300),
                rollout=replace(preset.rollout, **options),
            )
            folder = recorder.folder / way
            folder.mkdir()
            encoder = load_encoder(config.model, config.data)
            policy = load_policy(config, encoder, recorder.device)
            with closing(VLLMServerRollout(config, encoder, folder)) as engine:
                _new_weights(recorder, way, engine, policy, encoder, folder)


def _new_weights(recorder, way, engine, policy, encoder, folder):
    server = engine.servers[0]

    def checksums():
        return server.call("POST", "/weight_checker", {"action": "checksum"})["checksums"]

    before = checksums()
    for _ in range(2):  # the second time all have joined already
        with torch.no_grad():
            for weight in policy.model.parameters():
                weight.mul_(1 + 0.1 * torch.randn_like(weight))
        seconds = recorder.seconds(lambda: engine.load_weights(policy), repeat=1, warm=0)
    recorder.note(f"{way}: seconds of new weights", seconds)
    got = checksums()
    if before == got:
        raise AssertionError("the server has the weights that it had before")
    write_weights(policy, folder / "files" / "all")
    server.load_weights(folder / "files" / "all")
    want = checksums()
    differ = [name for name in want.keys() | got.keys() if want.get(name) != got.get(name)]
    recorder.check(f"{way}: weights unlike those of files", len(differ), 0)
    engine.load_weights(policy)
    prompts = [encoder.encode("1+23?", [])]
    made = engine.generate(
        prompts, 8, temperature=1.0, max_new_tokens=8, seed=0, advance=lambda _: None
    )
    recorder.note(f"{way}: responses sampled with them", len(made[0]))


def speed(recorder):
    """Tokens/s of a model of 0.3 B parameters, 8 prompts of the published length."""
    if not recorder.cuda:
        raise LeftOut("a model of this size is for a GPU")
    path = recorder.folder / "model"
    write_checkpoint(SPEED, path)
    groups = experience(SPEED)
    config = configured(SPEED, path, "bfloat16")
    policy = Policy.load(config.model, [1, 2, 3, 4], recorder.device)
    engine = HFRollout(policy, [0], 0, 256)
    sampled(engine, groups[:1], 8, 4)  # warm
    for rows in (8, 64, 256):
        count = min(len(groups), rows // 8)
        with recorder.part(f"{rows} rows"):
            made = []

            def once(count=count, rows=rows, made=made):
                made += sampled(engine, groups[:count], rows // count, SPEED_TOKENS)

            seconds = recorder.seconds(once, repeat=1, warm=0)
            tokens = sum(len(c.token_ids) for some in made for c in some)
            recorder.note(f"{rows} rows: tokens/s", tokens / seconds)
            recorder.note(f"{rows} rows: ms for a token of all rows", seconds / SPEED_TOKENS * 1e3)
