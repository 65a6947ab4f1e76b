"""The hooks in TRL's own training loop: a few rows of bench/peers/trl.sh, on a smaller vocabulary.

In each row four trainers take the same optimiser steps on the same sampled responses.
"""

import json

import pytest

import support.trl_runs  # noqa: F401, first: it asks for TRL
from support import SUPPORT
from support.family_checkpoints import write_checkpoint
from support.ranks import launch

# isort: split
from papo_fast.digits.task import write_questions
from papo_fast.errors import InputError
from support.trl_peer import Case, row_of, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore")
UPDATES = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4}
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
SMALL_STEPS = {"epsilon": 0.9, "epsilon_high": 9.0, "delta": None, "learning_rate": 1e-4}
CASES = {
    "two updates of two micro-batches": Case({**UPDATES, "beta": 0.04}),
    "the ratio of a sequence": Case(
        # its loss is a sum over tokens
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "learning_rate": 2e-4}
    ),
    "LoRA and gradient checkpointing": Case(
        {"gradient_checkpointing": True}, papo={"aug": "trained"}, lora=LORA
    ),
    "bfloat16 weights": Case({"model_init_kwargs": {"dtype": "bfloat16"}, **SMALL_STEPS}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    write_questions(folder / "train.parquet", 16, "train", 0)
    write_checkpoint(folder / "model", "qwen2_5_vl")
    return folder


def check(row, rounded=False):
    """The hook's numbers are TRL's, and PAPO's those of whole logits; both within rounding.

    TRL rounds logits to 16 bits where weights or autocast are of 16 bits, and the hook does not.
    """
    assert row["GRPO: loss"] < (0.05 if rounded else 1e-5), row
    assert row["GRPO: gradients"] < (0.3 if rounded else 3e-5), row
    assert row["GRPO: metrics"] < (0.05 if rounded else 1e-5), row
    assert row["PAPO: loss"] < (1e-3 if rounded else 1e-5), row
    assert row["PAPO: gradients"] < (0.02 if rounded else 3e-5), row
    assert row["PAPO: metrics"] < (1e-3 if rounded else 1e-5), row
    assert row["what PAPO adds"] > 1e-2, row


RARE = ("the ratio of a sequence",)  # test_trl.py has the loss of each of TRL's types


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.exhaustive) if n in RARE else n for n in CASES],
)
def test_steps_are_trls_own_and_papo_is_that_of_whole_logits(files, name):
    check(row_of(CASES[name], files), rounded="bfloat16" in name)


@pytest.mark.slow
def test_two_processes_take_the_same_steps(files):
    launch(2, [str(SUPPORT / "trl_worker.py"), str(files)])
    check(json.loads((files / "row.json").read_text()))


def test_dropout_between_the_streams_is_refused(files):
    lora = {"target_modules": ["q_proj"], "lora_dropout": 0.1}
    with pytest.raises(InputError, match=r"lora_dropout.* drops out a share of 0\.1: .*lora_drop"):
        trainer_of("PAPO", Case(lora=lora), files)
    trainer_of("PAPO", Case({"disable_dropout": True}, lora=lora), files)
    trainer_of("hook", Case(lora=lora), files)  # one stream: dropout is TRL's own affair
