"""Peak memory of one update, measured beside what `papo-fast plan` says: python update_memory.py

Small models of random weights on the CPU, each way in a process of its own. With --ranks also
sharded over two processes, with and without offload, where the figure is that of the main process.
"""

import argparse
import ctypes
import dataclasses
import gc
import importlib.util
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from measure import PeakMemory, machine
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from papo_fast.config import Config
from papo_fast.consoles import as_command
from papo_fast.data.encoded import EncodedPrompt
from papo_fast.data.prompts import Prompt
from papo_fast.experience import add_logprobs
from papo_fast.model.policy import Policy
from papo_fast.parallel import process_group
from papo_fast.planning.arguments import Lengths
from papo_fast.planning.memory import Layout, plan_memory
from papo_fast.planning.sizes import ModelSizes
from papo_fast.presets import get_preset
from papo_fast.rewards.scorer import Score
from papo_fast.samples import Completion, Group, Sample, all_samples
from papo_fast.update import Updater

VISION_START, VISION_END, IMAGE, VIDEO = range(1, 5)
# glibc then hands every larger block back at once, so that what is measured is what is held
MMAP_THRESHOLD = 1 << 16
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8


@dataclass(frozen=True)
class Case:
    """A small model and the prompts of one update."""

    family: str
    hidden: int
    inner: int
    layers: int
    vocab: int
    vision_hidden: int
    vision_layers: int
    patches: tuple[int, int] = (16, 20)
    text: int = 20
    response: int = 40
    prompts: int = 4
    group_size: int = 4
    together: int = 2
    """Prompts of one micro-batch."""
    head: int = 32
    """Size of a head of the language model; a quarter as many of keys as of queries."""
    vision_head: int = 16

    @property
    def lengths(self):
        return Lengths(self.patches[0] * self.patches[1] // 4, self.text, self.response)

    def model_config(self):
        text = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // self.head,
            "num_key_value_heads": max(1, self.hidden // self.head // 4),
            "head_dim": self.head,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [self.head // 8, *[3 * self.head // 16] * 2],
            },
        }
        vision = {
            "depth": self.vision_layers,
            "hidden_size": self.vision_hidden,
            "intermediate_size": 3 * self.vision_hidden,
            "out_hidden_size": self.hidden,
            "num_heads": self.vision_hidden // self.vision_head,
        }
        ids = {
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "tie_word_embeddings": False,
        }
        if self.family == "qwen3_vl":
            vision |= {"patch_size": 16, "num_position_embeddings": 256}
            vision["deepstack_visual_indexes"] = [0]
            return Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
        vision |= {"patch_size": 14, "window_size": 112}
        vision["fullatt_block_indexes"] = [self.vision_layers - 1]
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)


# Weights and activations each a good part of it; seconds of one core.
CASES = {
    "qwen2.5": Case("qwen2_5_vl", 384, 1536, 4, 4000, 192, 3),
    "qwen3": Case("qwen3_vl", 384, 1024, 5, 3000, 192, 3),
}
HALF = {"dtype": "bfloat16", "weights_dtype": "bfloat16"}
EIGHT = {"optimizer": "adamw_8bit"}
QLORA = {"dtype": "bfloat16", "lora_rank": 16, "quantize": "nf4"}
# name: changes to model, to train, to parallel, processes
WAYS = {
    "plain": ({}, {}, {}, 1),
    "gradient checkpointing": ({"gradient_checkpointing": True}, {}, {}, 1),
    "frozen vision tower": ({"train_vision": False}, {}, {}, 1),
    "LoRA, rank 16": ({"lora_rank": 16}, {}, {}, 1),
    "LoRA and checkpointing": ({"lora_rank": 16, "gradient_checkpointing": True}, {}, {}, 1),
    "bfloat16 reference": ({"reference_dtype": "bfloat16"}, {}, {}, 1),
    "8-bit AdamW": ({}, EIGHT, {}, 1),
    "both": ({"reference_dtype": "bfloat16"}, EIGHT, {}, 1),
    "offload": ({}, {}, {"offload": True}, 1),
    "computed in bfloat16": ({"dtype": "bfloat16"}, {}, {}, 1),
    "bfloat16 weights": (HALF, {}, {}, 1),
    "bfloat16 weights, float32 copy": (HALF, {"master_weights": True}, {}, 1),
    "all in bfloat16, 8-bit AdamW": ({**HALF, "reference_dtype": "bfloat16"}, EIGHT, {}, 1),
    "LoRA on 4 bits": (QLORA, {}, {}, 1),
    "two processes": ({}, {}, {}, 2),
    "two processes, checkpointing": ({"gradient_checkpointing": True}, {}, {}, 2),
    "two processes, offload": ({}, {}, {"offload": True}, 2),
}


def write_checkpoint(case, path):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(case.model_config(), dtype=torch.float32)
    model.generation_config = GenerationConfig()
    model.save_pretrained(path)


def configuration(case, path, model=None, parallel=None, train=None) -> Config:
    """One update of two micro-batches and more; a reference model, both streams."""
    preset = get_preset("papo-g-7b")
    objective = replace(preset.objective, parity="ours", aug="trained")
    room = round(2 * case.together * case.lengths.tree(case.group_size))
    return replace(
        preset,
        objective=objective.resolved(),
        model=replace(
            preset.model,
            path=str(path),
            **({"dtype": "float32", "gradient_checkpointing": False} | (model or {})),
        ),
        rollout=replace(preset.rollout, prompts=case.prompts, group_size=case.group_size),
        train=replace(preset.train, update_prompts=case.prompts, max_tokens=room, **(train or {})),
        parallel=replace(preset.parallel, **(parallel or {})),
    )


