"""PAPO on TRL's trainer from the default job's warm start: two epochs of some of its questions.

    PYTHONPATH=.:kernels python bench/trl_digits.py runs/digits/<key> [--questions 1024]

`make train` leaves model and data under runs/digits. Settings are those of the preset `tiny`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from papo_fast.config import DataConfig, RewardConfig
from papo_fast.consoles import as_command
from papo_fast.integrations.conversations import conversations
from papo_fast.integrations.processor import load_processor, prompt_end
from papo_fast.integrations.trl import PAPOConfig, PAPOTrainer
from papo_fast.presets import get_preset
from papo_fast.rewards.scorer import Scorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=1024)
    args = parser.parse_args()
    preset = get_preset("tiny")
    rollout, goal, data = preset.rollout, preset.objective, preset.data
    processor = load_processor(
        args.folder / "model", min_pixels=data.min_pixels, max_pixels=data.max_pixels
    )
    scorer = Scorer(RewardConfig())
    scorer.prompt_end = prompt_end(processor)

    def reward(completions, answer, **_):
        return [s.reward for s in scorer.score([c[0]["content"] for c in completions], answer)]

    with tempfile.TemporaryDirectory() as out, scorer:
        config = PAPOConfig(
            output_dir=out,
            num_train_epochs=2,
            per_device_train_batch_size=rollout.prompts * rollout.group_size,
            num_generations=rollout.group_size,
            max_completion_length=rollout.max_new_tokens,
            learning_rate=preset.train.lr,
            lr_scheduler_type="linear",
            epsilon=goal.clip_low,
            epsilon_high=goal.clip_high,
            beta=goal.kl_coef,
            kl_prcp_coef=goal.kl_prcp_coef,
            kl_prcp_clip=goal.kl_prcp_clip,
            entropy_loss_coef=goal.entropy_coef,
            aug_entropy_loss_coef=goal.aug_entropy_coef,
            model_init_kwargs={"dtype": "float32"},
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
        )
        questions = conversations(args.folder / "train.parquet", DataConfig(prompt_suffix=""))
        trainer = PAPOTrainer(
            str(args.folder / "model"),
            reward,
            config,
            train_dataset=questions.select(range(args.questions)),
            processing_class=processor,
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    print("\n| updates | reward | perception KL | entropy | entropy, corrupted |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for i in range(0, len(log), 8):
        part = log[i : i + 8]
        means = [
            statistics.mean(entry[k] for entry in part)
            for k in ("reward", "kl_prcp", "entropy", "aug_entropy")
        ]
        print(f"| {i + 1} to {i + len(part)} | {' | '.join(f'{m:.3f}' for m in means)} |")
    print(f"\n{len(log)} updates in {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(as_command(main))
