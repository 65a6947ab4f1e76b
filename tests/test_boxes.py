"""Filled boxes against pictures filled by hand, and controls against every place there is."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from papo_fast.config import CorruptionConfig, DataConfig
from papo_fast.corruption_settings import check_corruption
from papo_fast.data.boxes import BoxCorruption, Rect, boxes_of, control_boxes
from papo_fast.data.corruption import PromptCorruption
from papo_fast.data.encoder import PromptEncoder
from papo_fast.data.patch_grid import PatchGrid
from papo_fast.data.prompts import Prompt, PromptDataset
from papo_fast.data.views import CorruptedViews
from papo_fast.errors import InputError
from support.family_checkpoints import write_checkpoint

GRID = PatchGrid(merge=2, patch=14, frames=2)


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(1, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def processed(images):
    processor = Qwen2VLImageProcessorPil(patch_size=14, do_resize=False)
    out = processor(images, return_tensors="pt")
    mean, std = (torch.tensor(v) for v in (processor.image_mean, processor.image_std))
    return out["pixel_values"], out["image_grid_thw"], -mean / std


def covered(rects, height, width):
    mask = np.zeros((height, width), bool)
    for r in rects:
        mask[r.top : r.bottom, r.left : r.right] = True
    return mask


def generator(seed):
    return np.random.Generator(np.random.PCG64(seed))


# --- filling --------------------------------------------------------------------------------------


def test_evidence_is_black_and_nothing_else_changes():
    images = [picture(84, 56, 1), picture(56, 140, 2)]
    boxes = [[Rect(3, 5, 40, 61), Rect(0, 80, 56, 84)], []]
    rows, grid, black = processed(images)
    before = rows.clone()
    found = BoxCorruption("evidence", "black", black, GRID)(rows, grid, boxes, seed=1)
    dark = np.array(images[0])
    dark[3:40, 5:61] = 0
    dark[:, 80:] = 0
    want, _, _ = processed([Image.fromarray(dark), images[1]])
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
    assert torch.equal(rows, before)


def test_a_box_may_be_filled_with_its_mean_colour():
    image = picture(84, 56)
    rows, grid, black = processed([image])
    found = BoxCorruption("evidence", "mean", black, GRID)(rows, grid, [[Rect(3, 5, 40, 61)]], 1)
    old, new = (GRID.pictures(x, grid)[0] for x in (rows, found))
    inside = old[0, :, 3:40, 5:61].mean((1, 2))
    assert torch.allclose(new[0, :, 3:40, 5:61], inside[:, None, None].expand(3, 37, 56), atol=1e-5)
    assert torch.allclose(new.mean(), old.mean(), atol=1e-5)
    assert torch.equal(new[..., 40:, :], old[..., 40:, :])


def test_a_control_blackens_as_many_pixels_elsewhere():
    rows, grid, black = processed([picture(140, 112), picture(84, 84)])
    boxes = [[Rect(10, 20, 50, 70), Rect(40, 60, 64, 90)], [Rect(0, 0, 30, 84)]]
    views = {
        place: GRID.pictures(BoxCorruption(place, "black", black, GRID)(rows, grid, boxes, 3), grid)
        for place in ("evidence", "control")
    }
    clean = GRID.pictures(rows, grid)
    for i in range(2):
        changed = [(views[place][i] != clean[i])[0, 0] for place in ("evidence", "control")]
        assert changed[0].sum() == changed[1].sum() > 0
        assert not (changed[0] & changed[1]).any()


# --- where controls stand -------------------------------------------------------------------------


@st.composite
def boxes_in_a_picture(draw):
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rects = []
    for _ in range(draw(st.integers(1, 4))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        bottom, right = draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))
        rects.append(Rect(top, left, bottom, right))
    return rects, height, width


@settings(max_examples=150, deadline=None)
@given(boxes_in_a_picture(), st.integers(0, 2**63 - 1))
def test_controls_have_the_sizes_of_the_evidence_inside_the_picture(described, seed):
    rects, height, width = described
    found = control_boxes(rects, height, width, generator(seed))
    assert sorted((r.bottom - r.top, r.right - r.left) for r in found) == sorted(
        (r.bottom - r.top, r.right - r.left) for r in rects
    )
    assert all(0 <= r.top < r.bottom <= height and 0 <= r.left < r.right <= width for r in found)
    assert found == control_boxes(rects, height, width, generator(seed))


@settings(max_examples=150, deadline=None)
@given(boxes_in_a_picture(), st.integers(0, 2**63 - 1))
def test_one_box_never_meets_its_control_where_it_can_be_avoided(described, seed):
    [rect, *_], height, width = described
    [found] = control_boxes([rect], height, width, generator(seed))
    h, w = rect.bottom - rect.top, rect.right - rect.left
    evidence = covered([rect], height, width)
    least = min(
        int(evidence[y : y + h, x : x + w].sum())
        for y in range(height - h + 1)
        for x in range(width - w + 1)
    )
    assert int((evidence & covered([found], height, width)).sum()) == least


def test_boxes_that_meet_move_as_one_and_cover_as_much():
    rects = [Rect(2, 2, 10, 8), Rect(6, 5, 14, 12), Rect(30, 1, 34, 6)]
    for seed in range(50):
        found = control_boxes(rects, 40, 50, generator(seed))
        evidence, control = covered(rects, 40, 50), covered(found, 40, 50)
        assert evidence.sum() == control.sum()
        assert not (evidence & control).any()
        # the two that meet have kept their places to each other
        assert found[1].top - found[0].top == 4 and found[1].left - found[0].left == 3


def test_all_free_places_are_drawn_equally_often():
    # a box of 2 × 2 in the corner of 4 × 5: five places are free
    drawn = [control_boxes([Rect(0, 0, 2, 2)], 4, 5, generator(seed))[0] for seed in range(3000)]
    places, counts = np.unique([(r.top, r.left) for r in drawn], axis=0, return_counts=True)
    free = [(y, x) for y in range(3) for x in range(4) if y >= 2 or x >= 2]
    assert places.tolist() == [list(p) for p in free]
    assert np.abs(counts / 3000 - 1 / len(free)).max() < 0.03


# --- the column -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("boxes"), "qwen2_5_vl")
    return PromptEncoder(path, DataConfig(prompt_suffix="", min_pixels=56**2, max_pixels=112**2))


def asked(encoder, images, **columns):
    encoded = encoder.encode("what?", images)
    return Prompt(3, "what?", "7", "", images, encoded, columns=columns)


def test_boxes_are_scaled_to_the_picture_that_the_model_gets(encoder):
    prompt = asked(encoder, [picture(300, 150)], boxes=[[30, 15, 60.5, 150]])
    [[_, h, w]] = prompt.encoded.image_grid_thw.tolist()
    height, width = h * 14, w * 14
    assert (height, width) != (150, 300)
    [[rect]] = boxes_of(prompt, "boxes", GRID)
    assert rect.top == int(15 * height / 150) and rect.bottom == height
    assert rect.left == int(30 * width / 300) and rect.right == -int(-60.5 * width // 300)
    # what is beyond the border is cut off
    prompt = dataclasses.replace(prompt, columns={"where": [[-5, -5, 400, 400]]})
    assert boxes_of(prompt, "where", GRID) == [[Rect(0, 0, height, width)]]


def test_several_pictures_have_lists_of_their_own(encoder):
    images = [picture(56, 56), picture(56, 56)]
    prompt = asked(encoder, images, boxes=[[[0, 0, 7, 7]], None])
    assert boxes_of(prompt, "boxes", GRID) == [[Rect(0, 0, 7, 7)], []]
    for nothing in (None, []):
        prompt = asked(encoder, images, boxes=nothing)
        assert boxes_of(prompt, "boxes", GRID) == [[], []]


def test_a_row_whose_boxes_are_wrong_is_a_bad_row_like_any_other(encoder, tmp_path):
    picture(56, 56).save(tmp_path / "a.png")
    boxes = [[[5, 5, 30, 40]], [[60, 60, 70, 70]], None]
    rows = [{"problem": "?", "answer": "1", "images": ["a.png"], "boxes": x} for x in boxes]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    views = CorruptedViews(CorruptionConfig(kind="attention", second="control"), encoder)

    def dataset(on_bad_sample):
        config = DataConfig(on_bad_sample=on_bad_sample)
        return PromptDataset(tmp_path / "rows.jsonl", config, encoder, check=views.check_row)

    with pytest.raises(InputError, match=r"rows\.jsonl, row 1: column 'boxes' holds the box \[60"):
        list(dataset("error"))
    skips = dataset("skip")
    assert [prompt.index for prompt in skips] == [0, 2] and skips.bad_rows == {1: "corruption"}


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ("left", "column 'boxes' holds 'left': expected a list of boxes"),
        ([[0, 0, 5]], r"holds \[0, 0, 5\] for picture 0: expected boxes"),
        ([[5, 5, 5, 9]], r"holds the box \[5, 5, 5, 9\], of which nothing is in the picture"),
        ([[60, 0, 90, 9]], "of which nothing is in the picture of 56x56 pixels"),
        ([[0, 0, float("nan"), 9]], "expected boxes"),
        ([[0, 0, 10**400, 9]], "expected boxes"),
        ([[0, 0, True, True]], "expected boxes"),
        ([0, 0, 5, 9], r"holds one box, \[0, 0, 5, 9\]: expected a list of boxes"),
        ([[0.25, 0.25, 0.5, 1]], "seems to be in shares of the picture of 56x56 pixels"),
        ([[], []], "holds 2 lists of boxes for 1 pictures"),
    ],
)
def test_a_column_that_holds_no_boxes_is_refused(encoder, boxes, said):
    with pytest.raises(InputError, match=said):
        boxes_of(asked(encoder, [picture(56, 56)], boxes=boxes), "boxes", GRID)


def test_a_missing_column_names_itself(encoder):
    prompt = asked(encoder, [picture(56, 56)], kind="a", regions=[])
    corrupt = PromptCorruption(CorruptionConfig(kind="evidence"), encoder)
    said = r"no column 'boxes' .* it has kind, regions: name it with --corruption.boxes-key"
    with pytest.raises(InputError, match=said):
        corrupt(prompt, 1)


# --- every kind by its name -----------------------------------------------------------------------

SEEDED = ("patch", "official", "gaussian", "diffusion", "control")
UNSEEDED = ("blur", "evidence")


@pytest.mark.parametrize("kind", [*SEEDED, *UNSEEDED])
def test_every_kind_corrupts_pictures_of_odd_sizes_by_the_seed_alone(encoder, kind):
    images = [picture(61, 117), picture(203, 59)]
    prompt = asked(encoder, images, boxes=[[[5, 5, 30, 40]], [[0, 0, 50, 30], [100, 2, 120, 50]]])
    corrupt = PromptCorruption(CorruptionConfig(kind=kind), encoder)
    first, again, other = corrupt(prompt, 5), corrupt(prompt, 5), corrupt(prompt, 6)
    clean = prompt.encoded.pixel_values
    assert first.shape == clean.shape and first.dtype == torch.float32
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (kind in UNSEEDED)
    n = prompt.encoded.image_grid_thw.prod(-1).tolist()
    for old, new in zip(clean.split(n), first.split(n), strict=True):
        assert not torch.equal(old, new)
    assert corrupt.picture(prompt, 5).size == encoder.to_images(clean, prompt.encoded.image_grid_thw
                                                                )[0].size  # fmt: skip
    text_only = asked(encoder, [])
    assert corrupt(text_only, 5) is None


def test_attention_changes_no_picture_and_its_prompt_has_none(encoder):
    prompt = asked(encoder, [picture(61, 117)])
    corrupt = PromptCorruption(CorruptionConfig(kind="attention"), encoder)
    assert corrupt(prompt, 5) is None and corrupt.picture(prompt, 5) is None
    sampled = corrupt.prompt(prompt, 5).encoded
    ids = prompt.encoded.input_ids
    assert sampled.input_ids.tolist() == [i for i in ids.tolist() if i != encoder.image_token_id]
    assert sampled.pixel_values is None and sampled.image_grid_thw is None


def test_a_second_view_is_another_corruption_with_the_same_numbers(encoder):
    config = CorruptionConfig(kind="evidence", second="control", box_fill="mean")
    prompt = asked(encoder, [picture(61, 117)], boxes=[[5, 5, 30, 40]])
    both = CorruptedViews(config, encoder)(prompt, 4)
    for kind, found in zip(("evidence", "control"), both, strict=True):
        alone = PromptCorruption(CorruptionConfig(kind=kind, box_fill="mean"), encoder)
        assert torch.equal(found, alone(prompt, 4))
    assert CorruptedViews(CorruptionConfig(), encoder)(prompt, 4)[1] is None


def test_noise_falls_over_the_run(encoder):
    prompt = asked(encoder, [picture(112, 112)])
    config = CorruptionConfig(kind="patch", second="diffusion", noise_anneal=10.0)
    views, changes = CorruptedViews(config, encoder), []
    for progress in (0.0, 0.5, 1.0):
        views.progress = progress
        changes.append((views(prompt, 4)[1] - prompt.encoded.pixel_values).std().item())
    assert changes[0] > 2 * changes[1] > 20 * changes[2]


def test_a_second_view_must_be_another_one():
    with pytest.raises(InputError, match=r"corruption\.second is 'patch', as corruption\.kind is"):
        check_corruption(CorruptionConfig(second="patch"))
    with pytest.raises(InputError, match=r"corruption\.second is 'fog': expected one of patch"):
        check_corruption(CorruptionConfig(second="fog"))
