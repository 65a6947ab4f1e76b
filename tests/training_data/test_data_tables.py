"""Tables of questions: which files and columns are read, and what is said of bad rows."""

import json
import logging
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from papo_fast.config import DataConfig, RewardConfig
from papo_fast.data.prompts import PromptDataset, PromptStream
from papo_fast.data.rows import read_rows
from papo_fast.errors import InputError
from papo_fast.rewards.scorer import Scorer
from support.data_rows import CONFIG, ROWS, SKIP, dataset, row


def same(a, b):
    return (
        (a.index, a.problem, a.answer, a.kind) == (b.index, b.problem, b.answer, b.kind)
        and [i.tobytes() for i in a.images] == [i.tobytes() for i in b.images]
        and torch.equal(a.encoded.input_ids, b.encoded.input_ids)
        and torch.equal(a.encoded.pixel_values, b.encoded.pixel_values)
    )


def png_bytes(folder, number):
    return (folder / f"{number}.png").read_bytes()


@pytest.mark.parametrize("form", ["bytes", "struct", "path", "single"])
def test_jsonl_and_parquet_give_identical_prompts(folder, encoder, seven, form):
    images = {
        "bytes": [[png_bytes(folder, n)] for n in range(ROWS)],
        "struct": [[{"bytes": png_bytes(folder, n), "path": None}] for n in range(ROWS)],
        "path": [[f"{n}.png"] for n in range(ROWS)],
        "single": [png_bytes(folder, n) for n in range(ROWS)],
    }[form]
    table = pa.table(
        {
            "problem": [f"What is {n}?" for n in range(ROWS)],
            "answer": [str(n) for n in range(ROWS)],
            "images": images,
            "kind": ["odd" if n % 2 else "even" for n in range(ROWS)],
        }
    )
    pq.write_table(table, folder / f"{form}.parquet")
    other = PromptDataset(folder / f"{form}.parquet", CONFIG, encoder)
    assert len(other) == ROWS
    assert all(same(seven[n], other[n]) for n in range(ROWS))
    assert other.kinds == seven.kinds == ["even", "odd"] * 3 + ["even"]


def test_the_suffix_reaches_the_model_but_not_the_problem(seven, encoder):
    prompt = seven[3]
    assert prompt.problem == "What is 3?" and prompt.answer == "3"
    assert "What is 3? Think.<|im_end|>" in encoder.tokenizer.decode(prompt.encoded.input_ids)


def test_data_without_images_is_text_only_and_says_so(folder, encoder, caplog):
    rows = [{"problem": "1+1?", "answer": "2"}]
    text = dataset(folder, encoder, rows)
    assert text[0].images == [] and text[0].encoded.pixel_values is None
    assert "no column 'images'" in caplog.text and "--data.images-key" in caplog.text


def test_other_column_names_are_read(folder, encoder):
    config = DataConfig(min_pixels=784, max_pixels=64 * 784, problem_key="q", answer_key="a")
    rows = [{"q": "What?", "a": "x", "images": "2.png"}]
    prompt = dataset(folder, encoder, rows, config)[0]
    assert (prompt.problem, prompt.answer, prompt.images[0].size) == ("What?", "x", (84, 28))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"answer": " "},
            "row 1: column 'answer' is empty. Fix the row, or pass --data.on-bad-sample skip",
        ),
        ({"answer": None}, "row 1: column 'answer' is empty"),
        ({"answer": ["4"]}, "row 1: column 'answer' holds a list; expected a text or a number"),
        ({"problem": ""}, "row 1: column 'problem' holds ''; expected a text"),
        ({"images": ["no.png"]}, r"row 1: image 0 \(.*no.png\): there is no such file"),
        ({"images": ["broken.png"]}, r"row 1: image 0 \(.*broken.png\) cannot be read"),
        ({"images": ["empty.png"]}, r"row 1: image 0 \(.*empty.png\) cannot be read"),
        ({"images": ["cut.png"]}, r"row 1: image 0 \(.*cut.png\) cannot be read"),
        ({"images": ["zero.gif"]}, r"row 1: image 0 \(.*zero.gif\)"),
        ({"images": [None]}, "row 1: image 0 is a NoneType; expected bytes"),
        ({"problem": "<image> <image>"}, "row 1: the problem has 2 <image> placeholders"),
        ({"problem": "x" * 5000}, "row 1: the prompt has 50.* tokens .* = 4096"),
    ],
)
def test_a_bad_row_is_named(folder, encoder, changes, message):
    (folder / "broken.png").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(png_bytes(folder, 6)[:200])
    # a GIF header with a 0x0 screen and nothing else
    (folder / "zero.gif").write_bytes(b"GIF89a" + bytes(7) + b"\x3b")
    data = dataset(folder, encoder, [row(0), row(1, **changes)])
    assert data[0] is not None
    with pytest.raises(InputError, match=message):
        data[1]


