"""One step of TRL's GRPOTrainer with and without the hooks: seconds, memory, loss.

    PYTHONPATH=.:kernels python bench/trl_step.py [--rounds 3]

Loss and gradients of one prepared batch, without sampling, on a Qwen2.5-VL of the default job's
shape with a vocabulary of 49 152 words and an output embedding scaled to a policy of low entropy.
On the CPU TRL projects prompts as well; "response rows only" makes it do what it does on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import trl.trainer.utils
from measure import PeakMemory
from transformers import Qwen2_5_VLForConditionalGeneration
from trl import GRPOConfig, GRPOTrainer

from papo_fast.config import DataConfig
from papo_fast.consoles import as_command
from papo_fast.digits.model import build_checkpoint, build_tokenizer, tiny_config
from papo_fast.digits.task import write_questions
from papo_fast.integrations.conversations import conversations
from papo_fast.integrations.processor import load_processor
from papo_fast.integrations.trl import PAPOConfig, PAPOTrainer, use_token_stats

VOCABULARY, SEQUENCES, TOKENS = 49_152, 8, 64
WAYS = (
    "TRL",
    "TRL, response rows only",
    "TRL + use_token_stats",
    "PAPOTrainer, official parity",
    "PAPOTrainer",
)


def write_model(folder: Path) -> None:
    build_checkpoint(folder, 0)
    config = tiny_config(build_tokenizer())
    config.text_config.vocab_size = VOCABULARY
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.75)  # logits of std 8
    model.save_pretrained(folder)


def build(folder: Path, way: str) -> GRPOTrainer:
    ours = way.startswith("PAPO")
    settings = dict(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=SEQUENCES,
        num_generations=SEQUENCES,
        max_completion_length=TOKENS,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        beta=0.0,
        generation_kwargs={"min_new_tokens": TOKENS},
    )
    if ours:
        settings |= dict(entropy_loss_coef=0.05, aug_entropy_loss_coef=0.05)
        settings |= dict(parity="official" if "official" in way else "ours")
    trainer = (PAPOTrainer if ours else GRPOTrainer)(
        str(folder),
        lambda completions, **_: [0.0] * len(completions),
        (PAPOConfig if ours else GRPOConfig)(**settings),
        train_dataset=conversations(folder / "train.parquet", DataConfig(prompt_suffix="")),
        processing_class=load_processor(folder, min_pixels=28 * 28, max_pixels=28 * 28 * 64),
    )
    trainer.current_gradient_accumulation_steps = 1
    if "use_token_stats" in way:
        use_token_stats(trainer)
    trainer.model.train()
    return trainer


def step(trainer: GRPOTrainer, batch: dict, compact: bool) -> float:
    trainer.model.zero_grad(set_to_none=True)
    own = trl.trainer.utils._use_triton
    if compact:
        trl.trainer.utils._use_triton = lambda device: True
    try:
        loss = trainer.compute_loss(trainer.model, dict(batch))
    finally:
        trl.trainer.utils._use_triton = own
    loss.backward()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        write_questions(folder / "train.parquet", 4, "train", 0)
        trainers = {way: build(folder, way) for way in WAYS}
        batch = None
        rows = {}
        for _ in range(rounds):
            for way, trainer in trainers.items():
                if batch is None:
                    papo = trainers["PAPOTrainer"]
                    batch = papo._generate_and_score_completions(
                        [papo.train_dataset[0]] * SEQUENCES
                    )
                    batch["advantages"] = torch.linspace(-1, 1, SEQUENCES)
                compact = "rows only" in way
                step(trainer, batch, compact)  # warm
                memory = PeakMemory()
                trainer.model.zero_grad(set_to_none=True)
                memory.start()
                start = time.perf_counter()
                loss = step(trainer, batch, compact)
                rows.setdefault(way, []).append((time.perf_counter() - start, memory.read(), loss))
        entropy = trainers["TRL"]._metrics["train"]["entropy"][-1]
        positions = batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
    print(
        f"{SEQUENCES} sequences of {positions} tokens, {TOKENS} of them the response; V = "
        f"{VOCABULARY}; entropy {entropy:.2f} nats; {torch.get_num_threads()} thread\n\n"
        "| | seconds | peak MB | loss |\n| --- | ---: | ---: | ---: |"
    )
    for way, found in rows.items():
        seconds, peak, loss = (statistics.median(x) for x in zip(*found, strict=True))
        print(f"| {way} | {seconds:.2f} | {peak / 2**20:.0f} | {loss:.6f} |")


if __name__ == "__main__":
    sys.exit(as_command(main))
