"""What docs/implementations.md says of the three settings, from the script that fills it."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        module = importlib.import_module("implementations")
        patch.setattr(module, "SEQUENCES", 6)
        patch.setattr(module, "V", 2048)
        yield module


@pytest.fixture(scope="module")
def measured(bench):
    return {d: bench.measure(d) for d in bench.DISTANCES}


def row(rows, term, setting):
    (found,) = (r for r in rows if (r["term"], r["setting"]) == (term, setting))
    return found


def test_official_sends_no_gradient_into_the_corrupted_stream(measured):
    for _, rows in measured.values():
        assert all(r["into_aug"] == 0 for r in rows if r["setting"] == "official")
        assert row(rows, "perception KL", "exact")["into_aug"] > 0.5


def test_the_sampled_entropy_of_the_policy_has_no_gradient_on_average(measured):
    """E_p[∇ log p] = 0: what −log p of sampled tokens teaches is noise."""
    for _, rows in measured.values():
        for setting in ("official", "paper"):
            assert row(rows, "entropy", setting)["expected"] == 0
        assert row(rows, "entropy", "exact")["expected"] == pytest.approx(1)


def test_bf16_logits_destroy_the_small_kl_and_not_the_entropy(bench, measured):
    errors = [row(measured[d][1], "perception KL", "exact")["bf16"] for d in bench.DISTANCES]
    assert errors == sorted(errors) and errors[-1] > 0.3
    assert all(row(rows, "entropy", "exact")["bf16"] < 0.1 for _, rows in measured.values())


def test_the_expected_gradient_is_the_mean_over_samples(bench):
    """The closed form beside what it stands for."""
    import torch

    goal = bench.config("paper", "perception KL")
    batch = bench.Batch.make(bench.DISTANCES[1])  # where the samples' noise is not too large
    _, *closed = bench.term(batch, goal, expected=True)
    p = (batch.hidden @ batch.weight.T).softmax(-1)
    total = [torch.zeros_like(x) for x in closed]
    generator = torch.Generator().manual_seed(1)
    rounds = 40
    for _ in range(rounds):
        batch.targets = torch.multinomial(p, 1, generator=generator)[:, 0]
        _, *gradients = bench.term(batch, goal)
        total = [t + g / rounds for t, g in zip(total, gradients, strict=True)]
    assert bench.cosine(tuple(total), tuple(closed)) > 0.85


def test_the_page_has_the_scripts_tables(bench, measured):
    page = (ROOT / "docs" / "implementations.md").read_text(encoding="utf-8")
    numbers = page.split(bench.MARKS[0])[1].split(bench.MARKS[1])[0]
    shown = [re.sub(r"[\d.e%+-]+", "#", line) for line in numbers.splitlines() if "|" in line]
    ours = "\n".join([*(bench.table(*x) for x in measured.values()), bench.averages()])
    expected = [re.sub(r"[\d.e%+-]+", "#", line) for line in ours.splitlines() if "|" in line]
    assert shown == expected
