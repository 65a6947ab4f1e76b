"""Data files and rows that are wrong: each is one line that names the file, and the row."""

from __future__ import annotations

import base64
import datetime
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.attacks import assert_no_run, jsonl, refused, row, train_on
from support.small_runs import png


def text_rows(**changes):
    plain = {"problem": "What?", "answer": "1"} | changes
    return jsonl(*[{k: v for k, v in plain.items() if v is not ...}] * 2)


def parquet(*rows, **columns):
    return parquet_of(pa.Table.from_pylist(rows) if rows else pa.table(columns))


def parquet_of(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


GOOD = parquet(row(0), row(1))
IN_BASE64 = base64.b64encode(png(0)).decode()
BOMB = (  # a PNG's header of 60 000 x 60 000 pixels
    b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2
    + b"\x08\x02\0\0\0" + b"\0\0\0\0"
)  # fmt: skip

# name → content; a refusal names the file
FILES = {
    "empty.parquet": b"",
    "empty.jsonl": b"",
    "blank.jsonl": b"\n  \n\n",
    "cut.parquet": GOOD[:-40],
    "half.parquet": GOOD[: len(GOOD) // 2],
    "noise.parquet": bytes(range(256)) * 8,
    "renamed.parquet": text_rows(),
    "renamed.jsonl": GOOD,
    "table.csv": b"problem,answer\nWhat?,1\n",
    "no-ending": text_rows(),
    "no-rows.parquet": parquet(problem=pa.array([], pa.string()), answer=pa.array([], pa.string())),
    "no-problem.parquet": parquet(answer=["1", "2"]),
    "no-answer.jsonl": text_rows(answer=...),
    "one-list.jsonl": jsonl([1, 2], [3, 4]),
    "array.jsonl": json.dumps([row(0, images=[])] * 2).encode(),
    "text.jsonl": b'"What?"\n"Why?"\n',
    "cut.jsonl": text_rows()[:-9],
    "latin.jsonl": text_rows().replace(b"What", b"Wh\xe4t"),
    "deep.jsonl": b"[" * 100_000 + b"\n",
    "utf16.jsonl": text_rows().decode().encode("utf-16"),
    "gzip.jsonl": gzip.compress(text_rows()),
    "nul.jsonl": b"\0" * 1000,
    "number.jsonl": b"1e999999999\n",
    "twice.parquet": parquet_of(
        pa.Table.from_arrays([pa.array(["a", "b"])] * 3, ["problem", "problem", "answer"])
    ),
    "few.jsonl": jsonl({"problem": "What?", "answer": "1"}),
}
# rows of this kind; a refusal names file and row
ROWS = {
    "problem-none": text_rows(problem=None),
    "problem-blank": text_rows(problem="  "),
    "problem-number": text_rows(problem=3),
    "problem-list": text_rows(problem=["What?"]),
    "problem-control": text_rows(problem="<|image_pad|> what?"),
    "problem-half-emoji": text_rows(problem="\ud83d"),
    "problem-long": text_rows(problem="why? " * 3000),
    "problem-huge": text_rows(problem="why? " * 1_000_000),
    "answer-none": text_rows(answer=None),
    "answer-blank": text_rows(answer=""),
    "answer-box": text_rows(answer="\\boxed{}"),
    "answer-nan": text_rows(answer=float("nan")),
    "answer-list": text_rows(answer=["1"]),
    "answer-object": text_rows(answer={"value": 1}),
    "answer-date": parquet(problem=["a", "b"], answer=[datetime.date(2020, 1, 1)] * 2),
    "answer-dollars": text_rows(answer="$ $"),
    "answer-digits": parquet(problem=["a", "b"], answer=[b"1", b"2"]),
    "problem-bytes": parquet(problem=[b"a", b"b"], answer=["1", "2"]),
    "image-map": text_rows(images={"a": "b"}),
    "image-lists": text_rows(images=[["a.png"]]),
    "image-svg": parquet(*[row(i, images=[b"<svg/>"]) for i in (0, 1)]),
    "image-eps": parquet(*[row(i, images=[b"%!PS-Adobe-3.0 EPSF-3.0\n"]) for i in (0, 1)]),
    "answer-huge": text_rows(answer="1" * 20_000),
    "reading-list": text_rows(reading=["3+4"]),
    "image-missing": text_rows(images=["nowhere.png"]),
    "image-folder": text_rows(images=["."]),
    "image-url": text_rows(images=["https://example.org/a.png"]),
    "image-base64": text_rows(images=["data:image/png;base64," + IN_BASE64]),
    "image-number": text_rows(images=[3]),
    "image-none": text_rows(images=[None]),
    "image-nul": text_rows(images=["a\0b.png"]),
    "image-long-path": text_rows(images=["a/" * 5000]),
    "image-text": parquet(*[row(i, images=[b"no picture"]) for i in range(2)]),
    "image-cut": parquet(*[row(i, images=[png(i)[:200]]) for i in range(2)]),
    "image-empty": parquet(*[row(i, images=[b""]) for i in range(2)]),
    "image-bomb": parquet(*[row(i, images=[BOMB]) for i in range(2)]),
    "image-thin": parquet(*[row(i, images=[png(i, (2, 900))]) for i in range(2)]),
    "placeholders-more": parquet(*[row(i, problem="<image> <image>?") for i in range(2)]),
    "placeholders-alone": text_rows(problem="<image>?"),
}  # fmt: skip
MAKE = {
    "absent.parquet": lambda path: None,
    "folder.parquet": Path.mkdir,
    "pipe.jsonl": os.mkfifo,
    "loop.jsonl": lambda path: path.symlink_to(path),
    "nowhere.jsonl": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", [*MAKE, *FILES])
def test_a_wrong_data_file_is_one_line_that_names_it(place, tmp_path, capfd, name):
    if name in MAKE:
        MAKE[name](tmp_path / name)
    else:
        (tmp_path / name).write_bytes(FILES[name])
    refused(capfd, train_on(place, tmp_path, tmp_path / name), name)
    assert_no_run(tmp_path)


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_row_is_one_line_that_names_file_and_row(place, tmp_path, capfd, name):
    content = ROWS[name]
    file = tmp_path / f"data.{'parquet' if content.startswith(b'PAR1') else 'jsonl'}"
    file.write_bytes(content)
    line = refused(capfd, train_on(place, tmp_path, file), file.name, "row 0", "on-bad-sample skip")
    assert len(line) < 2500
    # rows are read when they are drawn, so that the run has begun; but it has done no step
    run = tmp_path / "runs" / "run"
    assert (run / "metrics.jsonl").read_text() == "" and not (run / "checkpoints").exists()
