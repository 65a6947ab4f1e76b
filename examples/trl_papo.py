"""PAPO on TRL's GRPOTrainer, full or LoRA. Needs the extras trl and lora (CONTRIBUTING.md).

    .venv/bin/python examples/trl_papo.py --use_cpu
    accelerate launch examples/trl_papo.py --model Qwen/Qwen2.5-VL-3B-Instruct --data DATA.parquet
        --bf16 --lora 16 --per_device_train_batch_size 8 --num_generations 8 --learning_rate 1e-6

Without a model and data it makes small ones. Every field of PAPOConfig, and so of TRL's GRPOConfig,
is an option; `--help` lists them.
"""

from dataclasses import dataclass, field

from peft import LoraConfig
from tiny import reward, tiny_files
from trl import TrlParser

from papo_fast.config import DataConfig
from papo_fast.integrations.conversations import conversations
from papo_fast.integrations.processor import load_processor
from papo_fast.integrations.trl import PAPOConfig, PAPOTrainer


@dataclass
class Script:
    model: str | None = field(default=None, metadata={"help": "Checkpoint directory."})
    data: str | None = field(default=None, metadata={"help": ".parquet or .jsonl file."})
    lora: int = field(default=0, metadata={"help": "Rank of the adapter; 0: train all weights."})


def rewards(completions, answer, **_):
    return [reward(c[0]["content"], a) for c, a in zip(completions, answer, strict=True)]


def main() -> None:
    script, config = TrlParser((Script, PAPOConfig)).parse_args_and_config()
    small = script.model is None
    if small:
        script.model, script.data = tiny_files()
        config.max_steps, config.max_completion_length, config.logging_steps = 5, 12, 1
        config.report_to, config.gradient_checkpointing, config.save_strategy = [], False, "no"
    pixels = dict(min_pixels=28 * 28, max_pixels=28 * 28 * 64) if small else {}
    trainer = PAPOTrainer(
        script.model,
        rewards,
        config,
        train_dataset=conversations(script.data, DataConfig(prompt_suffix="") if small else None),
        processing_class=load_processor(script.model, **pixels),
        peft_config=LoraConfig(r=script.lora, target_modules="all-linear") if script.lora else None,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
