"""Questions from a .parquet file, a .jsonl file or the hub, read lazily and in a seeded order.

A row holds a `problem`, an `answer`, a list of `images` (bytes, `{"bytes", "path"}` or paths
relative to the file; the column may be absent) and optionally a `kind`.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from papo_fast.config import Config, DataConfig
from papo_fast.data.encoded import EncodedPrompt
from papo_fast.data.encoder import PromptEncoder, PromptTooLong
from papo_fast.data.rows import (
    BadSample,
    as_answer,
    as_kind,
    as_list,
    as_reading,
    as_text,
    open_image,
    printable,
    read_rows,
)
from papo_fast.errors import InputError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One question, ready for the sampler."""

    index: int
    """Row in the data, from 0; seeds the prompt's corruption."""
    problem: str
    """The question as the data has it, without the prompt suffix."""
    answer: str
    """The reference answer."""
    kind: str
    """What the evaluation table is split by; "" where the data has no such column."""
    images: list[Image.Image]
    """The raw images, RGB."""
    encoded: EncodedPrompt
    """Token ids and patches of problem, suffix and images."""
    reading: str | None = None
    """What the picture says, where the data has such a column."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, as the data has them; None where a row lacks one."""


class PromptDataset(Dataset):
    """Map-style view of one file; a row is read, decoded and encoded each time it is asked for.

    Args:
        source: path of a .parquet or .jsonl file, or the hub name of a dataset.
        config: column names, prompt suffix and what to do with bad rows.
        encoder: the model's tokenizer and image processor.
        split: split of a hub dataset; files have none.
        check: raises `InputError` for a prompt that the run cannot use, whose row is a bad one.

    Raises:
        InputError: the source is missing, unreadable or empty, or lacks a column. Later, from
            `dataset[i]` with `on_bad_sample="error"`: an empty problem or answer, an image that
            cannot be read, or a prompt that `PromptEncoder.encode` refuses.
    """

    def __init__(
        self,
        source: str | Path,
        config: DataConfig,
        encoder: PromptEncoder,
        *,
        split: str = "train",
        check: Callable[[Prompt], None] | None = None,
    ):
        self.source = str(source)
        self.config = config
        self.encoder = encoder
        self.check = check
        self.bad_rows: dict[int, str] = {}
        columns, self._rows, self._base = read_rows(self.source, split, config.on_bad_sample)
        if not len(self._rows):
            raise InputError(f"{self.source} has no rows")
        if not columns:
            try:
                self._rows[0]
            except BadSample as bad:
                raise InputError(f"{self.source} has no row that can be read: {bad}") from bad
        used = (config.problem_key, config.answer_key, config.images_key)
        self.columns = columns
        self._others = sorted(columns - set(used))
        names = printable(", ".join(sorted(columns)), 1000)
        for what in ("problem", "answer"):
            key = getattr(config, f"{what}_key")
            if key not in columns:
                raise InputError(
                    f"{self.source} has no column {key!r}; it has {names}. "
                    f"Name the column that holds the {what} with --data.{what}-key"
                )
        if config.images_key not in columns:
            _log.warning(
                "%s has no column %r and is read as text only; it has %s. Name the column that "
                "holds the images with --data.images-key",
                *(self.source, config.images_key, names),
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt | None:
        """The prompt of row `index`, or None for a bad row that `on_bad_sample="skip"` skips."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        try:
            return self._prompt(index)
        except BadSample as bad:
            message = printable(f"{self.source}, row {index}: {bad}", 2000)
            if self.config.on_bad_sample == "error":
                raise InputError(
                    f"{message}. Fix the row, or pass --data.on-bad-sample skip"
                ) from bad
            if bad.cause not in self.bad_rows.values():
                _log.warning("skipped: %s (more of this cause are only counted)", message)
            self.bad_rows[index] = bad.cause
            return None

    def __iter__(self) -> Iterator[Prompt]:
        """All usable prompts in the order of the rows."""
        for index in range(len(self)):
            prompt = self[index]
            if prompt is not None:
                yield prompt

    @property
    def skipped(self) -> Counter[str]:
        """Rows skipped so far, by cause; a row counts once however often it is drawn."""
        return Counter(self.bad_rows.values())

    @property
    def kinds(self) -> list[str]:
        """The kind of every row, without decoding its images."""
        return [as_kind(value) for value in self._rows.column(self.config.kind_key)]

    def _prompt(self, index: int) -> Prompt:
        config = self.config
        row = self._rows[index]
        problem = as_text(row.get(config.problem_key), config.problem_key, "problem")
        answer = as_answer(row.get(config.answer_key), config.answer_key)
        reading = as_reading(row.get(config.reading_key), config.reading_key)
        values = as_list(row.get(config.images_key))
        try:
            # before the pictures, which cost more, are decoded
            self.encoder.check_size(problem + config.prompt_suffix, len(values))
            images = [open_image(value, i, self._base) for i, value in enumerate(values)]
            encoded = self.encoder.encode(problem + config.prompt_suffix, images)
        except PromptTooLong as error:
            raise BadSample("too long", str(error)) from error
        except InputError as error:
            raise BadSample("prompt", str(error)) from error
        kind = as_kind(row.get(config.kind_key))
        others = {name: row.get(name) for name in self._others}
        prompt = Prompt(index, problem, answer, kind, images, encoded, reading, others)
        if self.check is not None:
            try:
                self.check(prompt)
            except InputError as error:
                raise BadSample("corruption", str(error)) from error
        return prompt


class PromptStream:
    """Endless stream of prompts, epoch after epoch, whose position can be saved and restored.

    A draw that reaches the end of an epoch goes on into the next one, so every row is used once
    per epoch and no remainder is dropped.

    Args:
        dataset: where the prompts come from.
        batch_size: prompts per `next()`; `take` draws any other number.
        seed: with the epoch's number, decides the epoch's order.
        shuffle: False keeps the order of the rows.
        num_workers: processes that read and encode ahead; 0 reads in this one. With workers
            `dataset.skipped` stays in them.
        option: the setting that `batch_size` came from, for the error message.

    Raises:
        InputError: the dataset is smaller than a batch, or (while drawing) has no usable row.
    """

    def __init__(
        self,
        dataset: PromptDataset,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        num_workers: int = 0,
        option: str = "rollout.prompts",
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.option = option
        self._check_size(batch_size)
        self._order = _EpochOrder(len(dataset), seed, shuffle)
        with warnings.catch_warnings():
            # torchdata 0.11 calls torch.set_vital, which torch 2.13 deprecates.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            self._loader = StatefulDataLoader(
                dataset,
                batch_size=None,
                sampler=self._order,
                collate_fn=_as_is,
                num_workers=num_workers,
                # A generator of its own: a loader's iterator draws a seed, by default from the
                # global generator that also samples responses.
                generator=torch.Generator().manual_seed(seed),
            )
        self._epoch_rows: Iterator[Prompt | None] | None = None
        self._usable = 0
        self.broken = False  # a draw has failed

    @classmethod
    def of(cls, config: Config, dataset: PromptDataset) -> PromptStream:
        """The stream of a training run: as many prompts at a time as it samples at a time."""
        rollout = config.rollout
        option = "filter_prompts" if rollout.dynamic_filter else "prompts"
        return cls(
            dataset,
            getattr(rollout, option),
            seed=config.seed,
            shuffle=config.data.shuffle,
            option=f"rollout.{option}",
        )

    @property
    def epoch(self) -> int:
        """Number of the epoch being read, from 0."""
        return self._order.epoch

    def __iter__(self) -> Iterator[list[Prompt]]:
        return self

    def __next__(self) -> list[Prompt]:
        return self.take(self.batch_size)

    def take(self, n: int) -> list[Prompt]:
        """The next `n` usable prompts."""
        self._check_size(n)
        prompts: list[Prompt] = []
        while len(prompts) < n:
            if self._epoch_rows is None:
                self._epoch_rows = iter(self._loader)
            try:
                prompt = next(self._epoch_rows, _END)
                if prompt is _END:
                    self._next_epoch()
            except InputError:
                self.broken = True
                raise
            if prompt is _END:
                continue
            if prompt is not None:
                self._usable += 1
                prompts.append(prompt)
        return prompts

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream: what `take` would give next, as plain picklable values."""
        return {
            "epoch": self._order.epoch,
            "usable": self._usable,
            "rows": len(self.dataset),
            "loader": self._loader.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            InputError: the state is of a dataset with another number of rows.
        """
        if state["rows"] != len(self.dataset):
            raise InputError(
                f"the saved position is in data of {state['rows']} rows but {self.dataset.source} "
                f"has {len(self.dataset)}: resume with the same --data.train"
            )
        self._order.epoch = state["epoch"]
        self._usable = state["usable"]
        self._loader.load_state_dict(state["loader"])
        self._epoch_rows = iter(self._loader)

    def _next_epoch(self) -> None:
        if self._usable == 0:
            raise InputError(
                f"{self.dataset.source}: none of its {len(self.dataset)} rows is usable "
                f"(skipped: {dict(self.dataset.skipped)}); pass --data.on-bad-sample error to see "
                "the first failure"
            )
        self._order.epoch += 1
        self._usable = 0
        self._epoch_rows = None

    def _check_size(self, n: int) -> None:
        if n > len(self.dataset):
            flag = "--" + self.option.replace("_", "-")
            raise InputError(
                f"{self.dataset.source} has {len(self.dataset)} rows, fewer than {self.option} = "
                f"{n}: lower {flag} (train.update_prompts must divide rollout.prompts), or give "
                "more data"
            )


_END: Any = object()


def _as_is(prompt: Any) -> Any:
    return prompt


class _EpochOrder(Sampler[int]):
    """Row numbers in the order of the current epoch, a function of (seed, epoch) alone."""

    def __init__(self, n: int, seed: int, shuffle: bool):
        self.n, self.seed, self.shuffle, self.epoch = n, seed, shuffle, 0

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.n))
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        return iter(order.tolist())
