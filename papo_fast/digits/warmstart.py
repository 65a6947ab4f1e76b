"""Supervised warm start of the digits model: just far enough that sampling is right sometimes.

Everything is kept under one cache folder per seed and settings, so a second run starts at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pyarrow.parquet as pq
import torch

from papo_fast.config import Config, DataConfig, DigitsConfig, ModelConfig
from papo_fast.consoles import say
from papo_fast.data.encoder import PromptEncoder
from papo_fast.data.prompts import Prompt, PromptDataset
from papo_fast.digits.model import build_checkpoint
from papo_fast.digits.shortcut import equal_parts, train_hint
from papo_fast.digits.task import response, write_questions
from papo_fast.errors import InputError
from papo_fast.evaluate import VISION, evaluate
from papo_fast.model.packing import pack
from papo_fast.model.policy import Policy
from papo_fast.parallel import pick_device
from papo_fast.rewards.scorer import Scorer
from papo_fast.rollout.hf import HFRollout
from papo_fast.rollout.sampler import Sampler
from papo_fast.run.lock import Locked, is_here, locked
from papo_fast.run.progress import Progress
from papo_fast.samples import Completion, Group, Sample

log = logging.getLogger(__name__)

LR = 2e-3
BATCH = 128
CHECK_EVERY = 3
CHECK_FROM = 100  # before, no model is right often enough
DEV_QUESTIONS = 640  # half of them vision-dependent, and only these are asked
VERSION = 13  # raise it when task, model or recipe change: old caches are then left alone
# Held-out questions of the split that the warm start is checked on are not those that it is checked
# with: they are drawn with seeds this far off.
DEV_SEEDS = 1_000_000


@dataclass(frozen=True)
class DigitsFiles:
    model: Path
    train: Path
    test: Path


def prepare(config: Config, progress: Progress) -> Config:
    """Build (or find) model and data of the digits task; the config then points to them."""
    folder = cache_folder(config)
    files = DigitsFiles(folder / "model", folder / "train.parquet", folder / "test.parquet")
    data = replace(config.data, train=str(files.train), test=str(files.test))
    made = files.model / "config.json"
    if not made.exists():
        with _alone_in(folder, made, progress):
            if not made.exists():
                _build(files, config, data, progress)
    else:
        log.info("warm-started model and data found in %s", folder)
    return replace(config, model=replace(config.model, path=str(files.model)), data=data)


@contextmanager
def _alone_in(folder: Path, made: Path, progress: Progress) -> Iterator[None]:
    """Hold the cache folder; wait where another process of this machine is filling it.

    Raises `Locked` where one of another machine is: from here nobody can tell whether it lives.
    Raises `InputError` where the folder cannot be made or written to.
    """
    said = False
    with ExitStack() as held:
        while not made.exists():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(folder))
                break
            except OSError as error:
                raise InputError(
                    f"digits.cache: {folder} cannot be made or written to: {error}"
                ) from error
            except Locked as error:
                if not is_here(error.holder) or error.holder["pid"] == os.getpid():
                    raise
                if not said:
                    pid = error.holder["pid"]
                    say(progress.console, f"waiting for process {pid}, which is filling {folder}")
                said = True
                time.sleep(0.5)
        yield


def cache_folder(config: Config) -> Path:
    """Where model and data of these settings are kept; settings that changed nothing when they
    were added count only where they are not at their defaults."""
    digits = config.digits
    settings = asdict(replace(digits, cache=""))
    for added in fields(DigitsConfig):
        if added.name in ("task", "held_out") and settings[added.name] == added.default:
            del settings[added.name]
    key = json.dumps([VERSION, config.seed, settings, config.threads])
    return Path(digits.cache) / hashlib.sha256(key.encode()).hexdigest()[:12]


def _build(files: DigitsFiles, config: Config, data: DataConfig, progress: Progress) -> None:
    seed, digits = config.seed, config.digits
    partial = files.model.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    dev, warm = files.train.with_name("dev.parquet"), files.train
    held_out = ("test", seed) if digits.held_out == "test" else ("dev", seed + DEV_SEEDS)
    written = [
        (files.train, digits.train_questions, ("train", seed), train_hint),
        (dev, DEV_QUESTIONS, ("dev", seed), None),
        (files.test, digits.test_questions, held_out, equal_parts),
    ]
    if digits.task == "digits-shortcut":
        warm = files.train.with_name("warm.parquet")
        written.append((warm, digits.train_questions, ("train", seed), equal_parts))
    else:
        written = [(*what, None) for *what, _ in written]
    with progress.task("questions", total=len(written)) as advance:
        for path, n, (split, seed_of_it), change in written:
            write_questions(path, n, split, seed_of_it, change)
            advance(1)
    words = None
    if digits.task == "digits-shortcut":
        words = pq.read_table(warm, columns=["problem"]).column("problem").to_pylist()
    build_checkpoint(partial, seed, words)
    model = replace(config.model, path=str(partial))
    policy = warm_start(model, replace(data, train=str(warm)), str(dev), config, progress)
    policy.save(partial)
    partial.rename(files.model)


def warm_start(
    model: ModelConfig, data: DataConfig, dev: str, config: Config, progress: Progress
) -> Policy:
    """Train on the written-out answers until accuracy on `dev` reaches `digits.warm_accuracy`.

    Raises `InputError` if it is not reached in `digits.warm_max_steps` steps.
    """
    device = pick_device(config.device)
    encoder = PromptEncoder(model.path, data)
    policy = Policy.load(model, encoder.banned_token_ids, device)
    train_prompts = _encode(PromptDataset(data.train, data, encoder), "reading pictures", progress)
    dev_prompts = _encode(PromptDataset(dev, data, encoder), "reading pictures", progress)
    dev_prompts = [p for p in dev_prompts if p.kind == VISION]
    targets = [
        _as_if_sampled(
            [
                *encoder.tokenizer.encode(response(p.reading, p.answer), add_special_tokens=False),
                encoder.eos_token_ids[0],
            ]
        )
        for p in train_prompts
    ]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=(0.9, 0.98))
    engine = HFRollout(policy, encoder.eos_token_ids, encoder.pad_token_id, 512)
    rng = random.Random(config.seed)
    accuracy = 0.0
    total = config.digits.warm_max_steps
    # a user's reward functions have no say in it
    only_accuracy = replace(config.reward, functions=("accuracy",))
    with Scorer(only_accuracy) as scorer, progress.task("warm start", total=total) as advance:
        for step in range(1, total + 1):
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1.0, step / 50)
            picked = rng.sample(range(len(train_prompts)), BATCH)
            groups = [Group(train_prompts[i], [Sample(targets[i])]) for i in picked]
            batch = pack(groups, policy.prompt_positions).to(device)
            stats, _ = policy.stats(batch)
            loss = -stats.logprobs.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            if step >= CHECK_FROM and step % CHECK_EVERY == 0:
                sampler = Sampler(engine, encoder, scorer)
                result = evaluate(sampler, dev_prompts, config, _silent, samples=2)
                accuracy = result.accuracy[VISION]
                if accuracy >= config.digits.warm_accuracy:
                    log.info("warm start: accuracy %.2f after %d steps", accuracy, step)
                    return policy
            advance(1, f"loss {loss.item():.2f}  accuracy {accuracy:.2f}")
    raise InputError(
        f"the warm start reached accuracy {accuracy:.2f} after {total} steps, short of "
        f"digits.warm_accuracy = {config.digits.warm_accuracy}: raise digits.warm_max_steps"
    )


def _as_if_sampled(token_ids: list[int]) -> Completion:
    return Completion(token_ids, logprobs=[], finished=True)


def _silent(done: int) -> None:
    """The warm start's own bar tells how far it is."""


def _encode(dataset: PromptDataset, label: str, progress: Progress) -> Sequence[Prompt]:
    prompts = []
    with progress.task(label, total=len(dataset)) as advance:
        for prompt in dataset:
            prompts.append(prompt)
            advance(1)
    return prompts