def experience(case):
    """Groups of prompts with random pictures and responses of equal length."""
    g = torch.Generator().manual_seed(0)

    def words(n):
        return torch.randint(5, case.vocab, (n,), generator=g)

    h, w = case.patches
    width = 3 * 2 * (16 if case.family == "qwen3_vl" else 14) ** 2
    groups = []
    for i in range(case.prompts):
        mark = torch.tensor([VISION_START]), torch.tensor([VISION_END])
        image = torch.tensor([IMAGE]).expand(case.lengths.image)
        ids = torch.cat([words(5), mark[0], image, mark[1], words(case.text - 7)])
        pixels = torch.randn(h * w, width, generator=g)
        encoded = EncodedPrompt(ids, (ids == IMAGE).long(), pixels, torch.tensor([[1, h, w]]))
        corrupted = torch.randn(h * w, width, generator=g)
        samples = []
        for j in range(case.group_size):
            right = float((i * case.group_size + j) % 2)
            tokens = words(case.response).tolist()
            samples.append(
                Sample(
                    Completion(tokens, [-1.0] * case.response, True),
                    score=Score(right, right, 1.0, False),
                )
            )
        groups.append(Group(Prompt(i, "", "", "", [], encoded), samples, corrupted))
    samples = all_samples(groups)
    for sample, advantage in zip(samples, torch.randn(len(samples), generator=g), strict=True):
        sample.advantage = advantage.item()
    return groups


def peak_of_update(case, config, device="cpu"):
    """Bytes held at most by a policy, its reference and two updates, beyond the data.

    The first update is a small one: it makes the optimizer's moments.
    """
    device = torch.device(device)
    if device.type == "cpu":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        libc.mallopt(M_ARENA_MAX, 1)
        torch.set_num_threads(1)
    data, memory = experience(case), PeakMemory(device)
    memory.start()
    before = memory.before
    policy = Policy.load(config.model, [], device, config.parallel)
    reference = policy.reference(config)
    updater = Updater(config, policy, reference, total_updates=2)
    gc.collect()
    memory.start()  # what loading took is not asked
    memory.before = before
    add_logprobs(data, policy, reference, config)
    for count in (1, len(data)):
        updater.update(data[:count], lambda _: None)
    return memory.read()


def warm_up(like: Config | None = None):
    """An update of next to nothing, for all that Python imports when it is first needed.

    like: whose options it has; None: none.
    """
    case = Case("qwen2_5_vl", 128, 64, 1, 100, 32, 1, (4, 4), 8, 4, 2, 2, 1)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(case, folder)
        config = configuration(case, folder)
        if like is not None:
            train = replace(config.train, optimizer=like.train.optimizer)
            model = replace(like.model, path=folder)
            config = replace(config, model=model, train=train)
        peak_of_update(case, config)


def _child(pipe, case, config, rank, ranks, port):
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    # With AVX512_BF16 oneDNN compiles a product for each shape and keeps it: 25 MiB, however large
    # the model is. So bfloat16 is measured as on other processors.
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"
    warm_up(config)  # a fork does not inherit which pages of the libraries are in memory
    with process_group(torch.device("cpu"), config.parallel.offload):
        peak = peak_of_update(case, config)
    if rank == 0:
        pipe.send(peak)


def measure(case, config, ranks=1):
    """Peak bytes of a fresh process, the main one of `ranks`."""
    # forked off a process that has imported what is needed and done nothing else
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["update_memory"])
    ours, theirs = fork.Pipe()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [
        fork.Process(target=_child, args=(theirs, case, config, rank, ranks, port))
        for rank in range(ranks)
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    if any(p.exitcode for p in processes):
        raise RuntimeError(f"a measured process ended with {[p.exitcode for p in processes]}")
    return ours.recv()


def planned(case, config, ranks=1, gpu_memory=None):
    """The plan of the same update, on the CPU without `gpu_memory`; no sampler is there."""
    config = replace(config, rollout=replace(config.rollout, engine="vllm_server"))
    layout = Layout(ranks=ranks, gpu_memory=gpu_memory)
    return plan_memory(config, ModelSizes.of(config.model), case.lengths, layout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="qwen2.5")
    parser.add_argument("--ranks", action="store_true", help="also two processes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    case, rows = CASES[arguments.case], []
    console = Console()
    table = Table(title=f"peak of an update, MiB; {arguments.case}")
    for heading in ("way", "measured", "planned", "error", "the plan's largest parts"):
        table.add_column(heading, justify="left" if heading in ("way",) else "right")
    transformers.logging.disable_progress_bar()
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(case, folder)
        for name, (model, train, parallel, ranks) in WAYS.items():
            if ranks > 1 and not arguments.ranks:
                continue
            if (train == EIGHT or model == QLORA) and not importlib.util.find_spec("bitsandbytes"):
                continue
            config = configuration(case, folder, model, parallel, train)
            got, plan = measure(case, config, ranks), planned(case, config, ranks)
            parts = sorted(plan.update.items(), key=lambda x: -x[1])[:4]
            told = sum(plan.update.values()) + plan.host
            text = ", ".join(f"{k} {v / 2**20:.0f}" for k, v in parts)
            error = told / got - 1
            table.add_row(name, f"{got / 2**20:.0f}", f"{told / 2**20:.0f}", f"{error:+.0%}", text)
            rows.append({"way": name, "measured": got, "planned": told})
    console.print(table)
    if arguments.json:
        about = {"machine": machine(), "case": dataclasses.asdict(case), "rows": rows}
        arguments.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(as_command(main))
