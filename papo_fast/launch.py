"""Start a training run (its processes, its folder, what ends it) or a vLLM server for one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from papo_fast.config import Config
from papo_fast.config_checks import (
    check_libraries,
    check_processes,
    check_transfer_device,
    resolve,
)
from papo_fast.consoles import make_console, outlive_readers, say
from papo_fast.errors import InputError
from papo_fast.evaluate import evaluate_checkpoint
from papo_fast.hand_over import Given, hand_over
from papo_fast.model.choice import load_encoder
from papo_fast.parallel import (
    gather,
    is_main,
    main_first,
    pick_device,
    process_group,
    world_size,
)
from papo_fast.report import has_report, write_report
from papo_fast.rewards.scorer import Scorer
from papo_fast.rollout.protocol import RolloutError
from papo_fast.rollout.vllm_guard import read_or_make_token
from papo_fast.rollout.vllm_requests import require_vllm
from papo_fast.rollout.vllm_serve import server_command, warn_of_open_address
from papo_fast.run.caches import find_room_for_data
from papo_fast.run.clock import Clock
from papo_fast.run.files import CONFIG
from papo_fast.run.folder import run_folder, write_json
from papo_fast.run.progress import Progress
from papo_fast.run.resume import finished_steps
from papo_fast.run.same_data import DATA, marks_of_data
from papo_fast.run.stop import Stopped, StopRequest, stop_on_signals
from papo_fast.run.trackers import check_tracker
from papo_fast.trainer import Trainer
from papo_kernels.precision import exact_float32

_log = logging.getLogger(__name__)
DEFAULT_URL = "http://127.0.0.1:8000"


def train(
    config: Config,
    console: Console | None = None,
    *,
    reward: Given | Sequence[Given] | None = None,
    corruption: Callable[..., Any] | str | None = None,
    token_weight: Callable[..., Any] | str | Sequence[Callable[..., Any] | str] | None = None,
    terms: Given | Sequence[Given] | None = None,
) -> Path:
    """Run the whole job; returns the run's folder (metrics, report, summary, final model).

    Functions are plain ones, or named as FILE.py:name (docs/usage.md).

    Args:
        console: where progress is printed; None: to the standard output.
        reward: what is rewarded, in place of `reward.functions`: a function of (response, answer,
            reference, prompt, images, and columns of the data), all by name, that returns a number;
            or a list of functions, names such as "accuracy", and pairs of either and a weight.
        corruption: a function of (pixel_values, image_grid_thw, seed) or of (images, seed).
        token_weight: a function of (batch, config) that returns (N,) factors, or a list.
        terms: a function of (batch, config) that returns (N,) values to be minimised, a pair of it
            and its coefficient, or a list.

    Raises `InputError` for settings or functions that cannot work.
    """
    console = make_console() if console is None else console
    config = hand_over(
        config, reward=reward, corruption=corruption, token_weight=token_weight, terms=terms
    )
    with _ready(config, console) as (config, console):
        return _train(config, console)


def evaluate(config: Config, console: Console) -> dict[str, Any]:
    """Mean@k of `config.model.path` on `config.data.test`, printed; its entries of a summary.

    It is evaluated as by a run of this configuration at its end.
    """
    with _ready(config, console) as (config, console):
        if config.digits.enabled and not Path(config.data.test).is_file():
            from papo_fast.digits.warmstart import prepare  # which loads scikit-learn

            with main_first():
                data = prepare(config, Progress(console)).data
            config = replace(config, data=data)
        return evaluate_checkpoint(config, console)


@contextmanager
def _ready(config: Config, console: Console) -> Iterator[tuple[Config, Console]]:
    """The resolved configuration, and the console of this process, among the others of the job."""
    outlive_readers(console)
    find_room_for_data()
    config = resolve(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    # A vision tower begins with a convolution. On an H200 the gradients of float32 updates were off
    # by 2 to 5e-4, which is the size of cuDNN's TF32.
    exact = exact_float32(torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    device = pick_device(config.device)
    check_transfer_device(config, device.type)
    with process_group(device, config.parallel.offload), exact:
        check_processes(config, world_size())
        check_libraries(config)
        yield config, console if is_main() else Console(quiet=True)


def _train(config: Config, console: Console) -> Path:
    with ExitStack() as held:
        folder = done = None
        if is_main():
            check_tracker(config.track)
            folder = held.enter_context(run_folder(config))
            done = finished_steps(config, folder) if config.resume else None
        folder, done = gather((folder, done))[0]
        if done is not None:
            say(console, f"{folder} is finished after {done} steps: nothing is left to do")
            if is_main() and not has_report(folder):
                picture = write_report(folder)
                say(console, f"its report was not finished; it is now {picture}")
            return folder
        return _train_in(folder, config, console)


def _train_in(folder: Path, config: Config, console: Console) -> Path:
    clock = Clock()  # before the warm start: `seconds` is what the user waited
    progress = Progress(console)
    if config.digits.enabled:
        from papo_fast.digits.warmstart import prepare  # which loads scikit-learn

        with main_first():  # the others then find what it made
            config = prepare(config, progress)
    with ExitStack() as held:
        marks = held.enter_context(marks_of_data(config, folder)) if is_main() else None
        scorer = held.enter_context(Scorer(config.reward))
        trainer = Trainer(config, folder, scorer, progress, clock)
        held.callback(trainer.journal.close)
        # not before everything is loaded: a folder with a config counts as a run
        if marks is not None:
            write_json(folder / DATA, marks.result())
            # of the run, and not of the command that started it: it may be given back
            write_json(folder / CONFIG, asdict(replace(config, resume=False, overwrite=False)))
        with closing(trainer.engine), stop_on_signals() as stop:
            trainer.journal.watch(trainer.updater.optimizer, stop)
            return _run(trainer, stop)


def _run(trainer: Trainer, stop: StopRequest) -> Path:
    """The run; whatever ends it, the last step that ended is kept."""
    policy, optimizer, journal = trainer.policy, trainer.updater.optimizer, trainer.journal
    try:
        return trainer.run(stop)
    except Stopped:
        journal.keep_last_step(policy, optimizer)
        trainer.say(f"stopped after step {journal.done}; the same command with --resume goes on")
        return trainer.folder
    except BaseException as error:
        # a checkpoint is the work of all ranks, and other errors are of one of them
        of_all = world_size() == 1 or isinstance(error, RolloutError) or trainer.stream.broken
        if of_all:
            try:
                journal.keep_last_step(policy, optimizer)
            except Exception as problem:  # the first error is the one to be told
                _log.warning("step %d could not be kept: %s", journal.done, problem)
        raise


def serve(config: Config, console: Console) -> None:
    """Become the vLLM server of a run with this configuration; does not return."""
    urls = config.rollout.server_urls or (DEFAULT_URL,)
    if len(urls) > 1:
        raise InputError(
            f"rollout.server_urls names {len(urls)} servers: start each with its own URL alone"
        )
    config = resolve(config)
    check_transfer_device(config, pick_device(config.device).type)
    require_vllm()
    if not config.rollout.server_token_file:
        raise InputError(
            "rollout.server_token_file is empty, and whoever reaches a server could change its "
            "weights: pass --rollout.server-token-file FILE here and to the run (FILE is made "
            "where it is missing)"
        )
    token = read_or_make_token(config.rollout.server_token_file)
    if config.digits.enabled:
        from papo_fast.digits.warmstart import prepare

        config = prepare(config, Progress(console))
    warn_of_open_address(urls[0])
    encoder = load_encoder(config.model, config.data)
    command, environment = server_command(config, encoder, urls[0], token)
    environment.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    say(console, f"vLLM serves {config.model.path} at {urls[0]}")
    os.execve(command[0], command, environment)
