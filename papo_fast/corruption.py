"""The corrupted picture of a prompt: applies `papo_fast.masking` to what the prompt holds."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from papo_fast.config import MaskConfig
from papo_fast.data import Prompt
from papo_fast.masking import Corruption, ImageCorruption, OfficialCorruption, PatchCorruption
from papo_fast.processing import PromptEncoder


class PromptCorruptor:
    """(prompt, seed) → pixels of the `aug` stream, of the same shape as the prompt's own.

    Args:
        config: which mask, and its ratio.
        encoder: the model's image processor.
        pixels, images: a corruption of one's own, of processed patches or of raw images, in place
            of the one `config` names.
    """

    def __init__(
        self,
        config: MaskConfig,
        encoder: PromptEncoder,
        *,
        pixels: Corruption | None = None,
        images: ImageCorruption | None = None,
    ):
        self.encoder = encoder
        self.on_images = images
        self.on_pixels = pixels
        if images is None and pixels is None:
            if config.kind == "official":
                self.on_images = OfficialCorruption(config.ratio)
            else:
                self.on_pixels = PatchCorruption(
                    config.ratio, encoder.black, encoder.temporal_patch_size, encoder.patch_size
                )

    def __call__(self, prompt: Prompt, seed: int) -> Tensor | None:
        """(P, C*T*p*p) float32, or None for a prompt without pictures."""
        encoded = prompt.encoded
        if encoded.pixel_values is None:
            return None
        if self.on_images is not None:
            corrupted, _ = self.encoder.process_images(self.on_images(prompt.images, seed))
            return corrupted
        return self.on_pixels(encoded.pixel_values, encoded.image_grid_thw, seed)

    def picture(self, prompt: Prompt, seed: int) -> Image.Image | None:
        """The first corrupted picture as the model gets it, for people to look at."""
        pixels = self(prompt, seed)
        if pixels is None:
            return None
        return self.encoder.to_images(pixels, prompt.encoded.image_grid_thw[:1])[0]