def test_an_image_of_zero_bytes_in_parquet_is_named(folder, encoder):
    table = pa.table({"problem": ["?"], "answer": ["1"], "images": [[b""]]})
    pq.write_table(table, folder / "nothing.parquet")
    with pytest.raises(InputError, match=r"row 0: image 0 \(0 bytes\) cannot be read"):
        PromptDataset(folder / "nothing.parquet", CONFIG, encoder)[0]


def test_bad_rows_are_skipped_counted_once_and_logged_once_per_cause(folder, encoder, caplog):
    rows = [row(n) for n in range(ROWS)]
    rows[1] = row(1, answer="")
    rows[4] = row(4, answer="")
    rows[5] = row(5, images=["no.png"])
    config = DataConfig(min_pixels=784, max_pixels=64 * 784, on_bad_sample="skip")
    data = dataset(folder, encoder, rows, config)
    with caplog.at_level(logging.WARNING):
        assert [p.index for p in data] == [0, 2, 3, 6]
        stream = PromptStream(data, 4, seed=0)
        for _ in range(3):
            assert sorted(p.index for p in next(stream)) == [0, 2, 3, 6]
    assert data.skipped == {"answer": 2, "image": 1}
    assert len(caplog.records) == 2
    assert "row 1" in caplog.text and "row 5" in caplog.text and "row 4" not in caplog.text


def test_data_without_a_usable_row_stops_instead_of_looping(folder, encoder):
    config = DataConfig(on_bad_sample="skip")
    data = dataset(folder, encoder, [row(n, answer="") for n in range(3)], config)
    with pytest.raises(InputError, match=r"none of its 3 rows is usable .*'answer': 3"):
        next(PromptStream(data, 2, seed=0))


def test_a_missing_column_is_named_with_the_columns_found(folder, encoder):
    rows = [{"question": "?", "answer": "1"}]
    with pytest.raises(
        InputError, match=r"no column 'problem'; it has answer, question\. .*--data\.problem-key"
    ):
        dataset(folder, encoder, rows)
    pq.write_table(pa.table({"problem": ["?"], "solution": ["1"]}), folder / "columns.parquet")
    with pytest.raises(
        InputError, match=r"no column 'answer'; it has problem, solution\. .*--data\.answer-key"
    ):
        PromptDataset(folder / "columns.parquet", CONFIG, encoder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lines.jsonl", '{"problem": "?"}\n\n{"prob', "line 3 is not JSON"),
        ("list.jsonl", "[1]\n", "line 1 holds a list; expected an object"),
        ("none.jsonl", "", "has no rows"),
        ("text.parquet", "no parquet", "cannot be read: .*Expected a .parquet or .jsonl file"),
        ("data.csv", "a,b", "neither a .parquet nor a .jsonl file"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, encoder, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        PromptDataset(tmp_path / name, CONFIG, encoder)


def test_a_missing_file_and_an_unknown_hub_name_are_named(tmp_path, encoder):
    with pytest.raises(InputError, match=r"there is no file .*gone.parquet"):
        PromptDataset(tmp_path / "gone.parquet", CONFIG, encoder)
    with pytest.raises(InputError, match=r"nobody/no-data cannot be read: .*a hub dataset"):
        PromptDataset("nobody/no-data", CONFIG, encoder)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"images": ["iVBORw0KGgo" * 1000]}, "image"),
        ({"images": ["x" * 300]}, "image"),
        ({"images": ["data:image/png;base64,iVBORw0KGgo="]}, "image"),
        ({"images": ["a\0b.png"]}, "image"),
        ({"images": ["\ud83d.png"]}, "image"),
        ({"images": ["."]}, "image"),
        ({"images": [["0.png"]]}, "image"),
        ({"images": [{"path": 3}]}, "image"),
        ({"images": ["0.png"] * 5000}, "too long"),
        ({"answer": "\\boxed{}"}, "answer"),
        ({"answer": "so \\boxed{4} or \\boxed { } "}, "answer"),
        ({"answer": "$$"}, "answer"),
        ({"answer": "\ud83d"}, "answer"),
        ({"answer": "4" * 100_000}, "answer"),
        ({"problem": "half an emoji \ud83d"}, "problem"),
        ({"problem": 7}, "problem"),
        ({"problem": "x" * 50_000_000}, "too long"),
        ({"reading": "\udc00"}, "reading"),
        ({"reading": {"a": 1}}, "reading"),
    ],
)
def test_a_row_that_cannot_be_used_is_skipped_with_its_cause(
    folder, encoder, changes, cause, caplog
):
    data = dataset(folder, encoder, [row(0), row(1, **changes), row(2)], SKIP)
    started = time.perf_counter()
    assert [prompt.index for prompt in data] == [0, 2]
    assert time.perf_counter() - started < 10
    assert data.skipped == {cause: 1}
    assert len(caplog.text.encode("utf-8")) < 5_000  # encodable, and not 50 MB of it
    strict = dataset(folder, encoder, [row(1, **changes)], name="strict.jsonl")
    with pytest.raises(InputError, match=r"row 0: .*--data.on-bad-sample skip"):
        strict[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"problem": "\xff\xfe"}', "line 2 is not UTF-8"),
        (b'{"problem": ', "line 2 is not JSON"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b'{"answer": ' + b"9" * 5000 + b"}", "line 2 is not JSON"),
        (b"[1]", "line 2 holds a list"),
    ],
)
def test_a_line_that_is_no_row_is_skipped_or_named_with_its_number(folder, encoder, line, message):
    good = [json.dumps(row(n)).encode() for n in range(2)]
    (folder / "lines.jsonl").write_bytes(b"\n".join([good[0], line, good[1]]))
    with pytest.raises(InputError, match=message):
        PromptDataset(folder / "lines.jsonl", CONFIG, encoder)
    data = PromptDataset(folder / "lines.jsonl", SKIP, encoder)
    assert [prompt.index for prompt in data] == [0, 2] and data.skipped == {"line": 1}
    assert data.kinds == ["even", "", "odd"]
    (folder / "lines.jsonl").write_bytes(line)
    with pytest.raises(InputError, match="no row that can be read: line 1"):
        PromptDataset(folder / "lines.jsonl", SKIP, encoder)


