"""TRL's trainer on tiny checkpoints of the three families, for the tests of PAPO on it."""

# ruff: noqa: E402, what is imported needs TRL
import pytest

for _package in ("trl", "peft"):
    pytest.importorskip(_package, reason=f"{_package} is missing: pip install '.[trl,lora]'")

from papo_fast.config import DataConfig
from papo_fast.digits.task import write_questions
from papo_fast.integrations.conversations import conversations
from papo_fast.integrations.processor import load_processor
from papo_fast.integrations.trl import PAPOConfig, PAPOTrainer
from support.family_checkpoints import FAMILIES, write_checkpoint

TERMS = dict(kl_prcp_coef=0.02, entropy_loss_coef=0.05, aug_entropy_loss_coef=0.03)


def write_files(folder):
    """Checkpoints of the three families and a small set of questions."""
    write_questions(folder / "train.parquet", 16, "train", 0)
    for family in FAMILIES:
        write_checkpoint(folder / family, family)
    return folder


def digits_reward(completions, **_):
    """Share of a response's characters that are digits: a random model learns it in seconds."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts]


def build(files, family, trainer=PAPOTrainer, config=PAPOConfig, peft_config=None, **settings):
    settings = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"},
        "logging_steps": 1,
        "disable_tqdm": True,
        **settings,
    }
    if config is PAPOConfig:
        settings.setdefault("grad_budget", 0.0)
    made = trainer(
        str(files / family),
        digits_reward,
        config(
            output_dir=str(files / "out"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            **settings,
        ),
        train_dataset=conversations(files / "train.parquet", DataConfig(prompt_suffix="")),
        processing_class=load_processor(
            files / family, min_pixels=28 * 28, max_pixels=28 * 28 * 64
        ),
        peft_config=peft_config,
    )
    made.current_gradient_accumulation_steps = made.args.gradient_accumulation_steps
    made.model.train()
    return made


def loss_and_gradients(trainer, batch):
    trainer.model.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    parameters = trainer.model.named_parameters()
    return loss.item(), {n: p.grad.clone() for n, p in parameters if p.grad is not None}
