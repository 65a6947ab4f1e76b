import io
import json
import logging
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from papo_fast.config import DataConfig
from papo_fast.data.encoder import PromptEncoder
from papo_fast.data.prompts import PromptDataset, PromptStream
from papo_fast.errors import InputError
from support.family_checkpoints import write_processor_files

CONFIG = DataConfig(min_pixels=784, max_pixels=64 * 784, prompt_suffix=" Think.")
ROWS = 7


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return PromptEncoder(
        write_processor_files(tmp_path_factory.mktemp("qwen2_5_vl"), "qwen2_5_vl"), CONFIG
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ROWS pictures of different sizes, 0.png, 1.png, …"""
    path = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(ROWS):
        pixels = rng.integers(0, 256, (28, 28 * (number + 1), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
    return path


def row(number, **changes):
    return {
        "problem": f"What is {number}?",
        "answer": number,
        "images": [f"{number}.png"],
        "kind": "odd" if number % 2 else "even",
    } | changes


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def dataset(folder, encoder, rows, config=CONFIG, name="data.jsonl"):
    return PromptDataset(write_jsonl(folder / name, rows), config, encoder)


@pytest.fixture
def seven(folder, encoder):
    return dataset(folder, encoder, [row(n) for n in range(ROWS)])


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


def test_data_smaller_than_a_batch_is_named_with_both_numbers(seven):
    with pytest.raises(
        InputError, match=r"has 7 rows, fewer than rollout.prompts = 8: lower --rollout.prompts"
    ):
        PromptStream(seven, 8, seed=0)
    stream = PromptStream(seven, 7, seed=0, option="rollout.filter_prompts")
    with pytest.raises(InputError, match=r"fewer than rollout.filter_prompts = 9: lower --rollout"):
        stream.take(9)


def draw(stream, batches):
    return [[p.index for p in next(stream)] for _ in range(batches)]


def test_every_epoch_holds_every_row_once_in_a_new_order(seven):
    drawn = list(chain.from_iterable(draw(PromptStream(seven, 3, seed=5), 7)))
    epochs = [drawn[i : i + ROWS] for i in range(0, 3 * ROWS, ROWS)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(ROWS))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_depends_on_the_seed_alone(seven):
    torch.manual_seed(1)
    first = draw(PromptStream(seven, 3, seed=5), 6)
    torch.manual_seed(2)
    torch.rand(10)
    assert draw(PromptStream(seven, 3, seed=5), 6) == first
    assert draw(PromptStream(seven, 3, seed=6), 6) != first


def test_drawing_leaves_the_global_generator_alone(seven):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    draw(PromptStream(seven, 3, seed=5), 6)
    assert torch.equal(torch.rand(4), expected)


def test_without_shuffling_the_rows_come_in_order(seven):
    drawn = chain.from_iterable(draw(PromptStream(seven, 4, seed=0, shuffle=False), 3))
    assert list(drawn) == [
        *range(ROWS),
        *range(5),
    ]


@pytest.mark.parametrize("before", range(8))
def test_a_restored_stream_goes_on_where_it_was(seven, before):
    stream = PromptStream(seven, 3, seed=1)
    draw(stream, before)
    state = io.BytesIO()
    torch.save(stream.state_dict(), state)
    state.seek(0)
    restored = PromptStream(seven, 3, seed=1)
    restored.load_state_dict(torch.load(state))
    assert restored.epoch == stream.epoch
    assert draw(restored, 6) == draw(stream, 6)


def test_a_position_in_other_data_is_refused(folder, encoder, seven):
    state = PromptStream(seven, 3, seed=1).state_dict()
    other = dataset(folder, encoder, [row(n) for n in range(5)], name="other.jsonl")
    with pytest.raises(InputError, match=r"in data of 7 rows but .* has 5"):
        PromptStream(other, 3, seed=1).load_state_dict(state)


def test_worker_processes_give_the_same_prompts(seven):
    assert draw(PromptStream(seven, 3, seed=1, num_workers=1), 5) == draw(
        PromptStream(seven, 3, seed=1), 5
    )
