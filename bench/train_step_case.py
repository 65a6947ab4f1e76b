"""What `train_step.py` trains: a small Qwen2.5-VL, prompts with pictures, sampled responses."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from papo_fast.config import ModelConfig
from papo_fast.data.encoded import EncodedPrompt
from papo_fast.data.prompts import Prompt
from papo_fast.model.flops import ModelShape
from papo_fast.model.policy import Policy
from papo_fast.rewards.scorer import Score
from papo_fast.rewards.shaping import group_advantages
from papo_fast.rollout.hf import pad_left
from papo_fast.samples import Completion, Group, Sample, all_samples

EOS, VISION_START, VISION_END, IMAGE, VIDEO = range(5)
CORRUPTED_SHARE = 0.6
# Of the random input embedding: a token then depends on itself more than on the picture, and the
# perception KL is some tenths of a nat, as in trained models, instead of tens.
EMBEDDING_SCALE = 10.0


@dataclass(frozen=True)
class Size:
    """Sizes of model and data.

    `patches` are the picture's height and width in patches of 14 pixels; four patches make one
    image token. `micro_tokens` are the tokens of one micro-batch, padding included, the same for
    every way. `sharpness` multiplies the output embedding so that the policy has the entropy of a
    trained one (about .6 nats), which decides how much the sparse backward may leave out.
    Responses are sampled for `sampled` tokens and repeat these from there on.
    """

    hidden: int
    layers: int
    vision_layers: int
    vocab: int
    patches: tuple[int, int]
    text: int
    response: int
    micro_tokens: int
    sharpness: float
    head: int = 32
    vision_head: int = 16
    sampled: int = 1 << 20

    @property
    def image(self):
        return self.patches[0] * self.patches[1] // 4


# image : text : response = 640 : 120 : 350 in both. Width of the vision tower, of the MLPs and of
# the heads are in the 3B model's proportions, depth and vocabulary chosen so that the FLOPs are.
SIZES = {
    "quick": Size(128, 4, 3, 1088, (16, 20), 15, 44, 1800, 0.9),
    "full": Size(256, 6, 4, 3168, (16, 32), 24, 70, 2900, 0.8),
}
# G: prompts of one update
PROMPTS = {5: 2, 16: 1}
# Qwen2.5-VL-3B's configuration, for the shares that the small models are to have.
QWEN_3B = {
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "out_hidden_size": 2048,
        "num_heads": 16,
    },
}


def model_config(size):
    width = size.hidden * 5 // 8
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocab,
            "hidden_size": size.hidden,
            "intermediate_size": size.hidden * 43 // 8,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.hidden // size.head,
            "num_key_value_heads": max(1, size.hidden // 256),
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": EOS,
            "pad_token_id": EOS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [size.head // 8, *[3 * size.head // 16] * 2],
            },
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": width,
            "intermediate_size": width * 171 // 64,
            "out_hidden_size": size.hidden,
            "num_heads": width // size.vision_head,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [size.vision_layers - 1],
        },
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )


def write_checkpoint(size, path):
    """The model with random weights, and a tokenizer of its vocabulary, as HuggingFace has them."""
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(model_config(size))
    for name, p in model.named_parameters():
        if p.ndim > 1:  # each layer keeps the scale of what it is given
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
        if "lm_head" in name:
            torch.nn.init.normal_(p, std=size.sharpness)
        if "embed_tokens" in name:
            torch.nn.init.normal_(p, std=EMBEDDING_SCALE)
    model.save_pretrained(path)
    vocab = {f"<{i}>": i for i in range(size.vocab)}
    words = Tokenizer(models.WordLevel(vocab, unk_token=f"<{size.vocab - 1}>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=f"<{EOS}>", pad_token=f"<{EOS}>"
    )
    tokenizer.save_pretrained(path)
    about = {"eos_token_id": EOS, "pad_token_id": EOS}
    (Path(path) / "generation_config.json").write_text(json.dumps(about))


@dataclass
class Case:
    """One update: the policy, a reference that differs from it, and scored responses.

    `optimizer` is shared by all ways of papo_fast; its learning rate is 0, so that weights stay.
    """

    size: Size
    group_size: int
    path: Path
    policy: Policy
    reference: Policy
    optimizer: torch.optim.Optimizer
    groups: list[Group]

    @property
    def samples(self):
        return all_samples(self.groups)

    @property
    def tokens(self):
        return sum(len(s) for s in self.samples)

    def sharing(self, what):
        """The groups with `what` of them shared: "nothing", "pictures", "prompts" (both).

        Samples that share less stand in groups of their own, and pictures that are copies are not
        shared. What an earlier pass has filled in is forgotten.
        """
        for sample in self.samples:
            sample.old = sample.ref = sample.aug = None
        if what == "prompts":
            return self.groups
        alone = []
        for group in self.groups:
            for sample in group.samples:
                prompt, pixels = group.prompt, group.pixels("aug")
                if what == "nothing":
                    copied = prompt.encoded.pixel_values.clone()
                    encoded = replace(prompt.encoded, pixel_values=copied)
                    prompt, pixels = replace(prompt, encoded=encoded), pixels.clone()
                alone.append(Group(prompt, [sample], pixels))
        return alone


def make_case(size, group_size, path, device="cpu", dtype="float32"):
    """`path` holds the checkpoint of `write_checkpoint`; the models compute on `device`."""
    device = torch.device(device)
    config = ModelConfig(
        path=str(path),
        dtype=dtype,
        gradient_checkpointing=False,
        liger="off",  # all ways have the same layers
    )
    policy = Policy.load(config, [], device)
    reference = Policy.load(config, [], device).requires_grad_(False).eval()
    torch.manual_seed(1)
    with torch.no_grad():  # KL of 0 would hide a wrong reference term
        for p in reference.parameters():
            # drawn on the CPU, so that a seed means the same on every device
            p.mul_(1 + 0.01 * torch.randn(p.shape).to(device))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.01)
    prompts = [_prompt(size, i) for i in range(PROMPTS[group_size])]
    lengths = response_lengths(size.response, group_size * len(prompts))
    completions = _sample(policy, prompts, group_size, lengths, size.sampled)
    right = [i % 2 for i in range(len(lengths))]
    rewards = torch.tensor([float(r) for r in right])
    ids = torch.arange(len(prompts)).repeat_interleave(group_size)
    advantages = group_advantages(rewards, ids, "grpo").tolist()
    samples = [
        Sample(completion, score=Score(float(r), float(r), 1.0, False), advantage=advantage)
        for completion, r, advantage in zip(completions, right, advantages, strict=True)
    ]
    groups = [
        Group(
            prompt,
            samples[i * group_size : (i + 1) * group_size],
            _corrupted(prompt.encoded.pixel_values),
        )
        for i, prompt in enumerate(prompts)
    ]
    return Case(size, group_size, Path(path), policy, reference, optimizer, groups)


def response_lengths(mean, count):
    """Evenly from half of `mean` to one and a half, in an order without rule; `mean` on average."""
    spread = torch.linspace(-0.5, 0.5, count)[torch.randperm(count)]
    return [round(mean * (1 + x)) for x in spread.tolist()]


def _prompt(size, index):
    before = size.text // 2
    after = size.text - 2 - before
    ids = torch.randint(5, size.vocab, (size.text - 2,))
    mark = torch.tensor
    ids = torch.cat(
        [
            ids[:before],
            mark([VISION_START]),
            mark([IMAGE]).expand(size.image),
            mark([VISION_END]),
            ids[before : before + after],
        ]
    )
    h, w = size.patches
    pixels = torch.randn(h * w, 3 * 2 * 14 * 14)
    encoded = EncodedPrompt(ids, (ids == IMAGE).long(), pixels, torch.tensor([[1, h, w]]))
    return Prompt(index, "", "", "", [], encoded)


def _corrupted(pixels):
    black = torch.rand(len(pixels)).argsort() < CORRUPTED_SHARE * len(pixels)
    return torch.where(black[:, None], torch.tensor(-1.8), pixels)


@torch.no_grad()
def _sample(policy, prompts, group_size, lengths, most):
    """Responses of the given lengths, sampled from the policy; vision marks are never sampled."""
    inputs = pad_left([p.encoded for p in prompts], EOS, policy.device)
    new = min(max(lengths), most)
    with policy.autocast():
        ids = policy.model.generate(
            **inputs,
            generation_config=GenerationConfig(
                do_sample=True,
                top_k=0,
                num_return_sequences=group_size,
                max_new_tokens=new,
                min_new_tokens=new,
                suppress_tokens=[EOS, VISION_START, VISION_END, IMAGE, VIDEO],
                pad_token_id=EOS,
            ),
        )
    ids = ids[:, inputs["input_ids"].shape[1] :].tolist()
    # the sampler's log-probs serve a metric only
    return [
        Completion([row[i % new] for i in range(n)], [0.0] * n, True)
        for row, n in zip(ids, lengths, strict=True)
    ]


def shares(config, size):
    """{part: share} of a plain sequence's forward FLOPs, for the lm_head on response rows."""
    shape, length = ModelShape.of(config), size.image + size.text + size.response
    flops = {
        "vision": shape.vision(size.image),
        "language": shape.language(length, length * (length + 1) // 2),
        "lm_head": shape.head(size.response),
    }
    return {part: n / sum(flops.values()) for part, n in flops.items()}


def shares_of_3b():
    """The same of Qwen2.5-VL-3B at 640 image tokens, 120 of text and 350 of response."""
    size = replace(SIZES["full"], patches=(40, 64), text=120, response=350)
    return shares(Qwen2_5_VLConfig(**QWEN_3B), size)


def relative_error(got, want):
    """Largest over parameters of |got - want| / |want|; small gradients count by the whole's."""
    whole = math.sqrt(sum(x.norm().item() ** 2 for x in want.values()))
    return max(
        (got[n] - x).norm().item() / max(x.norm().item(), 1e-3 * whole) for n, x in want.items()
    )
