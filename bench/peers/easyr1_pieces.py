"""What compare_easyr1.py gives EasyR1: a CPU, a small model and a batch.

EasyR1's packed sequences call flash-attn. `use_cpu` gives it causal attention per sequence by
torch, and flash-attn's three functions that remove and restore padding. Nothing else is replaced.
"""

from __future__ import annotations

import functools
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from flash_attn_by_torch import use_torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
PROMPTS, RESPONSES, PROMPT, RESPONSE = 2, 2, 64, 32
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


@dataclass(frozen=True)
class Case:
    packed: bool = False
    ranks: int = 1
    fsdp: bool = False
    ulysses: int = 1
    lora: bool = False
    pictures: bool = True


def use_cpu() -> None:
    from verl.models.transformers import flash_attention_utils
    from verl.workers.actor import dp_actor

    def unpad_input(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        indices = mask.flatten().nonzero()[:, 0]
        return rearrange(hidden, "b s ... -> (b s) ...")[indices], indices

    def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
        rows = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
        return rows.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))

    dp_actor.unpad_input, dp_actor.pad_input = unpad_input, pad_input
    dp_actor.index_first_axis = lambda x, indices: x[indices]

    use_torch(flash_attention_utils)


def check_record() -> None:
    """What the tests' stand-ins have for signatures is what this EasyR1 has."""
    from verl.workers.actor import dp_actor

    record = json.loads((ROOT / "tests/data/verl_interfaces.json").read_text())
    for place, published in record["EasyR1"]["signatures"].items():
        thing = functools.reduce(getattr, place.split("."), dp_actor)
        found = list(inspect.signature(thing).parameters)
        assert found == published, f"{place} has {found}, recorded is {published}"


def model_of(folder: Path, case: Case) -> Any:
    """The model as EasyR1's worker makes it, on the CPU in float32."""
    from peft import LoraConfig as Adapters
    from peft import TaskType, get_peft_model
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers import AutoModelForImageTextToText
    from verl.models.monkey_patch import apply_ulysses_patch
    from verl.utils.fsdp_utils import get_fsdp_wrap_policy

    model = AutoModelForImageTextToText.from_pretrained(folder, torch_dtype=torch.float32)
    if case.packed:
        apply_ulysses_patch(model.config.model_type)
        # the name under which EasyR1 has put its own function, for the language model
        model.config.text_config._attn_implementation = "flash_attention_2"
        model.model.language_model.config._attn_implementation = "flash_attention_2"
    if case.lora:
        torch.manual_seed(0)
        model = get_peft_model(model, Adapters(task_type=TaskType.CAUSAL_LM, **LORA))
    if case.fsdp:
        model = FullyShardedDataParallel(
            model,
            auto_wrap_policy=get_fsdp_wrap_policy(model, is_lora_model=case.lora),
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
    return model


def config_of(case: Case, loss_type: str, average: str) -> Any:
    from verl.workers.actor import ActorConfig

    config = ActorConfig(
        micro_batch_size_per_device_for_update=2,
        micro_batch_size_per_device_for_experience=2,
        max_grad_norm=1e9,
        loss_avg_mode=average,
        loss_type=loss_type,
        padding_free=case.packed,
        dynamic_batching=False,  # it puts a tensor on the GPU, whatever the device
        ulysses_size=case.ulysses,
        use_torch_compile=False,
    )
    config.global_batch_size_per_device = PROMPTS * RESPONSES
    config.use_kl_loss, config.kl_coef, config.kl_penalty = True, 0.01, "low_var_kl"
    return config


def batch_of(processor: Any, data_rank: int, pictures: bool) -> Any:
    """What EasyR1's worker hands to its actor: prompts padded left, responses right."""
    from PIL import Image
    from verl.models.transformers.qwen2_vl import get_rope_index
    from verl.protocol import DataProto
    from verl.utils import torch_functional as VF

    generator = torch.Generator().manual_seed(data_rank)
    rows: dict[str, list[Tensor]] = {}
    inputs = []
    for n in range(PROMPTS):
        text, its, images = "What is it?" * (n + 1), {}, {}
        if pictures:
            colours = torch.randint(0, 256, (112, 56 + 28 * n, 3), generator=generator)
            images = {"images": [Image.fromarray(colours.byte().numpy())]}
            text = "<|vision_start|><|image_pad|><|vision_end|>" + text
            its = dict(processor.image_processor(**images, return_tensors="pt"))
        prompt = processor(text=[text], return_tensors="pt", **images)["input_ids"][0]
        places = get_rope_index(
            processor,
            prompt,
            image_grid_thw=its.get("image_grid_thw"),
            attention_mask=torch.ones_like(prompt),
        )
        places = torch.cat([torch.arange(len(prompt))[None], places])
        for _ in range(RESPONSES):
            ids, mask, positions = VF.postprocess_data(
                prompt, torch.ones_like(prompt), places, PROMPT, 0, left_pad=True
            )
            # an even number of tokens: EasyR1 cannot pad four rows of positions for Ulysses
            length = RESPONSE - 2 * int(torch.randint(0, 8, (), generator=generator))
            length -= len(prompt) % 2
            random = functools.partial(torch.randn, RESPONSE, generator=generator)
            kept = (torch.arange(RESPONSE) < length).long()
            answer = torch.randint(1, 200, (RESPONSE,), generator=generator) * kept
            behind = positions[:, -1:] + torch.arange(1, RESPONSE + 1)
            for name, value in dict(
                input_ids=torch.cat([ids, answer]),
                attention_mask=torch.cat([mask, kept]),
                position_ids=torch.cat([positions, behind], -1),
                responses=answer,
                response_mask=kept,
                old_log_probs=-9 + random(),
                ref_log_probs=-9 + random(),
                advantages=random(),
            ).items():
                rows.setdefault(name, []).append(value)
            inputs.append(its)
    others = {}
    if pictures:
        others["multi_modal_inputs"] = np.empty(len(inputs), dtype=object)
        others["multi_modal_inputs"][:] = inputs
    return DataProto.from_dict(
        tensors={name: torch.stack(values) for name, values in rows.items()},
        non_tensors=others,
        meta_info={"temperature": 0.8},
    )
