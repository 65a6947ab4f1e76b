"""PAPO on TRL's trainer with families whose processors lay pictures out as tiles."""

import pytest
import torch

from support.plain_checkpoints import PLAIN, write_plain_checkpoint
from support.trl_runs import TERMS, build  # first: it asks for TRL

# isort: split
from papo_fast.digits.task import write_questions

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
RARE = pytest.mark.exhaustive
TILED = (
    "gemma3", "idefics3", "glm4v",
    *(pytest.param(name, marks=RARE) for name in ("internvl", "qwen3_5")),
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    write_questions(folder / "train.parquet", 16, "train", 0)
    return folder


@pytest.mark.parametrize("name", TILED)
def test_both_streams_are_those_of_the_familys_own_logits(name, files):
    assert name in PLAIN
    write_plain_checkpoint(files / name, name)
    trainer = build(files, name, **TERMS)
    rows = [trainer.train_dataset[i] for i in range(2) for _ in range(4)]
    batch = trainer._generate_and_score_completions(rows)
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    pixels, black = batch["pixel_values"], trainer.corrupted(batch)
    assert black.shape == pixels.shape and not torch.equal(black, pixels)
    # responses to one prompt share their pictures
    per_row = len(pixels) // 8
    assert torch.equal(black[:per_row], black[per_row : 2 * per_row])
    assert not torch.equal(black[:per_row], black[4 * per_row : 5 * per_row])
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    assert torch.isfinite(loss)
    ours = trainer._head.stats.kl_prcp
    kl = exact_kl(trainer.model, batch, pixels, black)
    n = batch["completion_ids"].shape[1]
    torch.testing.assert_close(ours[:, -n:], kl, atol=1e-5, rtol=1e-5)


def exact_kl(model, batch, *streams):
    """KL of the first stream's distribution to the second's, from whole logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    kept = ("image_grid_thw", "pixel_attention_mask", "image_sizes")
    inputs |= {k: batch[k] for k in kept if k in batch}
    inputs |= {k: batch[k] for k in ("token_type_ids", "mm_token_type_ids") if k in batch}
    n, log = batch["completion_ids"].shape[1], []
    for pixels in streams:
        with torch.no_grad():
            logits = model(**inputs, pixel_values=pixels).logits
        log.append(logits[:, -n - 1 : -1].float().log_softmax(-1))
    return (log[0].exp() * (log[0] - log[1])).sum(-1) * batch["completion_mask"]
