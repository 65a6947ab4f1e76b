"""verl's FSDP engine beside `papo_fast.integrations.verl_engine`: see verl.sh, which runs this.

Each case has processes of its own. In each, a random Qwen2.5-VL goes through verl's
`FSDPEngineWithLMHead`, which makes whole logits, and through `PAPOEngine`; the loss of PAPO is
compared with one that is computed here from the logits that verl's engine makes.

verl has no platform for CPUs and its packed attention calls flash-attn: `use_cpu` gives it both, a
platform on gloo and causal attention per sequence by torch. Nothing else of verl is replaced.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import itertools
import json
import os
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
VOCABULARY, PROMPTS, RESPONSES, LONGEST = 16_384, 2, 2, 48
EXTERNAL_LIB = "papo_fast.integrations.verl_engine"
COEFFICIENTS = {"kl_prcp_coef": 0.02, "entropy_loss_coef": 0.03, "aug_entropy_loss_coef": 0.05}
AVERAGES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


@dataclass(frozen=True)
class Case:
    packed: bool = False
    strategy: str = "fsdp2"
    ranks: int = 1
    ulysses: int = 1


CASES = {
    "padded": Case(),
    "packed": Case(packed=True),
    "packed, FSDP1": Case(packed=True, strategy="fsdp"),
    "padded, 2 ranks": Case(ranks=2),
    "packed, 2 ranks": Case(packed=True, ranks=2),
    "packed, FSDP1, 2 ranks": Case(packed=True, strategy="fsdp", ranks=2),
    "packed, Ulysses over 2 ranks": Case(packed=True, ranks=2, ulysses=2),
}


def use_cpu() -> None:
    from verl.plugin.platform import platform_manager

    class CPU(platform_manager.PlatformCUDA):
        device_name = "cpu"

        def is_available(self) -> bool:
            return True

        def current_device(self) -> torch.device:
            return torch.device("cpu")

        def communication_backend_name(self) -> str:
            return "gloo"

    platform_manager.set_platform(CPU())

    from verl.models.transformers import qwen2_vl

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p=0.0, softmax_scale=None, **_):
        parts = [
            _causal(q[a:b], k[a:b], v[a:b], softmax_scale)
            for a, b in itertools.pairwise(cu_seqlens_q.tolist())
        ]
        return torch.cat(parts)

    def one_sequence(q, k, v, attention_mask, query_length, softmax_scale=None, **_):
        return torch.stack([_causal(*row, softmax_scale) for row in zip(q, k, v, strict=True)])

    qwen2_vl.flash_attn_varlen_func = varlen
    qwen2_vl._flash_attention_forward = one_sequence
    qwen2_vl.fa_peft_integration_check = lambda q, k, v, **_: (q, k, v)  # flash-attn: no float32
    qwen2_vl._flash_supports_window_size = True
    qwen2_vl._flash_supports_deterministic = False
    qwen2_vl._flash_use_top_left_mask = False


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """(S, heads, head dim), thrice → the same."""
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    attended = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal=True, scale=scale
    )
    return attended[0].transpose(0, 1)


def check_record() -> None:
    """What the tests' stand-ins have for signatures is what this verl has."""
    record = json.loads((ROOT / "tests/data/verl_interfaces.json").read_text())
    for place, published in record["verl"]["engine"]["signatures"].items():
        module, _, dotted = place.partition(":")
        thing = functools.reduce(getattr, dotted.split("."), importlib.import_module(module))
        found = list(inspect.signature(thing).parameters)
        assert found == published, f"{place} has {found}, recorded is {published}"


def write_model(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    from support.family_checkpoints import write_processor_files

    write_processor_files(folder, "qwen2_5_vl", head_dim=32)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.vocab_size = VOCABULARY
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for p in model.parameters():  # far from uniform, so that pictures and positions matter
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)


