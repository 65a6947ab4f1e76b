"""What compare_verl.py gives verl: a CPU, a small model, a batch, and configurations.

verl has no platform for CPUs and its packed attention calls flash-attn: `use_cpu` gives it both, a
platform on gloo and causal attention per sequence by torch. Nothing else of verl is replaced.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flash_attn_by_torch import use_torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
PROMPTS, RESPONSES, LONGEST = 2, 2, 48
STRATEGY = "fsdp2"  # verl asks FSDP1 to sync_module_states, which torch refuses on CPUs
EXTERNAL_LIB = "papo_fast.integrations.verl_engine"


@dataclass(frozen=True)
class Case:
    packed: bool = False
    ranks: int = 1
    ulysses: int = 1


def use_cpu() -> None:
    from verl.plugin.platform import platform_manager

    counters = [f"{x}memory_{y}" for x in ("", "max_") for y in ("allocated", "reserved")]

    class CPU(platform_manager.PlatformCUDA):
        device_name = "cpu"
        device_module = types.SimpleNamespace(  # its memory is logged
            **dict.fromkeys(counters, lambda *_: 0),
            mem_get_info=lambda: (0, 0),
            empty_cache=lambda: None,
            get_device_name=lambda: "CPU",
            is_available=lambda: True,
            synchronize=lambda *_: None,
        )

        def is_available(self) -> bool:
            return True

        def current_device(self) -> torch.device:
            return torch.device("cpu")

        def communication_backend_name(self) -> str:
            return "gloo"

    platform_manager.set_platform(CPU())

    from verl.models.transformers import qwen2_vl

    use_torch(qwen2_vl)


def check_record() -> None:
    """What the tests' stand-ins have for signatures is what this verl has."""
    record = json.loads((ROOT / "tests/data/verl_interfaces.json").read_text())
    for place, published in record["verl"]["engine"]["signatures"].items():
        module, _, dotted = place.partition(":")
        thing = functools.reduce(getattr, dotted.split("."), importlib.import_module(module))
        found = list(inspect.signature(thing).parameters)
        assert found == published, f"{place} has {found}, recorded is {published}"


def batch_of(processor: Any, data_rank: int, ours: bool, case: Case) -> Any:
    """What verl's trainer hands to its engine, by verl's own way there from padded rows."""
    from PIL import Image
    from verl.models.transformers.qwen2_vl import get_rope_index
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    generator = torch.Generator().manual_seed(data_rank)
    rows: dict[str, list[Tensor]] = {}
    pictures = []

    def add(before: int = 0, **values: Tensor) -> None:
        for name, value in values.items():
            behind = longest[name] - before - value.shape[-1] if name in longest else 0
            padded = torch.nn.functional.pad(value, (before, behind))
            rows.setdefault(name, []).append(padded)

    most = 64
    whole = dict.fromkeys(("input_ids", "attention_mask", "position_ids"), most + LONGEST)
    response = ("responses", "response_mask", "old_log_probs", "ref_log_prob", "advantages")
    longest = whole | dict.fromkeys(response, LONGEST)
    for n in range(PROMPTS):
        colours = torch.randint(0, 256, (112, 56 + 28 * n, 3), generator=generator)
        picture = Image.fromarray(colours.byte().numpy())
        text = "<|vision_start|><|image_pad|><|vision_end|>" + "What is it?" * (n + 1)
        its = processor(images=[picture], text=[text], return_tensors="pt")
        prompt = its["input_ids"][0]
        for _ in range(RESPONSES):
            length = int(torch.randint(LONGEST // 2, LONGEST, (), generator=generator))
            answer = torch.randint(0, 200, (length,), generator=generator)
            ids = torch.cat([prompt, answer])
            places = get_rope_index(processor, ids, image_grid_thw=its["image_grid_thw"])
            random = functools.partial(torch.randn, length, generator=generator)
            before = most - len(prompt)
            add(
                before,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.cat([torch.arange(len(ids))[None], places]),
                prompts=prompt,
            )
            add(
                responses=answer,
                response_mask=torch.ones_like(answer),
                old_log_probs=-9 + random(),
                ref_log_prob=-9 + random(),
                advantages=random(),
            )
            pictures.append({k: its[k] for k in ("pixel_values", "image_grid_thw")})
    data = tu.get_tensordict(
        {name: torch.stack(values) for name, values in rows.items()}
        | {"multi_modal_inputs": pictures},
        {
            "temperature": 0.8,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": 2,
            "global_batch_size": PROMPTS * RESPONSES * (case.ranks // case.ulysses),
            "use_remove_padding": case.packed,
            "use_fused_kernels": ours,
            "calculate_entropy": True,
        },
    )
    return left_right_2_no_padding(data)


def parts_of(folder: Path, case: Case, ours: bool, papo: dict | None = None) -> dict[str, Any]:
    """What verl makes an engine or a worker from."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    return dict(
        model_config=HFModelConfig(
            path=str(folder),
            external_lib=EXTERNAL_LIB if ours else None,
            use_remove_padding=case.packed,
            use_fused_kernels=ours,
            fused_kernel_options={"impl_backend": "torch", "papo": papo or {}} if ours else {},
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy=STRATEGY,
            ulysses_sequence_parallel_size=case.ulysses,
            mixed_precision=dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32"),
            use_orig_params=True,
            use_torch_compile=False,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
