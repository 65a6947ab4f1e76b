"""`report.html`: every example is there, as text and not as markup, with pictures that exist."""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from PIL import Image

from papo_fast.report import write_report
from papo_fast.report.page import write_page
from papo_fast.run.files import read_run, save_examples
from papo_fast.run.metrics import MetricsLog

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></article><b>loose",
    "a & b 'quoted' \"twice\" &lt;",
    "half an emoji: \ud83d",
    "中文 🙂 \x00 \x1b[31m",
    "x" * 20_000,
]


class Read(HTMLParser):
    """Tags that are open, pictures, and the text of each <pre>."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.pictures, self.responses, self.tags = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        elif tag not in ("meta", "input"):
            self.stack.append(tag)
        if tag == "pre":
            self.responses.append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "pre":
            self.responses[-1] += data


def example(when, response, i, **changes):
    return {
        "when": when, "problem": f"Question {i}?", "kind": "vision_dependent", "answer": "12",
        "reading": "7+5", "response": response, "reward": 0.5, "accuracy": float(i % 2),
        "image": Image.new("RGB", (8, 8)), "corrupted": Image.new("RGB", (8, 8)),
    } | changes  # fmt: skip


def read(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    found = Read(text)
    assert found.stack == []
    return text, found


def test_every_example_is_shown_with_its_pictures_and_what_was_said_before(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append({"step": 1, "reward": 0.5})
    after = [example("after", f"after {i}", i) for i in range(20)]
    before = [example("before", f"before {i}", i) for i in range(20)]
    alone = example("before", "never asked again", 99)
    save_examples(tmp_path, [*before, *after, alone])
    write_report(tmp_path)
    text, found = read(tmp_path)
    pairs = [said for i in range(20) for said in (f"after {i}", f"before {i}")]
    assert found.responses == [*pairs, "never asked again"]
    assert "21 examples" in text and text.count("✓ right after training") == 10
    assert len(found.pictures) == 1 + 2 * 21
    assert all((tmp_path / unquote(name)).is_file() for name in found.pictures)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_hostile_text_is_shown_as_it_is(text, tmp_path):
    row = example("after", text, 1, problem=text, answer=text, reading=text, kind=text)
    save_examples(tmp_path, [row])
    (tmp_path / "config.json").write_text("{}")
    write_page(read_run(tmp_path))
    _, found = read(tmp_path)
    (said,) = found.responses
    assert said.replace("\\ud83d", "\ud83d") == text.replace("\x00", "\ufffd") or said == text
    assert not found.tags & {"script", "b"}


def test_a_run_without_examples_or_summary_has_a_page_too(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append({"step": 1, "reward": 0.5})
    write_page(read_run(tmp_path))
    text, found = read(tmp_path)
    assert found.responses == [] and "the run is not finished" in text
