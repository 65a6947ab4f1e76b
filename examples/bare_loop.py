"""PAPO in a bare loop: `token_stats` and any HuggingFace VLM. One prompt a step, one process.

    .venv/bin/python examples/bare_loop.py
    .venv/bin/python examples/bare_loop.py --model Qwen/Qwen2.5-VL-3B-Instruct --data DATA.parquet

Without a model and data it makes small ones. Left out: batches of prompts, reference KL, saving.
"""

import argparse

import torch
from tiny import reward, tiny_files
from transformers import AutoModelForImageTextToText, GenerationConfig

from papo_fast.data.corruption import PatchCorruption
from papo_fast.integrations.conversations import conversations
from papo_fast.integrations.processor import load_processor
from papo_kernels import token_stats

G, TOKENS, GAMMA, ETA = 8, 12, 0.01, 0.001
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--model")
parser.add_argument("--data", help=".parquet or .jsonl with problem, images and answer")
parser.add_argument("--steps", type=int, default=24)
parser.add_argument("--lr", type=float, default=3e-3, help="for a real model 1e-6")
args = parser.parse_args()
if args.model is None:
    args.model, args.data = tiny_files()
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
processor = load_processor(args.model, min_pixels=28 * 28)
corrupt = PatchCorruption.of(processor.image_processor, ratio=0.6)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
data, end = conversations(args.data), processor.tokenizer.eos_token_id
options = dict(do_sample=True, top_k=0, eos_token_id=end, max_new_tokens=TOKENS)
options |= dict(pad_token_id=end, suppress_tokens=[model.config.image_token_id])
model.generation_config = GenerationConfig(**options)  # the shipped one is not the scored policy
for step in range(args.steps):
    row = data[step % len(data)]
    text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
    inputs = processor(text=[text] * G, images=[row["images"]] * G, return_tensors="pt")
    ids, n = model.generate(**inputs), inputs["input_ids"].shape[1]
    ended = (ids[:, n:] == end).cumsum(1) - (ids[:, n:] == end).long()  # the end token counts
    targets = ids[:, n:].masked_fill(ended > 0, -100).flatten()
    texts = processor.batch_decode(ids[:, n:], skip_special_tokens=True)
    rewards = torch.tensor([reward(t, row["answer"]) for t in texts])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    full = dict(inputs) | dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    full["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    pixels, grid = (inputs[k].chunk(G)[0] for k in ("pixel_values", "image_grid_thw"))
    corrupted = corrupt(pixels, grid, seed=step).repeat(G, 1)  # one mask for the group
    aug = full | dict(pixel_values=corrupted)
    hidden = [model.model(**x).last_hidden_state[:, n - 1 : -1].flatten(0, 1) for x in (full, aug)]
    stats = token_stats(hidden[0], model.lm_head.weight, targets, aug_hidden=hidden[1])
    policy = -advantages.repeat_interleave(ids.shape[1] - n) * stats.logprobs
    loss = policy - GAMMA * stats.kl_prcp + ETA * (stats.entropy + stats.aug_entropy)
    (loss.sum() / (targets != -100).sum()).backward()
    optimizer.step()
    model.zero_grad()
    print(f"{step}: reward {rewards.mean():.3f}, kl_prcp {stats.kl_prcp.mean():.3f}")
