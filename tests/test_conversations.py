"""Data files as TRL's conversations: read as the trainer reads them, bad rows included."""

from __future__ import annotations

import json
import logging
import pickle

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from papo_fast.config import DataConfig
from papo_fast.errors import InputError
from papo_fast.integrations.conversations import conversations
from support.small_runs import png

NASTY = {
    "picture": {"images": [b"no picture"]},
    "answer": {"answer": ""},
    "problem": {"problem": None},
    "placeholders": {"problem": "<image> or <image>?"},
}


def write(path, *changes):
    rows = [
        {"problem": f"What is {i}?", "answer": str(i), "images": [png(i)]} | change
        for i, change in enumerate(changes)
    ]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    for i, row in enumerate(rows):
        (path.parent / f"{i}.png").write_bytes(row["images"][0])
        row["images"] = [f"{i}.png"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_rows_are_conversations_and_no_host_is_asked(tmp_path, monkeypatch, ending):
    path = write(tmp_path / f"data{ending}", {}, {}, {"answer": "7"})
    if ending == ".jsonl":
        # `datasets` would load its builder for JSON, of which it looks for news on the hub
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked"))
    data = pickle.loads(pickle.dumps(conversations(path, DataConfig(prompt_suffix="!"))))
    assert len(data) == 3 and [row["answer"] for row in data] == ["0", "1", "7"]
    [message] = data[1]["prompt"]
    assert message["content"] == [{"type": "image"}, {"type": "text", "text": "What is 1?!"}]
    assert [image.size for image in data.select([2])[0]["images"]] == [(64, 64)]


@pytest.mark.parametrize("cause", NASTY)
def test_a_bad_row_is_one_line_when_it_is_read(tmp_path, cause):
    data = conversations(write(tmp_path / "data.parquet", {}, NASTY[cause]))
    assert data[0]["answer"] == "0"
    with pytest.raises(InputError, match=r"data\.parquet, row 1: .*on_bad_sample") as caught:
        data[1]
    assert "\n" not in str(caught.value)


def test_bad_rows_are_skipped_and_counted_where_that_is_asked_for(tmp_path, caplog):
    path = write(tmp_path / "data.parquet", {}, *NASTY.values(), {})
    with caplog.at_level(logging.WARNING):
        data = conversations(path, DataConfig(on_bad_sample="skip"))
    assert [row["answer"] for row in data] == ["0", "5"]
    assert "'image': 1, 'answer': 1, 'problem': 1, 'prompt': 1" in caplog.text
    lines = tmp_path / "data.jsonl"
    lines.write_text('{"problem": "a", "answer": 1, "images": []}\nno row\n')
    with pytest.raises(InputError, match=r"line 2 is not JSON"):
        conversations(lines)
    skipping = conversations(lines, DataConfig(on_bad_sample="skip"))
    assert len(pickle.loads(pickle.dumps(skipping))) == 1


def test_a_file_without_a_usable_row_or_a_column_is_refused(tmp_path):
    path = write(tmp_path / "bad.parquet", *[NASTY["picture"]] * 2)
    with pytest.raises(InputError, match=r"none of its 2 rows is usable; row 0: image 0"):
        conversations(path, DataConfig(on_bad_sample="skip"))
    path = tmp_path / "without.parquet"
    pq.write_table(pa.table({"problem": ["a"], "answer": ["1"]}), path)
    with pytest.raises(InputError, match="has no column 'images'"):
        conversations(path)
    with pytest.raises(InputError, match="there is no file"):
        conversations(tmp_path / "absent.jsonl")
