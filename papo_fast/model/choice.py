"""Which path a checkpoint takes: the fast one for families that it knows, else the plain one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from papo_fast.config import Config, DataConfig, ModelConfig
from papo_fast.data.encoder import FAMILIES, PromptEncoder
from papo_fast.data.model_folder import check_files, optional_file, read_object
from papo_fast.data.plain_encoder import PlainEncoder
from papo_fast.errors import InputError
from papo_fast.model.plain import PlainPolicy
from papo_fast.model.policy import Policy

_NO_DECODER = "it is an encoder and a decoder, and the plain path scores decoders"
_NO_CHAT = "it has no chat template, and the data are chats"
_TWO = "its processor writes pictures as two tensors, and corruption changes one"
_CODES = "it reads pictures as codes of a vocabulary, which corruption of pixels would redraw"
REFUSED = {
    "blip": _NO_CHAT,
    "blip-2": _NO_CHAT,
    "chameleon": _CODES,
    "cosmos3_edge": _CODES,
    "cosmos3_omni": _CODES,
    "deepseek_vl_hybrid": _TWO,
    "diffusion_gemma": "it fills in blocks by diffusion, and has no log-prob of a token",
    "emu3": _CODES,
    "evolla": "it reads proteins",
    "florence2": _NO_DECODER,
    "git": _NO_CHAT,
    "instructblip": _NO_CHAT,
    "instructblipvideo": "it reads videos",
    "janus": _CODES,
    "kosmos-2": _NO_CHAT,
    "kosmos-2.5": _NO_CHAT,
    "pi0": "it writes the actions of a robot",
    "pix2struct": _NO_DECODER,
    "pp_formulanet": _NO_DECODER,
    "t5gemma2": _NO_DECODER,
    "udop": _NO_DECODER,
    "video_llava": _TWO,
    "vision-encoder-decoder": _NO_DECODER,
}
"""Family → why neither path takes it. What else is wrong with a family is found by trying."""


def is_plain(model: ModelConfig) -> bool:
    """Whether a checkpoint goes the plain path.

    Raises `InputError` for a family that goes neither, or not the one that is asked for.
    """
    check_files(model.path)
    file = optional_file(model.path, "config.json")
    family = None if file is None else read_object(Path(file)).get("model_type")
    if not isinstance(family, str):
        return model.forward == "plain"  # the encoder says what is wrong with the file
    if family in REFUSED:
        raise InputError(f"model.path is a {family!r} model, which cannot train: {REFUSED[family]}")
    if family in FAMILIES:
        return model.forward == "plain"
    if family not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and not model.trust_remote_code:
        raise InputError(
            f"{file} is a {family!r} model; supported are the image-text-to-text models of "
            f"transformers, and {', '.join(FAMILIES)} on the fast path"
        )
    if model.forward == "fast":
        raise InputError(
            f"model.forward is fast, but model.path is a {family!r} model, and the fast path "
            f"takes {', '.join(FAMILIES)}: pass --model.forward auto"
        )
    return True


def load_encoder(model: ModelConfig, data: DataConfig) -> PromptEncoder:
    """The encoder of a checkpoint, of its path."""
    kind = PlainEncoder if is_plain(model) else PromptEncoder
    return kind(model.path, data, trust_remote_code=model.trust_remote_code)


def refuse_on_plain(config: Config) -> None:
    """Raise `InputError` for options that save memory on the fast path alone."""
    for name, asked in {
        "model.quantize": config.model.quantize != "none",
        "parallel.offload_activations": config.parallel.offload_activations,
    }.items():
        if asked:
            raise InputError(f"{name} is set, which needs the fast path: leave it out")


def load_policy(
    config: Config,
    encoder: PromptEncoder,
    device: torch.device,
    mesh: DeviceMesh | None = None,
) -> Policy:
    """The policy of `config.model`, of the same path as its `encoder`, sharded where it should."""
    setup = (encoder.banned_token_ids, device, config.parallel, mesh)
    if not isinstance(encoder, PlainEncoder):
        return Policy.load(config.model, *setup)
    refuse_on_plain(config)
    policy = PlainPolicy.load(config.model, *setup)
    policy.stand_in = encoder.one_picture
    return policy