def test_a_mark_of_byte_order_is_no_fault(folder, encoder):
    (folder / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row(1)).encode())
    assert PromptDataset(folder / "bom.jsonl", CONFIG, encoder)[0].problem == "What is 1?"


def test_invalid_utf8_in_parquet_is_skipped(folder, encoder):
    texts = pa.array([b"What?", b"\xff\xfe", b"Why?"]).cast(pa.binary())
    texts = pa.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    table = pa.table({"problem": texts, "answer": ["1", "2", "3"], "kind": texts})
    pq.write_table(table, folder / "utf8.parquet")
    data = PromptDataset(folder / "utf8.parquet", SKIP, encoder)
    assert [prompt.index for prompt in data] == [0, 2] and data.skipped == {"row": 1}
    assert data.kinds == ["What?", "", "Why?"]


NASTY = (
    *(None, True, -1, 3.5, float("nan"), float("inf"), 10**400, "", " ", "\0", "\ud83d", "\udfff"),
    *("<image>", "<image>" * 9, "<|image_pad|>", "<|im_end|>", "\\boxed{}", "\\boxed{", "$$"),
    *("x" * 100_000, "e\u0301" * 3000, "../" * 2000, "data:image/png;base64,AAAA", "0.png", "/"),
    *("/dev/zero", "noise.png", "🙂", "what?", [], [[]], {}, {"bytes": None, "path": None}),
    *({"bytes": "AAAA"}, {"path": "0.png"}, ["0.png", None], ["0.png"] * 3, [1, 2]),
)


def test_two_hundred_nasty_rows_never_stop_the_reading(folder, encoder):
    rng = np.random.default_rng(12)
    (folder / "noise.png").write_bytes(rng.bytes(500))
    lines = []
    for number in range(200):
        nasty = row(number % ROWS)
        for key in rng.choice(["problem", "answer", "images", "kind", "reading"], 2):
            nasty[str(key)] = NASTY[rng.integers(len(NASTY))]
        line = json.dumps(nasty).encode()
        if number % 20 == 7:
            line = line[: rng.integers(1, len(line))].replace(b"e", b"\xe9")
        lines.append(line)
    lines.append(json.dumps(row(0)).encode())
    (folder / "nasty.jsonl").write_bytes(b"\n".join(lines))
    data = PromptDataset(folder / "nasty.jsonl", SKIP, encoder)
    usable = list(data)
    assert len(data) == 201 and usable[-1].index == 200
    assert len(usable) + data.skipped.total() == 201
    assert min(len(usable), data.skipped.total()) > 20
    with Scorer(RewardConfig()) as scorer:  # what is let through can be scored and written
        scorer.score(["<think></think>"] * len(usable), [p.answer for p in usable])
    for prompt in usable:
        f"{prompt.problem}{prompt.answer}{prompt.kind}{prompt.reading}".encode()
    assert len(data.kinds) == 201


def test_datasets_logs_nothing_of_a_file_that_our_error_names(tmp_path):
    (tmp_path / "empty.parquet").write_bytes(b"")
    seen, logger = [], logging.getLogger("datasets")
    handler = logging.Handler()
    handler.emit = seen.append
    logger.addHandler(handler)
    before = logger.level
    try:
        with pytest.raises(InputError, match="Parquet file size is 0 bytes"):
            read_rows(str(tmp_path / "empty.parquet"), "train")
    finally:
        logger.removeHandler(handler)
    assert not seen and logger.level == before
