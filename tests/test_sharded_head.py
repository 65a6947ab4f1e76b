"""Gradients of the hooks' statistics where FSDP2 shards the output embedding, in every layout."""

import json

import pytest

from support import SUPPORT
from support.ranks import launch

pytestmark = pytest.mark.xdist_group("head")  # what they share is made in one process

TWO = ("lm_head alone", "tied", "tail group", "accumulated", "summed")


def run(folder, ranks, *layouts):
    launch(ranks, [str(SUPPORT / "head_worker.py"), str(folder), *layouts])
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(ranks)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2, *TWO)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return run(tmp_path_factory.mktemp("four"), 4, "HSDP")


def worst(errors):
    print({name: f"{e:.1e}" for name, e in errors.items() if e > 1e-5}, max(errors.values()))
    return max(errors.values())


@pytest.mark.parametrize("layout", TWO)
def test_the_heads_gradient_is_that_of_all_ranks(two_ranks, layout):
    """A bare `full_tensor()` leaves `lm_head` alone with each rank's own rows: .95 off."""
    for of_rank in two_ranks:
        assert len(of_rank[layout]) > 20  # every trained parameter has a gradient
        assert worst(of_rank[layout]) < 1e-5


def test_the_heads_gradient_is_that_of_all_ranks_under_hsdp(four_ranks):
    for of_rank in four_ranks:
        assert worst(of_rank["HSDP"]) < 1e-5


def test_a_sharded_weight_that_a_caller_hands_over_gets_the_gradient_of_all_ranks(
    two_ranks, four_ranks
):
    for of_rank in (*two_ranks, *four_ranks):
        assert worst(of_rank["linear_cross_entropy"]) < 1e-5
