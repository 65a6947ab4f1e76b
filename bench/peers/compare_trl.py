"""TRL's `GRPOTrainer` beside `papo_fast.integrations.trl`: see trl.sh, which runs this.

Each row trains four trainers for the same optimiser steps on the same sampled responses: TRL's own,
the same with `use_token_stats`, `PAPOTrainer`, and PAPO with its terms from whole logits. Two
processes run under `torchrun` on gloo. `grad_budget` is 0: what differs is an error.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets.utils.logging import disable_progress_bar
from tiny_model import write_model

from papo_fast.digits.task import write_questions
from support.trl_peer import KINDS, Case, row_of

LOSS_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo")
# Where numbers are rounded nothing is clipped, as a token on the edge would be in one of two, and
# the first step is small, so that the second starts from the same weights.
ROUNDED = {"epsilon": 0.9, "epsilon_high": 9.0, "delta": None, "learning_rate": 1e-4}
LORA = {
    "r": 4,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "init_lora_weights": False,  # so that both matrices of an adapter have gradients
}
TWICE = {"gradient_accumulation_steps": 2}
CHECKPOINTED = {"gradient_checkpointing": True}
TRAINED = {"aug": "trained"}

CASES = {
    **{f"loss_type={name}": Case({"loss_type": name}) for name in LOSS_TYPES},
    **{
        f"{name}, ratio of a sequence": Case(
            {"loss_type": name, "importance_sampling_level": "sequence"}
        )
        for name in ("grpo", "luspo", "cispo")
    },
    "beta=0.04": Case({"beta": 0.04}),
    "beta=0.04, bias correction": Case({"beta": 0.04, "use_bias_correction_kl": True}),
    "2 micro-batches, dapo": Case(TWICE),
    "2 micro-batches, grpo": Case({**TWICE, "loss_type": "grpo"}),
    "2 micro-batches, bnpo": Case({**TWICE, "loss_type": "bnpo"}),
    "2 × 2 updates of a rollout, dapo": Case({**TWICE, "steps_per_generation": 4, "max_steps": 4}),
    "entropy_coef=0.1": Case({"entropy_coef": 0.1}, papo={"entropy_loss_coef": 0.0}),
    "top_entropy_quantile=0.5": Case({"top_entropy_quantile": 0.5}),
    "off_policy_mask_threshold=0.01": Case({"off_policy_mask_threshold": 0.01}),
    "truncated responses masked": Case({"mask_truncated_completions": True}),
    "gradient checkpointing": Case({**CHECKPOINTED}, papo=TRAINED),
    "the same, reentrant": Case(
        {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, papo=TRAINED
    ),
    "LoRA, beta=0.04": Case({"beta": 0.04}, lora=LORA),
    "LoRA, gradient checkpointing": Case({**CHECKPOINTED}, papo=TRAINED, lora=LORA),
    "gradients into both streams": Case(papo=TRAINED),
    "bf16 (autocast)": Case({"bf16": True, **ROUNDED}),
    "bf16, LM head in float32": Case({"bf16": True, "cast_lm_head_to_fp32": True, **ROUNDED}),
    "bfloat16 weights": Case({"model_init_kwargs": {"dtype": "bfloat16"}, **ROUNDED}),
    "2 processes, dapo": Case(ranks=2),
    "2 processes × 2 micro-batches, dapo": Case({**TWICE}, ranks=2),
    "2 processes, grpo, beta=0.04": Case({"loss_type": "grpo", "beta": 0.04}, ranks=2),
    "2 processes, bnpo, both streams": Case({"loss_type": "bnpo"}, papo=TRAINED, ranks=2),
    "2 processes, LoRA, checkpointing": Case({**CHECKPOINTED}, papo=TRAINED, lora=LORA, ranks=2),
    "2 processes, bf16": Case({"bf16": True, **ROUNDED}, ranks=2),
}


def run(labels: list[str], folder: Path, out: Path) -> None:
    """The rows of `labels` in this process, which is one of all their ranks'."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bar()
    rows = {}
    for label in labels:
        rows[label] = row_of(CASES[label], folder)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            print(label, json.dumps(rows[label]), file=sys.stderr, flush=True)
            out.write_text(json.dumps(rows))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def table(rows: dict[str, dict[str, Any]]) -> str:
    columns = [name for name in next(iter(rows.values())) if name != "seconds"]
    lines = [
        "| | " + " | ".join([*columns, *(f"{kind}, s" for kind in KINDS)]) + " |",
        "|---|" + "---:|" * (len(columns) + len(KINDS)),
    ]
    for label, row in rows.items():
        cells = [f"{row[c]:.0e}" for c in columns]
        cells += [f"{row['seconds'][kind]:.2f}" for kind in KINDS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # a rank's own arguments
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    labels = arguments.case or list(CASES)
    if arguments.out is not None:
        run(labels, arguments.folder, arguments.out)
        return
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        write_questions(folder / "train.parquet", 16, "train", 0)
        for ranks in (1, 2):
            chosen = [label for label in labels if CASES[label].ranks == ranks]
            if not chosen:
                continue
            out = folder / f"rows{ranks}.json"
            start = [sys.executable]
            if ranks > 1:
                # `accelerate launch` starts several processes without GPUs only through MPI
                start += ["-m", "torch.distributed.run", "--standalone"]
                start += ["--nproc_per_node", str(ranks)]
            command = [*start, __file__, "--folder", str(folder), "--out", str(out)]
            for label in chosen:
                command += ["--case", label]
            subprocess.run(command, check=True)
            rows |= json.loads(out.read_text())
    print(*(f"{module.__name__} {module.__version__}" for module in (trl, transformers, torch)))
    print(table({label: rows[label] for label in labels}))


if __name__ == "__main__":
    main()
