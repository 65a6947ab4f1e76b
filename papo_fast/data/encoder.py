"""From a question and its pictures to token ids and pixel patches.

The tokenizer and the image processor are used directly instead of through `AutoProcessor`, whose
video part needs torchvision; the ids and pixels are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig
from transformers.image_utils import SizeDict

from papo_fast.config import DataConfig
from papo_fast.data.encoded import EncodedPrompt, Later, accepted, grid_rule
from papo_fast.data.model_folder import (
    chat_template,
    check_config,
    check_files,
    end_ids,
    first_line,
    load,
    optional_file,
)
from papo_fast.data.model_numbers import TOKENS
from papo_fast.data.patch_grid import PatchGrid
from papo_fast.data.pictures import to_rgb
from papo_fast.data.tiles import Tiles
from papo_fast.errors import InputError
from papo_fast.rewards.reading import end_of_prompt

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe",
            "glm4v", "glm4v_moe")  # fmt: skip
"""Those that the fast path takes, whose processors cut pictures into the same rows."""
PLACEHOLDER = "<image>"
_VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                  "<|video_pad|>")  # fmt: skip


class PromptTooLong(InputError):
    """A prompt of more tokens than `data.max_prompt_length`."""


class PromptEncoder:
    """Chat template, tokenizer and image processor of a checkpoint of `FAMILIES`.

    Args:
        model_path: local checkpoint directory, or a hub name.
        data: its `min_pixels`, `max_pixels` replace the checkpoint's own limits, and its
            `max_prompt_length` bounds a prompt.
        trust_remote_code: let transformers run code that ships with the checkpoint.

    Attributes:
        tokenizer, image_processor: transformers' objects.
        image_token_id: the id that stands for one merged patch.
        patch_size, merge_size, temporal_patch_size: p, patches per merged side, and T.
        eos_token_ids: ids that end a response, sorted.
        pad_token_id: the id for padding; may be one of `eos_token_ids`.
        prompt_end: how every prompt ends, in text; a chat template may have opened <think> there.
        banned_token_ids: ids that must never be sampled, sorted: the vision ids, ids of the model's
            vocabulary that the tokenizer does not have, and the pad id unless it ends responses.
        tiles: how pictures are laid out, where they are tiles and not rows of patches.
        pixel_limits: the image processor's `size` where `data` decides it, else None.
        not_corrupted_by: kinds of corruption that this layout of pictures does not have.

    Raises:
        InputError: the checkpoint is missing, lacks a file, or is of another family.
    """

    families = FAMILIES
    tiles: Tiles | None = None
    pixel_limits: dict[str, int] | None = None
    not_corrupted_by: tuple[str, ...] = ()
    _smaller_pictures = "lower --data.max-pixels"

    def __init__(
        self, model_path: str | Path, data: DataConfig, *, trust_remote_code: bool = False
    ):
        self.model_path = str(model_path)
        self.max_prompt_length = data.max_prompt_length
        if not 0 < data.min_pixels <= data.max_pixels:
            raise InputError(
                f"data.min_pixels = {data.min_pixels}, data.max_pixels = {data.max_pixels}: "
                "expected 0 < min_pixels <= max_pixels"
            )
        check_files(self.model_path)
        file = optional_file(self.model_path, "config.json") if self.families else None
        if file is not None:
            check_config(Path(file), self.families)
        config = load(AutoConfig, self.model_path, trust_remote_code=trust_remote_code)
        self.tokenizer = load(AutoTokenizer, self.model_path, trust_remote_code=trust_remote_code)
        self.tokenizer.chat_template, self._template_file = chat_template(
            self.model_path, self.tokenizer
        )
        self._load_processor(config, data, trust_remote_code)
        self._special_ids(config)
        self._try_out()

    def _load_processor(self, config: Any, data: DataConfig, trust_remote_code: bool) -> None:
        options = {"backend": "pil", "trust_remote_code": trust_remote_code}
        self.image_processor = load(AutoImageProcessor, self.model_path, **options)
        self._limit_pixels(config, data)
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            value = getattr(self.image_processor, name, None)
            if not isinstance(value, int) or value < 1:
                raise InputError(
                    f"{self.model_path}: preprocessor_config.json says {name} = {value!r}; "
                    "expected a positive integer"
                )
        self.patch_size: int = self.image_processor.patch_size
        self.merge_size: int = self.image_processor.merge_size
        self.temporal_patch_size: int = self.image_processor.temporal_patch_size
        self._check_against_model(config)
        self._grid_rule = grid_rule(self.image_processor)

    def _limit_pixels(self, config: Any, data: DataConfig) -> None:
        """The limits of `data` in the place of the checkpoint's."""
        self._checkpoint_size = self.image_processor.size
        # GLM counts the pixels of all frames of a patch, of which a still picture has two
        frames = self.image_processor.temporal_patch_size if "glm" in config.model_type else 1
        # Checkpoints carry the limits as min_pixels/max_pixels or as size; transformers 5 reads
        # only `size`, and lets old keys override a `size` given to from_pretrained.
        edges = frames * data.min_pixels, frames * data.max_pixels
        self.pixel_limits = dict(zip(("shortest_edge", "longest_edge"), edges, strict=True))
        self.image_processor.size = SizeDict(**self.pixel_limits)

    def check_size(self, problem: str, n_images: int) -> None:
        """Raise `PromptTooLong` where no tokenisation could fit, in no time.

        A text of many megabytes would take minutes to tokenise, and thousands of pictures to
        decode. No token is longer than the vocabulary's longest; composing Unicode's accents
        (NFC) makes a text shorter by less than half.
        """
        most = 2 * self._longest_token * self.max_prompt_length
        if len(problem) > most or n_images > self.max_prompt_length:
            raise PromptTooLong(
                f"the prompt has {len(problem)} characters and {n_images} images, more than "
                f"data.max_prompt_length = {self.max_prompt_length} tokens can hold: raise "
                "--data.max-prompt-length"
            )

    def encode(self, problem: str, images: Sequence[Image.Image]) -> EncodedPrompt:
        """Apply the chat template to one question and expand its images.

        Args:
            problem: the user's text. Where it contains `<image>` the images go in order at those
                places (the convention of ViRL39K and EasyR1), else all of them in front.
            images: PIL images of any mode and size.

        Raises:
            InputError: placeholders and images differ in number, an image cannot be processed,
                the text cannot be tokenised (half an emoji), or (`PromptTooLong`) the prompt is
                longer than `data.max_prompt_length`.
        """
        self.check_size(problem, len(images))
        text = self._chat_text(problem, len(images))
        try:
            listed = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # TypeError, UnicodeEncodeError, Rust's own
            raise InputError(f"the problem cannot be tokenised: {first_line(error)}") from error
        ids = torch.tensor(listed, dtype=torch.int64)
        is_image = ids == self.image_token_id
        if int(is_image.sum()) != len(images):
            raise InputError(
                f"the chat template of {self.model_path} wrote {int(is_image.sum())} image tokens "
                f"for {len(images)} images; expected one {self._image_token} per image"
            )
        pixels, grid = self._pictures(images)
        if grid is not None:
            repeats = torch.ones_like(ids)
            repeats[is_image] = grid.prod(dim=1) // self.merge_size**2
            ids = ids.repeat_interleave(repeats)
        self._check_length(ids)
        return EncodedPrompt(ids, (ids == self.image_token_id).long(), pixels, grid)

    def _check_length(self, ids: torch.Tensor) -> None:
        """Raise `PromptTooLong` for (L,) ids of more tokens than a prompt may have."""
        if len(ids) > self.max_prompt_length:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens ({int((ids == self.image_token_id).sum())} of "
                f"them image tokens), more than data.max_prompt_length = {self.max_prompt_length}: "
                f"raise --data.max-prompt-length or {self._smaller_pictures}"
            )

    def _pictures(
        self, images: Sequence[Image.Image]
    ) -> tuple[torch.Tensor | Later | None, torch.Tensor | None]:
        """As `process_images`; pixels are made later where the sizes alone say what the grid is."""
        if self._grid_rule is None or not images:
            return self.process_images(images)
        images = [to_rgb(image) for image in images]
        grid = torch.tensor([accepted(i, x, self._grid_rule) for i, x in enumerate(images)])
        return Later(partial(self._promised, images, grid), keep=True), grid

    def _promised(self, images: Sequence[Image.Image], grid: torch.Tensor) -> torch.Tensor:
        pixels, found = self.process_images(images)
        if pixels is None or not torch.equal(found, grid):
            raise InputError(
                f"{self.model_path}: the image processor cut pictures into {found.tolist()} "
                f"patches, where its smart_resize says {grid.tolist()}"
            )
        return pixels

    def process_images(
        self, images: Sequence[Image.Image]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Resize, normalise and cut into patches.

        Returns:
            `pixel_values` (P, C*T*p*p) float32 and `image_grid_thw` (n, 3) int64; (None, None)
            for no images.

        Raises:
            InputError: an image without pixels, or with an aspect ratio the processor refuses.
        """
        pixels, grids = [], []

        def process(image: Image.Image) -> Any:
            return self.image_processor(images=[to_rgb(image)], return_tensors="pt")

        for number, image in enumerate(images):
            one = accepted(number, image, process)
            pixels.append(one["pixel_values"].float())
            grids.append(one["image_grid_thw"].long())
        if not pixels:
            return None, None
        return torch.cat(pixels), torch.cat(grids)

    def to_images(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> list[Image.Image]:
        """The pictures that these patches were cut from, as resized: `process_images` backwards.

        Exact where the patches are of 8-bit pictures, corrupted ones included. Takes the first
        n of the patches' pictures for a `grid_thw` of (n, 3).
        """
        pictures = PatchGrid.of(self).pictures(pixel_values, grid_thw)
        return [self._eight_bits(frames[0]) for frames in pictures]

    def _eight_bits(self, pixels: torch.Tensor) -> Image.Image:
        """(C, H, W) normalised pixels as a picture."""
        if getattr(self.image_processor, "do_normalize", True):
            mean = torch.tensor(self.image_processor.image_mean)[:, None, None]
            std = torch.tensor(self.image_processor.image_std)[:, None, None]
            pixels = pixels * std + mean
        values = pixels.clamp(0, 1).mul(255).round().permute(1, 2, 0)
        return Image.fromarray(values.numpy().astype(np.uint8))

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """Text of a response, (n,) ids, without padding and the vision and chat control tokens.

        Other tokens stay even where a tokenizer marks them as special, so that the format reward
        sees `<think>`.
        """
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        kept = [token for token in ids if token not in self._hidden_ids]
        return self.tokenizer.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write tokenizer, template and image processor, with the checkpoint's pixel limits."""
        self.tokenizer.save_pretrained(path)
        ours = self.image_processor.size
        self.image_processor.size = self._checkpoint_size
        self.image_processor.save_pretrained(path)
        self.image_processor.size = ours

    def _chat_text(self, problem: str, n_images: int) -> str:
        for token in self._vision_tokens:
            if token in problem and token != PLACEHOLDER:
                raise InputError(
                    f"the problem contains {token}, a control token of this model; mark an "
                    f"image's place with {PLACEHOLDER}"
                )
        content = content_parts(problem, n_images)
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # of jinja, or raised by the template
            raise InputError(
                f"{self.model_path}: the chat template in {self._template_file} fails: "
                f"{first_line(error)}"
            ) from error

    def _try_out(self) -> None:
        """One question with one picture, so that what is broken is heard of before the run."""
        side = self.patch_size * self.merge_size
        pixels = None
        try:
            pixels, _ = self.process_images([Image.new("RGB", (2 * side, 2 * side))])
        except InputError as error:
            raise InputError(
                f"{self.model_path}: preprocessor_config.json describes no image processor that "
                f"works: {error}"
            ) from error
        if not torch.isfinite(pixels).all():
            raise InputError(
                f"{self.model_path}: with preprocessor_config.json a black picture has pixels that "
                "are not finite: is its image_std 0?"
            )
        text = self._chat_text("?", 1)
        self.prompt_end = end_of_prompt(text)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if (found := ids.count(self.image_token_id)) != 1:
            raise InputError(
                f"{self.model_path}: the chat template in {self._template_file} wrote {found} "
                f"image tokens for 1 image; expected one {self._image_token}"
            )

    def _check_against_model(self, config: Any) -> None:
        vision = config.vision_config
        for name, ours, theirs in (
            ("patch_size", self.patch_size, vision.patch_size),
            ("merge_size", self.merge_size, vision.spatial_merge_size),
            ("temporal_patch_size", self.temporal_patch_size, vision.temporal_patch_size),
        ):
            if ours != theirs:
                raise InputError(
                    f"{self.model_path}: the image processor's {name} is {ours} but the model's "
                    f"is {theirs}; copy preprocessor_config.json of the same model"
                )
        token = self.tokenizer.convert_ids_to_tokens(config.image_token_id)
        if token is None:
            raise InputError(
                f"{self.model_path}: config.json says image_token_id = {config.image_token_id}, "
                f"which the tokenizer of {len(self.tokenizer)} tokens does not have; copy the "
                "tokenizer files of the same model"
            )
        self._image_token: str = token
        self.image_token_id: int = config.image_token_id

    def _vision_ids(self, config: Any) -> set[int]:
        vocab = self.tokenizer.get_vocab()
        return {vocab.get(t) for t in _VISION_TOKENS} | {getattr(config, n, None) for n in TOKENS}

    def _special_ids(self, config: Any) -> None:
        vocab = self.tokenizer.get_vocab()
        self._longest_token = max(map(len, vocab))
        size = config.get_text_config().vocab_size
        if max(vocab.values()) >= size:
            raise InputError(
                f"{self.model_path}: the tokenizer has ids up to {max(vocab.values())}, but "
                f"vocab_size in config.json is {size}: copy the tokenizer files of the same model"
            )
        # Embeddings are padded beyond the tokenizer; such an id has no text.
        without_text = set(range(size)) - set(vocab.values())
        vision = self._vision_ids(config) & set(vocab.values())
        self._vision_tokens = self.tokenizer.convert_ids_to_tokens(sorted(vision))

        eos = {self.tokenizer.eos_token_id}
        pad = self.tokenizer.pad_token_id
        if optional_file(self.model_path, "generation_config.json") is not None:
            generation = load(GenerationConfig, self.model_path)
            eos.update(end_ids(self.model_path, generation.eos_token_id))
            pad = generation.pad_token_id if pad is None else pad
        eos.discard(None)
        if not eos:
            raise InputError(
                f"{self.model_path}: neither the tokenizer nor generation_config.json names an "
                "end-of-sequence token; set eos_token in tokenizer_config.json"
            )
        self.eos_token_ids: list[int] = sorted(eos)
        self.pad_token_id: int = self.eos_token_ids[0] if pad is None else pad
        self.banned_token_ids: list[int] = sorted(
            vision | without_text | ({self.pad_token_id} - eos)
        )

        control = {
            token_id
            for token_id in self.tokenizer.all_special_ids
            if re.fullmatch(r"<\|.*\|>", self.tokenizer.convert_ids_to_tokens(token_id))
        }
        self._hidden_ids = control | vision | eos | {self.pad_token_id}


def content_parts(problem: str, n_images: int) -> list[dict[str, str]]:
    """A user's message with a place for each picture: at `<image>`, or in front without any."""
    pieces = problem.split(PLACEHOLDER)
    if len(pieces) == 1:
        pieces = [""] * n_images + pieces
    if len(pieces) - 1 != n_images:
        raise InputError(
            f"the problem has {len(pieces) - 1} {PLACEHOLDER} placeholders but the row has "
            f"{n_images} images; expected one placeholder per image, or none at all"
        )
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts
