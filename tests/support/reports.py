"""Runs to report on, and what their pictures and tables say."""

import io
import itertools
import json
import random

from PIL import Image, ImageDraw
from rich.console import Console

from papo_fast.report import save_examples
from papo_fast.run.metrics import MetricsLog

SUMMARY = {
    "preset": "tiny",
    "seed": 7,
    "git_commit": "0123456789abcdef",
    "steps": 40,
    "seconds": 312.4,
    "samples_per_question": 8,
    "accuracy_before": {"vision_dependent": 0.362, "text_leaning": 0.5},
    "accuracy_after": {"vision_dependent": 0.741, "text_leaning": 0.47},
    "accuracy_after_corrupted": {"vision_dependent": 0.231, "text_leaning": 0.471},
    "perception_errors_before": 0.41,
    "perception_errors_after": 0.17,
    "reasoning_errors_before": 0.228,
    "reasoning_errors_after": 0.089,
}
WRONG = "<think>7+5</think>\\boxed{11}"
"""A response to the picture of `example`: it read what is there and miscalculated."""


def picture(text: str) -> Image.Image:
    image = Image.new("RGB", (28 * len(text), 28), "white")
    for i, char in enumerate(text):
        ImageDraw.Draw(image).text((28 * i + 8, 4), char, fill="black", font_size=18)
    return image


def corrupt(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.paste((0, 0, 0), (0, 0, 28, 14))
    return image


def example(**changes) -> dict:
    row = {"when": "after", "problem": "Compute.", "kind": "vision_dependent", "answer": "12"}
    row |= {"reading": "7+5", "response": "<think>7+5</think>\\boxed{12}", "reward": 1.0}
    row |= {"accuracy": 1.0, "image": picture("7+5"), "corrupted": corrupt(picture("7+5"))}
    return row | changes


def write_run(path, steps=40, examples=(), summary=None, **changes):
    rng = random.Random(0)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"preset": "tiny", "seed": 7}))
    if steps:
        with MetricsLog(path / "metrics.jsonl") as log:
            for step in range(1, steps + 1):
                row = {"step": step, "seconds": 3.0 * step, "reward": rng.random()}
                row |= {"accuracy": rng.random(), "kl_prcp": rng.random(), "entropy": rng.random()}
                row |= {"aug_entropy": rng.random(), "clip_fraction_high": rng.random() / 100}
                row |= {"clip_fraction_low": rng.random() / 100, "response_length": 29.0}
                log.append(row | changes)
    if examples:
        save_examples(path, examples)
    if summary:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def texts(figure) -> str:
    everything = [t.get_text() for t in figure.texts]
    everything += [t.get_text() for axes in figure.axes for t in axes.texts]
    everything += [axes.get_title(loc="left") for axes in figure.axes]
    return "\n".join(everything)


def printed(function, *args) -> str:
    console = Console(record=True, width=140, file=io.StringIO())
    function(*args, console)
    return console.export_text()


def assert_nothing_overlaps(figure):
    """No text leaves the figure, none touches another; measured as they will be drawn."""
    figure.draw_without_rendering()
    bounds = figure.bbox
    boxes = [(t.get_text(), t.get_window_extent()) for t in figure.texts if t.get_text().strip()]
    for axes in figure.axes:
        low, high = axes.get_ylim()
        ticks = [t.label1 for t in axes.yaxis.get_major_ticks() if low <= t.get_loc() <= high]
        left, right = axes.get_xlim()
        ticks += [t.label1 for t in axes.xaxis.get_major_ticks() if left <= t.get_loc() <= right]
        labels = [*axes.texts, axes.title, axes._left_title, *ticks]
        boxes += [(t.get_text(), t.get_window_extent()) for t in labels if t.get_text()]
    for text, box in boxes:
        assert box.x0 >= 0 and box.x1 <= bounds.x1, text
        assert box.y0 >= 0 and box.y1 <= bounds.y1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        # Boxes have the font's full height: neighbouring lines may share the room of descenders.
        assert wide <= 1 or high <= 0.25 * min(a.height, b.height), (one, other)
