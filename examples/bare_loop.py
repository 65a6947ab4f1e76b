"""PAPO in a bare loop: `token_stats` and any HuggingFace VLM. One prompt a step, one process.

    .venv/bin/python examples/bare_loop.py
    .venv/bin/python examples/bare_loop.py --model Qwen2.5-VL-3B-Instruct/ --data ViRL39K.parquet

Without a model and data it makes small ones. Left out: batches of prompts, KL to a reference, saving.
"""  # noqa: E501

import argparse

import torch
from tiny import tiny_files
from transformers import AutoModelForImageTextToText

from papo_fast.integrations.conversations import conversations
from papo_fast.integrations.processor import load_processor
from papo_fast.masking import PatchCorruption
from papo_fast.rewards import equal_as_text, last_boxed
from papo_kernels import token_stats

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--model", help="checkpoint of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
parser.add_argument("--data", help=".parquet or .jsonl with problem, images and answer")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--lr", type=float, default=3e-3, help="for a real model 1e-6")
parser.add_argument("--tokens", type=int, default=12, help="longest response")
args = parser.parse_args()
if args.model is None:
    args.model, args.data = tiny_files()
G, GAMMA, ETA = 8, 0.01, 0.001
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
processor = load_processor(args.model, min_pixels=28 * 28)
corrupt = PatchCorruption.of(processor.image_processor, ratio=0.6)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
data, end = conversations(args.data), processor.tokenizer.eos_token_id
for step in range(args.steps):
    row = data[step % len(data)]
    text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
    inputs = processor(text=[text] * G, images=[row["images"]] * G, return_tensors="pt")
    ban = [model.config.image_token_id]
    sample = dict(do_sample=True, top_k=0, suppress_tokens=ban, max_new_tokens=args.tokens)
    ids, n = model.generate(**inputs, **sample), inputs["input_ids"].shape[1]
    ended = (ids[:, n:] == end).cumsum(1) - (ids[:, n:] == end).long()  # the end token counts
    targets = ids[:, n:].masked_fill(ended > 0, -100).flatten()
    texts = processor.batch_decode(ids[:, n:], skip_special_tokens=True)
    right = [equal_as_text(row["answer"], last_boxed(t) or "") is True for t in texts]
    digits = [sum(c.isdigit() for c in t) / max(1, len(t)) for t in texts]  # a first foothold
    rewards = 0.9 * torch.tensor(right) + 0.1 * torch.tensor(digits)
    advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-6))[:, None]
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, ids.shape[1] - n))
    full = dict(inputs) | dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    aug = full | dict(pixel_values=corrupt(inputs["pixel_values"], inputs["image_grid_thw"], step))
    hidden = [model.model(**x).last_hidden_state[:, n - 1 : -1].flatten(0, 1) for x in (full, aug)]
    stats = token_stats(hidden[0], model.lm_head.weight, targets, aug_hidden=hidden[1])
    policy = -advantages.expand(ids[:, n:].shape).flatten() * stats.logprobs
    terms = policy - GAMMA * stats.kl_prcp + ETA * (stats.entropy + stats.aug_entropy)
    (terms.sum() / (targets != -100).sum()).backward()
    optimizer.step(), optimizer.zero_grad()
    print(f"{step}: reward {rewards.mean():.3f}, kl_prcp {stats.kl_prcp.mean():.3f}")
