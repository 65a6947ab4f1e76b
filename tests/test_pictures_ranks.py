"""Pictures on two ranks: each process handles one once, and sends none to the other."""

from __future__ import annotations

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from papo_fast.presets import get_preset
from support import SUPPORT
from support.family_checkpoints import write_checkpoint
from support.ranks import launch
from support.small_runs import png, small


def test_a_picture_is_decoded_and_processed_once_in_a_process_and_sent_to_none(tmp_path):
    rows = []
    for i in range(4):  # by its bytes and by its path
        picture = {"bytes": png(i, (80, 80))}
        if i % 2:
            (tmp_path / f"{i}.png").write_bytes(picture["bytes"])
            picture = {"path": f"{i}.png"}
        rows.append({"problem": "What?", "answer": str(i), "images": [picture]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    model = write_checkpoint(tmp_path / "model", "qwen2_5_vl")
    # three updates' worth of passes: old log-probs, corrupted pictures, and the updates
    config = small(get_preset("papo-g-noref"), model, tmp_path / "data.parquet", tmp_path)
    config = dataclasses.replace(
        config,
        objective=config.objective.resolved(),
        data=dataclasses.replace(config.data, test=""),
        rollout=dataclasses.replace(config.rollout, max_new_tokens=3),
    )
    torch.save(config, tmp_path / "config.pt")
    launch(2, [str(SUPPORT / "pictures_worker.py"), str(tmp_path / "config.pt"), str(tmp_path)])
    found = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    assert [of_rank["decoded"] for of_rank in found] == [[1] * 4] * 2
    # of the pictures that it samples or trains on alone, and all together of all of them
    assert all(max(of_rank["processed"]) == 1 for of_rank in found), found
    assert all(map(max, *(of_rank["processed"] for of_rank in found))), found
    for of_rank in found:
        assert of_rank["pixels_of_a_prompt"] == 4  # they would be seen
        assert of_rank["pixels_sent"] == 0
        assert 0 < of_rank["bytes_sent"] < of_rank["bytes_of_a_picture"], of_rank
