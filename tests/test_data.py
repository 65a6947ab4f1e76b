import io
import json
import logging
import time
import tracemalloc
from contextlib import suppress
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from papo_fast.config import DataConfig, RewardConfig
from papo_fast.data.encoder import PromptEncoder
from papo_fast.data.prompts import PromptDataset, PromptStream
from papo_fast.data.rows import BadSample, open_image
from papo_fast.errors import InputError
from papo_fast.rewards.scorer import Scorer
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


# --- pictures that are not eight-bit RGB ----------------------------------------------------------


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels_of(value, folder):
    return np.asarray(open_image(value, 0, folder))


def ramp(dtype, top):
    """Grey from black to white, 16 x 16, in values from 0 to `top`."""
    return (np.arange(256).reshape(16, 16) / 255 * top).astype(dtype)


GREY = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *((mode, kind) for mode in ("RGBA", "LA") for kind in ("PNG", "WEBP", "TIFF")),
        *((mode, "PNG") for mode in ("P", "RGB", "L")),
    ],
)
def test_a_transparent_picture_equals_its_composite_on_white(folder, mode, kind):
    rng = np.random.default_rng(1)
    if mode in ("RGBA", "LA"):
        shape = (8, 9, len(mode))
        image, options = Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode), {}
        image.putpixel((0, 0), (10, 20, 30, 0)[-len(mode) :])
    else:  # one colour or palette entry is transparent
        image = Image.fromarray(rng.integers(0, 3, (8, 9), np.uint8)).convert(mode)
        if mode == "P":
            image.putpalette([0, 0, 0, 200, 0, 0, 0, 0, 200])
        options = {"transparency": (1, 1, 1) if mode == "RGB" else 1}
    if kind == "WEBP":
        options["lossless"] = options["exact"] = True
    data = encoded(image, kind, **options)
    rgba = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(int)
    alpha = rgba[..., 3:]
    expected = (rgba[..., :3] * alpha + 255 * (255 - alpha)) / 255
    assert (alpha == 0).any()
    got = pixels_of(data, folder)
    assert np.abs(got - expected).max() <= 1
    assert (got[alpha[..., 0] == 0] == 255).all()


def test_a_wholly_transparent_picture_is_white_and_not_black(folder):
    data = encoded(Image.new("RGBA", (5, 5), (0, 0, 0, 0)))
    assert (pixels_of(data, folder) == 255).all()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_picture_is_turned_as_its_exif_says(folder, turn, kind):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # white in the upper left quarter
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(Image.fromarray(stored), kind, exif=exif)
    got = pixels_of(data, folder)
    assert got.shape == upright.shape and np.abs(got.astype(int) - upright).max() < 30


def test_exif_that_cannot_be_read_turns_nothing(folder):
    image = Image.new("RGB", (6, 4), "red")
    data = encoded(image, "PNG", exif=b"Exif\0\0garbage that is no TIFF")
    assert (pixels_of(data, folder) == np.asarray(image)).all()


@pytest.mark.parametrize(
    ("dtype", "top", "kind"),
    [
        (np.uint16, 65535, "PNG"),
        (np.uint16, 65535, "TIFF"),
        (np.uint16, 65535, "PPM"),
        (np.uint16, 65535, "JPEG2000"),
        (np.int32, 255, "TIFF"),
        (np.int32, 65535, "TIFF"),
        (np.int32, 2_000_000_000, "TIFF"),
        (np.float32, 1, "TIFF"),
        (np.float32, 255, "TIFF"),
        (np.float32, 65535, "TIFF"),
        (np.float32, 1e6, "TIFF"),
        (np.float32, 1, "PPM"),
    ],
)
def test_deep_and_float_pictures_are_scaled_by_their_range(folder, dtype, top, kind):
    data = encoded(Image.fromarray(ramp(dtype, top)), kind)
    assert np.abs(pixels_of(data, folder).astype(int) - GREY).max() <= 1


def test_a_dark_picture_of_sixteen_bits_stays_dark(folder):
    data = encoded(Image.fromarray(np.full((4, 4), 514, np.uint16)))
    assert (pixels_of(data, folder) == 2).all()


def test_the_transparent_value_of_sixteen_bits_is_white(folder):
    values = np.array([[1000, 40000]], np.uint16)
    data = encoded(Image.fromarray(values), transparency=1000)
    assert pixels_of(data, folder)[0, :, 0].tolist() == [255, 156]


@pytest.mark.parametrize(
    ("values", "message"),
    [([[0, np.nan]], "not finite"), ([[np.inf, 1]], "not finite"), ([[-5, -5]], "all its values")],
)
def test_float_pictures_without_a_range_are_refused(folder, values, message):
    data = encoded(Image.fromarray(np.array(values, np.float32)), "TIFF")
    with pytest.raises(BadSample, match=message):
        open_image(data, 0, folder)


@pytest.mark.parametrize("kind", ["EPS", "DDS", "ICO", "PCX", "TGA"])
def test_formats_outside_of_the_list_are_refused_unopened(folder, kind, monkeypatch):
    data = encoded(Image.new("RGB", (16, 16)), kind)
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    with pytest.raises(BadSample, match="cannot identify") as caught:
        open_image(data, 0, folder)
    assert caught.value.cause == "image"


@pytest.mark.parametrize("side", [9_500, 13_000, 14_000])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(folder, side):
    data = encoded(Image.new("1", (side, side)))
    tracemalloc.start()
    with pytest.raises(BadSample, match=r"pixels|decompression bomb"):
        open_image(data, 0, folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


# --- rows that nothing can be made of -------------------------------------------------------------

SKIP = DataConfig(min_pixels=784, max_pixels=64 * 784, prompt_suffix="", on_bad_sample="skip")


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


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_whatever_a_decoder_raises_is_a_bad_sample(folder, kind):
    rng = np.random.default_rng(3)
    whole = encoded(Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)), kind)
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(256)
        with suppress(BadSample):
            cut = bytes(data[: rng.integers(1, len(data) + 1)])
            assert open_image(cut, 0, folder).mode == "RGB"


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
