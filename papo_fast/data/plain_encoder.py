"""Questions and pictures as any family's own processor writes them, for the plain path.

Nothing is assumed of the tensors but this: those of the shape of `input_ids` hold something of each
token, and the others belong to the pictures, of which `pixel_values` are the pictures themselves.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from papo_fast.config import DataConfig
from papo_fast.data.encoded import EncodedPrompt
from papo_fast.data.encoder import PromptEncoder, PromptTooLong
from papo_fast.data.model_folder import first_line, load
from papo_fast.data.pictures import to_rgb
from papo_fast.data.tiles import Tiles, block_of
from papo_fast.errors import InputError
from papo_fast.rewards.reading import end_of_prompt

_SEES = r"(image|img|video|vision|audio|boi|eoi|boa|eoa)"
_IDS = re.compile(rf"(^|_){_SEES}.*(_id|_ids|_index)$")
"""Names under which configurations and processors keep ids of tokens that stand for no text."""
_TOKENS = re.compile(rf"{_SEES}|row_\d+_col_\d+", re.IGNORECASE)
"""Special tokens of that kind, by what they look like."""


@dataclass(frozen=True)
class PlainPrompt(EncodedPrompt):
    """`EncodedPrompt` whose `pixel_values` have the processor's own shape."""

    tokens: dict[str, Tensor]
    """Further inputs of the model, (1, L): one number per token."""
    pictures: dict[str, Tensor]
    """Further inputs of the model that describe the pictures, `image_grid_thw` included."""
    text_ids: Tensor
    """(S,) int64: the tokens of the chat template alone, one or a few for each picture."""
    images: Callable[[], list[Image.Image]]
    """The pictures as they were before the processor. Raises `InputError` where there are none,
    because tiles were changed."""


