"""TRL's GRPOTrainer on the same model, prompts, responses and advantages."""

import logging
import warnings
from dataclasses import dataclass

import torch
from datasets import Dataset
from train_step_ways import OBJECTIVES
from transformers import AutoTokenizer

NAME = "TRL's GRPOTrainer"


@dataclass
class TRL:
    """Called like a `Way`; the trainer is built at the first call of a case.

    Its own `compute_loss` and log-prob pass run on prepared inputs, in micro-batches of the same
    number of tokens as the other padded ways. Old log-probs are the update's own, as in TRL where
    a rollout makes one update.
    """

    name: str = NAME
    objective: str = "grpo"

    def __post_init__(self):
        self.case = None

    def __call__(self, case):
        if case is not self.case:
            self.case, self.trainer = case, _trainer(case)
            self.optimizer = torch.optim.AdamW(self.trainer.model.parameters(), lr=0.0)
        trainer, model = self.trainer, self.trainer.model
        model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        device = case.policy.device
        for inputs in _micro_batches(case):
            inputs = {k: v if isinstance(v, list) else v.to(device) for k, v in inputs.items()}
            with case.policy.autocast():
                inputs["ref_per_token_logps"] = _reference(trainer, inputs)
                loss = trainer.compute_loss(model, inputs)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        self.optimizer.step()
        return total

    def named_parameters(self):
        return self.trainer.model.named_parameters()


def _trainer(case):
    from trl import GRPOConfig, GRPOTrainer

    goal = OBJECTIVES["grpo"]
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="accelerate|trl|transformers")
    trainer = GRPOTrainer(
        model=str(case.path),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        processing_class=AutoTokenizer.from_pretrained(case.path),
        train_dataset=Dataset.from_dict({"prompt": ["<5>"] * case.group_size}),
        args=GRPOConfig(
            output_dir=str(case.path / "trl"),
            per_device_train_batch_size=case.group_size,
            num_generations=case.group_size,
            beta=goal.kl_coef,
            epsilon=goal.clip_low,
            epsilon_high=goal.clip_high,
            loss_type="dapo",  # token mean over the global batch
            use_bias_correction_kl=False,  # the plain k3, as in papo_fast
            model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
            gradient_checkpointing=False,
            use_cpu=case.policy.device.type == "cpu",
            bf16=False,
            report_to="none",
            seed=0,
        ),
    )
    weights = {n.removeprefix("model."): p for n, p in case.reference.named_parameters()}
    trainer.ref_model.load_state_dict(weights, strict=False)
    trainer.ref_model.eval()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _micro_batches(case):
    samples, budget = case.samples, case.size.micro_tokens
    lengths = [len(s) for s in samples]
    prompts = [group.prompt.encoded for group in case.groups for _ in group.samples]
    width = len(prompts[0])
    count = -(-len(prompts) // (budget // (width + max(lengths))))
    for b in range(count):
        members = [i for i in range(len(prompts)) if i * count // len(prompts) == b]
        longest = max(lengths[i] for i in members)
        ids = torch.zeros(len(members), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(members):
            ids[row, : lengths[i]] = torch.tensor(samples[i].completion.token_ids)
            mask[row, : lengths[i]] = 1
        prompt_ids = torch.stack([prompts[i].input_ids for i in members])
        types = torch.stack([prompts[i].mm_token_type_ids for i in members])
        yield {
            "prompt_ids": prompt_ids,
            "prompt_mask": torch.ones_like(prompt_ids),
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": torch.tensor([samples[i].advantage for i in members]),
            "num_items_in_batch": torch.tensor(sum(lengths)),
            "pixel_values": torch.cat([prompts[i].pixel_values for i in members]),
            "image_grid_thw": torch.cat([prompts[i].image_grid_thw for i in members]),
            "num_images": [1] * len(members),
            "mm_token_type_ids": torch.cat([types, torch.zeros_like(ids)], dim=1),
        }


@torch.no_grad()
def _reference(trainer, inputs):
    logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.ref_model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        inputs["completion_ids"].size(1),
        **{
            k: inputs[k]
            for k in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        },
    )
    return logprobs