def batch_of(processor: Any, data_rank: int, ours: bool, case: Case) -> Any:
    """What verl's trainer hands to its engine: jagged tensors, pictures beside them."""
    from PIL import Image
    from verl.models.transformers.qwen2_vl import get_rope_index
    from verl.utils import tensordict_utils as tu

    generator = torch.Generator().manual_seed(data_rank)
    rows: dict[str, list[Any]] = {}

    def add(**values: Any) -> None:
        for name, value in values.items():
            rows.setdefault(name, []).append(value)

    for n in range(PROMPTS):
        colours = torch.randint(0, 256, (112, 56 + 28 * n, 3), generator=generator)
        picture = Image.fromarray(colours.byte().numpy())
        text = "<|vision_start|><|image_pad|><|vision_end|>" + "What is it?" * (n + 1)
        its = processor(images=[picture], text=[text], return_tensors="pt")
        prompt = its["input_ids"][0]
        for _ in range(RESPONSES):
            length = int(torch.randint(LONGEST // 2, LONGEST, (), generator=generator))
            response = torch.randint(0, 200, (length,), generator=generator)
            ids = torch.cat([prompt, response])
            places = get_rope_index(processor, ids, image_grid_thw=its["image_grid_thw"])
            random = functools.partial(torch.randn, length, generator=generator)
            add(
                input_ids=ids,
                position_ids=torch.cat([torch.arange(len(ids))[None], places]),
                prompts=prompt,
                responses=response,
                loss_mask=torch.ones(length, dtype=torch.long),
                response_mask=torch.ones(length, dtype=torch.long),
                old_log_probs=-9 + random(),
                ref_log_prob=-9 + random(),
                advantages=random(),
                multi_modal_inputs={k: its[k] for k in ("pixel_values", "image_grid_thw")},
            )
    pictures = rows.pop("multi_modal_inputs")
    tensors: dict[str, Any] = {
        name: torch.nested.as_nested_tensor(values, layout=torch.jagged)
        for name, values in rows.items()
    }
    return tu.get_tensordict(
        tensors | {"multi_modal_inputs": pictures},
        {
            "temperature": 0.8,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": 2,
            "global_batch_size": PROMPTS * RESPONSES * (case.ranks // case.ulysses),
            "use_remove_padding": case.packed,
            "use_fused_kernels": ours,
            "calculate_entropy": True,
            "max_response_len": max(len(r) for r in rows["responses"]),
        },
    )


def engine_of(folder: Path, case: Case, ours: bool, papo: dict | None = None) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    parts = dict(
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
            strategy=case.strategy,
            ulysses_sequence_parallel_size=case.ulysses,
            mixed_precision=dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32"),
            use_orig_params=True,
            use_torch_compile=False,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    if ours:
        engine = EngineRegistry.new("language_model", case.strategy, **parts)
        assert type(engine).__name__ == "PAPOEngine", type(engine)
    else:
        engine = FSDPEngineWithLMHead(**parts)
    engine.initialize()
    return engine


def ppo_loss_of(case: Case, average: str) -> Any:
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss

    config = FSDPActorConfig(
        strategy=case.strategy,
        rollout_n=RESPONSES,
        ppo_micro_batch_size_per_gpu=2,
        clip_ratio_high=0.3,
        use_kl_loss=True,
        kl_loss_coef=0.01,
        loss_agg_mode=average,
    )
    return functools.partial(ppo_loss, config=config)


def papo_by_logits(engine: Any, processor: Any, loss_function: Any, trained: bool) -> Any:
    """A `forward_step` for verl's own engine: PAPO's loss from two passes of whole logits."""
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.workers.utils.padding import no_padding_2_padding

    from papo_fast.data.corruption import PatchCorruption, prompt_seed

    corrupt = PatchCorruption.of(processor.image_processor, 0.6)

    def jagged(values: Tensor, output_args: dict, offsets: Tensor) -> Tensor:
        if "pad_size" in output_args:
            values = engine._gather_and_unpad_packed(values[0], output_args["pad_size"])
        else:
            values = torch.cat(
                [row[:n] for row, n in zip(values, offsets.diff().tolist(), strict=True)]
            )
        return torch.nested.nested_tensor_from_jagged(values, offsets)

    def forward_step(micro_batch: Any, _: Any, forward_only: bool) -> Any:
        inputs, output_args = engine.prepare_model_inputs(micro_batch=micro_batch)
        pixels = [
            corrupt(
                its["pixel_values"],
                its["image_grid_thw"],
                prompt_seed(0, 0, zlib.crc32(prompt.numpy().tobytes())),
            )
            for prompt, its in zip(
                micro_batch["prompts"].unbind(), micro_batch["multi_modal_inputs"], strict=True
            )
        ]
        with torch.set_grad_enabled(trained):
            aug = engine.module(**{**inputs, "pixel_values": torch.cat(pixels)}, use_cache=False)
        real = engine.module(**inputs, use_cache=False)
        p, q = ((out.logits / 0.8).log_softmax(-1) for out in (real, aug))
        statistics = {
            "kl_prcp": (p.exp() * (p - q)).sum(-1),
            "entropy_loss": -(p.exp() * p).sum(-1),
            "aug_entropy_loss": -(q.exp() * q).sum(-1),
        }
        found = engine.prepare_model_outputs(real, output_args, micro_batch, None)
        loss, metrics = loss_function(model_output=found, data=micro_batch)
        mask = micro_batch.select("response_mask").to_padded_tensor()["response_mask"].bool()
        config = loss_function.keywords["config"]
        for name, values in statistics.items():
            values = jagged(values, output_args, micro_batch["input_ids"].offsets())
            term = agg_loss(
                no_padding_2_padding(values, micro_batch),
                mask,
                config.loss_agg_mode,
                **config.global_batch_info,
            )
            sign = -1 if name == "kl_prcp" else 1
            loss = loss + sign * COEFFICIENTS[f"{name}_coef"] * term
        return loss, {"model_output": {}, "loss": loss.item(), "metrics": metrics}

    return forward_step


def gradients(module: Any) -> dict[str, Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
    from torch.distributed.tensor import DTensor

    def whole(gradient: Tensor) -> Tensor:  # FSDP2 keeps shards
        return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()

    def cleaned() -> dict[str, Tensor]:
        return {
            name.replace("_fsdp_wrapped_module.", ""): whole(p.grad)
            for name, p in module.named_parameters()
            if p.grad is not None
        }

    if isinstance(module, FSDP1):
        with FSDP1.summon_full_params(module, with_grads=True):
            return cleaned()
    return cleaned()


def update(engine: Any, data: Any, loss_function: Any) -> tuple[float, dict[str, Tensor], float]:
    """The loss and the gradients of one update, and its seconds."""
    with engine.train_mode():
        engine.optimizer_zero_grad()
        start = time.perf_counter()
        out = engine.forward_backward_batch(data, loss_function)
        seconds = time.perf_counter() - start
        found = gradients(engine.module)
    loss = torch.tensor(sum(out["loss"]))
    torch.distributed.all_reduce(loss)
    return loss.item() / torch.distributed.get_world_size(), found, seconds


def statistics(engine: Any, data: Any) -> dict[str, Tensor]:
    """(B, L) log-probs and entropies, as verl's trainer asks for them before an update."""
    from verl.workers.utils.padding import no_padding_2_padding

    with engine.eval_mode():
        out = engine.infer_batch(data)["model_output"]
    return {name: no_padding_2_padding(out[name], data) for name in ("log_probs", "entropy")}


def farthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of a gradient's element, over the largest element there is."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    largest = max(g.abs().max() for g in theirs.values())
    return max(((ours[k] - g).abs().max() / largest).item() for k, g in theirs.items())


def run_case(rank: int, case: Case, folder: Path, out: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    use_cpu()
    check_record()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case.ranks), "LOCAL_RANK": "0"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out}.init", rank=rank, world_size=case.ranks
    )
    losses = {average: ppo_loss_of(case, average) for average in AVERAGES}
    theirs: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    seconds: dict[str, float] = {}

    def updates(engine: Any, data: Any, label: str) -> dict[str, Any]:
        found = {average: update(engine, data, losses[average]) for average in AVERAGES}
        again = [update(engine, data, losses["token-mean"])[2] for _ in range(rounds)]
        seconds[label] = min(again)
        return found

    engine = engine_of(folder, case, ours=False)
    processor = engine.model_config.processor
    data = functools.partial(batch_of, processor, rank // case.ulysses, case=case)
    theirs["statistics"] = statistics(engine, data(ours=False))
    theirs["GRPO"] = updates(engine, data(ours=False), "verl")
    for trained in (False, True):
        name = "PAPO, trained" if trained else "PAPO"
        theirs[name] = {}
        for average in AVERAGES:
            engine.forward_step = papo_by_logits(engine, processor, losses[average], trained)
            theirs[name][average] = update(engine, data(ours=False), losses[average])
        seconds[f"{name}, logits"] = min(
            update(engine, data(ours=False), losses["token-mean"])[2] for _ in range(rounds)
        )
    del engine

    engine = engine_of(folder, case, ours=True)
    ours["statistics"] = statistics(engine, data(ours=True))
    ours["GRPO"] = updates(engine, data(ours=True), "hook")
    for name, aug in (("PAPO", "frozen"), ("PAPO, trained", "trained")):
        engine = engine_of(folder, case, ours=True, papo=COEFFICIENTS | {"aug": aug})
        ours[name] = updates(engine, data(ours=True), f"{name}, hook")

    row: dict[str, Any] = {"seconds": seconds}
    for name, x in theirs["statistics"].items():
        row[name] = (ours["statistics"][name] - x).abs().max().item()
    for name in ("GRPO", "PAPO", "PAPO, trained"):
        pairs = [(ours[name][a], theirs[name][a]) for a in AVERAGES]
        row[f"{name}: loss"] = max(abs(x[0] - y[0]) / max(1, abs(y[0])) for x, y in pairs)
        row[f"{name}: gradients"] = max(farthest(x[1], y[1]) for x, y in pairs)
    row["what PAPO adds"] = abs(theirs["PAPO"]["token-mean"][0] - theirs["GRPO"]["token-mean"][0])
    if rank == 0:
        out.write_text(json.dumps(row))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest is told")
    arguments = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        for number, label in enumerate(arguments.case or CASES):
            case = CASES[label]
            out = folder / f"case{number}"
            torch.multiprocessing.spawn(
                run_case, (case, folder / "model", out, arguments.rounds), nprocs=case.ranks
            )
            rows[label] = json.loads(out.read_text())
            print(label, json.dumps(rows[label]), flush=True)
    print(table(rows))


def table(rows: dict[str, dict[str, Any]]) -> str:
    columns = [name for name in next(iter(rows.values())) if name != "seconds"]
    timed = list(next(iter(rows.values()))["seconds"])
    lines = [
        "differences from verl's logits; loss and gradients are the largest of its five averages",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(f"{row[c]:.1e}" for c in columns) + " |")
    lines += [
        "",
        "seconds of one update, one thread per rank",
        "| | " + " | ".join(timed) + " |",
        "|---|" + "---:|" * len(timed),
    ]
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(f"{row['seconds'][c]:.2f}" for c in timed) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