class PlainEncoder(PromptEncoder):
    """Chat template and processor of any checkpoint of `AutoModelForImageTextToText`.

    Args and attributes are those of `PromptEncoder`, and `one_picture`, a question with a small
    black picture. `data.min_pixels` and `data.max_pixels` act where the processor cuts pictures
    into Qwen's rows of patches; others resize as they do.

    Raises:
        InputError: the checkpoint lacks something, or its processor lays pictures out in a way that
            no corruption knows.
    """

    families = ()
    _smaller_pictures = "give smaller pictures"  # few processors know data.max_pixels

    def _load_processor(self, config: Any, data: DataConfig, trust_remote_code: bool) -> None:
        if type(config) not in PROCESSOR_MAPPING:
            raise InputError(
                f"{self.model_path}: transformers has no processor for a {config.model_type!r} "
                "model, which the plain path asks for tensors"
            )
        kind = pictures_only(PROCESSOR_MAPPING[type(config)])
        self.processor = load(
            kind, self.model_path, backend="pil", trust_remote_code=trust_remote_code
        )
        template = self.tokenizer.chat_template
        self.processor.chat_template = self.processor.tokenizer.chat_template = template
        self.tokenizer = self.processor.tokenizer  # some add tokens to theirs
        self.image_processor = self.processor.image_processor
        rows = ("patch_size", "merge_size", "temporal_patch_size")
        self._in_rows = all(isinstance(getattr(self.image_processor, n, None), int) for n in rows)
        self._checkpoint_size = getattr(self.image_processor, "size", None)
        if self._in_rows:
            self.patch_size, self.merge_size, self.temporal_patch_size = (
                getattr(self.image_processor, n) for n in rows
            )
            self._limit_pixels(config, data)
        ids = (getattr(config, f"image_token_{x}", None) for x in ("id", "index"))
        known = [i for i in ids if i is not None]
        if not known:
            raise InputError(f"{self.model_path}: config.json names no image_token_id")
        self.image_token_id: int = known[0]
        self._image_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        self._block = block_of(config)

    def encode(self, problem: str, images: Sequence[Image.Image]) -> PlainPrompt:
        """As `PromptEncoder.encode`, by the processor."""
        self.check_size(problem, len(images))
        text = self._chat_text(problem, len(images))
        found = self._processed(text, images)
        ids = found.pop("input_ids")[0]
        found.pop("attention_mask", None)
        self._check_length(ids)
        of_tokens = [k for k, v in found.items() if v.shape == (1, len(ids))]
        tokens = {name: found.pop(name) for name in of_tokens}
        pixels = found.pop("pixel_values", None)
        return PlainPrompt(
            input_ids=ids,
            mm_token_type_ids=(ids == self.image_token_id).long(),
            pixel_values=None if pixels is None else pixels.float(),
            image_grid_thw=found.get("image_grid_thw"),
            tokens=tokens,
            pictures=found,
            text_ids=self.tokenizer(text, return_tensors="pt", **self._first_token(text))[
                "input_ids"
            ][0],
            images=partial(list, images),
        )

    def process_images(self, images: Sequence[Image.Image]) -> tuple[Tensor | None, Tensor | None]:
        """`pixel_values` as the processor writes them, and `image_grid_thw` where it has one."""
        if not images:
            return None, None
        found = self._processed(self._chat_text("?", len(images)), images)
        return found["pixel_values"].float(), found.get("image_grid_thw")

    def to_images(self, pixel_values: Tensor, grid_thw: Tensor | None) -> list[Image.Image]:
        """As `PromptEncoder.to_images`; of tiles the first one, which not always is a whole."""
        if self.tiles is None:
            return super().to_images(pixel_values, grid_thw)
        return [self._eight_bits(self.tiles.pictures(pixel_values)[0][0])]

    def save_pretrained(self, path: Any) -> None:
        """Write tokenizer, template and processor, with the checkpoint's pixel limits."""
        ours, self.image_processor.size = self.image_processor.size, self._checkpoint_size
        self.processor.save_pretrained(path)
        self.image_processor.size = ours

    def _processed(self, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        for number, image in enumerate(images):
            if 0 in image.size:
                raise InputError(f"image {number} has no pixels; expected at least 1x1")
        options: dict[str, Any] = {"return_tensors": "pt", "return_mm_token_type_ids": True}
        options |= self._first_token(text)
        try:
            pictures = [[to_rgb(image) for image in images]] if images else None
            found = self.processor(text=[text], images=pictures, **options)
        except Exception as error:  # whatever a processor or a tokenizer raises
            raise InputError(
                f"the processor of {self.model_path} refuses the problem with its {len(images)} "
                f"images: {first_line(error)}"
            ) from error
        return {name: torch.as_tensor(value) for name, value in found.items()}

    def _first_token(self, text: str) -> dict[str, bool]:
        """Options under which a tokenizer does not repeat the first token that a template wrote."""
        bos = self.tokenizer.bos_token  # as the processor's own chat method looks at it
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}

    def _vision_ids(self, config: Any) -> set[int]:
        """By the tables of configuration, processor and tokenizer."""
        tables = [config.to_dict(), vars(self.processor)]
        found = [v for table in tables for k, v in table.items() if _IDS.search(k)]
        found += [getattr(self.processor, "image_token_ids", None)]
        ids = {i for v in found for i in (v if isinstance(v, list) else [v])}
        added = self.tokenizer.added_tokens_decoder.items()
        ids |= {i for i, token in added if token.special and _TOKENS.search(token.content)}
        return {i for i in ids if isinstance(i, int)}

    def _try_out(self) -> None:
        """One question with a black picture, which says how this family lays pictures out."""
        text = self._chat_text("?", 1)
        self.prompt_end = end_of_prompt(text)
        try:
            prompt = self.encode("?", [Image.new("RGB", (64, 64))])
        except PromptTooLong:
            raise
        except InputError as error:
            raise InputError(f"{self.model_path}: its processor does not work: {error}") from error
        pixels = prompt.pixel_values
        more = [k for k, v in prompt.pictures.items() if v.is_floating_point() and v.ndim > 2]
        if pixels is None or more:
            raise InputError(
                f"{self.model_path}: its processor writes pictures as "
                f"{', '.join(more) or sorted(prompt.pictures)} beside pixel_values; expected "
                "pixel_values alone, which is what corruption changes"
            )
        if not torch.isfinite(pixels).all():
            raise InputError(f"{self.model_path}: a black picture has pixels that are not finite")
        self.one_picture = prompt
        self.not_corrupted_by = ("attention",)
        if self._in_rows and pixels.ndim == 2 and prompt.image_grid_thw is not None:
            return
        self.not_corrupted_by = ("attention", "evidence", "control")
        self.tiles = Tiles.of(pixels, self._block)


def pictures_only(base: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor without its part for videos, which needs torchvision."""
    attributes = ["image_processor", "tokenizer"]
    parameters = inspect.signature(base.__init__).parameters
    module = sys.modules[base.__module__]
    if getattr(module, "num2words", "") is None:  # SmolVLM counts the frames of videos with it
        module.num2words = str

    def from_args_and_dict(
        cls: type, args: Sequence[Any], settings: dict[str, Any], **more: Any
    ) -> ProcessorMixin:
        chosen = {k: v for k, v in (settings | more).items() if k in parameters}
        if "video_processor" in parameters:
            chosen["video_processor"] = None
        return cls(**chosen | dict(zip(attributes, args, strict=True)))

    members: dict[str, Any] = {
        "get_attributes": classmethod(lambda _: attributes),
        "from_args_and_dict": classmethod(from_args_and_dict),
    }
    # the same name, which is what a saved processor says it is
    return type(base.__name__, (base,), members)
