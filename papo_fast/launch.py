"""Start a training run (its processes, its folder, what ends it) or a vLLM server for one."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from papo_fast.config import Config
from papo_fast.config_checks import resolve
from papo_fast.errors import InputError
from papo_fast.parallel import gather, is_main, main_first, pick_device, process_group
from papo_fast.rewards.scorer import Scorer
from papo_fast.rollout.protocol import RolloutError
from papo_fast.rollout.vllm_requests import require_vllm
from papo_fast.rollout.vllm_serve import server_command
from papo_fast.run.checkpoint import stop_on_sigterm
from papo_fast.run.clock import Clock
from papo_fast.run.files import CONFIG
from papo_fast.run.folder import claim_run_dir, find_run_dir, write_json
from papo_fast.run.progress import Progress
from papo_fast.trainer import Trainer

DEFAULT_URL = "http://127.0.0.1:8000"


def train(config: Config, console: Console) -> Path:
    """Run the whole job; returns the run's folder (metrics, report, summary, final model)."""
    config = resolve(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    with process_group(pick_device(config.device)):
        return _train(config, console if is_main() else Console(quiet=True))


def _train(config: Config, console: Console) -> Path:
    folder = None
    if is_main():
        folder = find_run_dir(config) if config.resume else claim_run_dir(config)
    folder = gather(folder)[0]
    clock = Clock()  # before the warm start: `seconds` is what the user waited
    progress = Progress(console)
    if config.digits.enabled:
        from papo_fast.digits.warmstart import prepare  # which loads scikit-learn

        with main_first():  # the others then find what it made
            config = prepare(config, progress)
    with Scorer(config.reward) as scorer:
        trainer = Trainer(config, folder, scorer, progress, clock)
        # not before everything is loaded: a folder with a config counts as a run
        if is_main():
            write_json(folder / CONFIG, asdict(config))
        with closing(trainer.engine), stop_on_sigterm() as stop:
            try:
                return trainer.run(stop)
            except InputError as error:
                # nothing of the failed step has happened yet: keep what came before it
                before_it = isinstance(error, RolloutError) or trainer.stream.broken
                if before_it and not trainer.journal.is_saved():
                    trainer.journal.checkpoint(trainer.policy, trainer.updater.optimizer)
                raise


def serve(config: Config, console: Console) -> None:
    """Become the vLLM server of a run with this configuration; does not return."""
    urls = config.rollout.server_urls or (DEFAULT_URL,)
    if len(urls) > 1:
        raise InputError(
            f"rollout.server_urls names {len(urls)} servers: start each with its own URL alone"
        )
    config = resolve(config)
    require_vllm()
    if config.digits.enabled:
        from papo_fast.digits.warmstart import prepare

        config = prepare(config, Progress(console))
    command, environment = server_command(config, urls[0])
    environment.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    console.print(f"vLLM serves {config.model.path} at {urls[0]}")
    os.execve(command[0], command, environment)
