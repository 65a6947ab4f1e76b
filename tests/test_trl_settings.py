"""PAPO on TRL's trainer: adapters, Liger's layers, settings it refuses, and that it learns."""

import sys

import pytest
import torch

from support.family_checkpoints import FAMILIES
from support.trl_runs import TERMS, build, loss_and_gradients, write_files  # first: it asks for TRL

# isort: split
from peft import LoraConfig
from transformers.integrations.liger import apply_liger_kernel
from trl import GRPOConfig

from papo_fast.errors import InputError
from papo_fast.integrations.trl import PAPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("trl"))


def test_only_the_adapter_of_lora_is_trained(files):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    papo = build(files, "qwen2_5_vl", peft_config=lora, **TERMS)
    assert papo.ref_model is None
    batch = papo._generate_and_score_completions([papo.train_dataset[0]] * 4)
    batch["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    _, gradients = loss_and_gradients(papo, batch)
    assert gradients and all("lora_" in name for name in gradients)
    assert any(x.any() for x in gradients.values())
    # the reference is the model below the adapter, also once the adapter has moved
    for name, parameter in papo.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    papo.compute_loss(papo.model, batch)
    assert papo._metrics["train"]["kl"][-1] > 1e-3


def test_an_adapter_on_the_output_embedding_is_refused(files):
    with pytest.raises(ValueError, match="lm_head"):
        build(files, "qwen2_5_vl", peft_config=LoraConfig(target_modules=["lm_head"]))


def test_ligers_layers_leave_the_head_in_place(files):
    pytest.importorskip("liger_kernel")
    papo = build(files, "qwen2_5_vl", use_liger_kernel=True)
    forward, norm = papo.model.forward, papo.model.model.language_model.norm
    plain_norm = norm.forward.__func__
    # Liger replaces classes of transformers' modules, for the whole process
    found = [m for n, m in sys.modules.items() if n.startswith("transformers.models.qwen2")]
    before = [(m, dict(vars(m))) for m in found]
    apply_liger_kernel(papo.model, papo.args.liger_kernel_config)  # what `train` does first
    for module, members in before:
        vars(module).update(members)
    assert papo.model.forward == forward
    assert norm.forward.__func__ is not plain_norm  # its layers are Liger's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entropy_coef": 0.1, "entropy_loss_coef": 0.1}, "entropy_coef"),
        ({"parity": "exact"}, "parity"),
        ({"corruption_ratio": 1.5}, "corruption.ratio"),
    ],
)
def test_settings_that_make_no_sense_are_refused(files, changes, message):
    with pytest.raises(InputError, match=message):
        build(files, "qwen2_5_vl", **changes)


def test_a_config_of_trls_own_is_refused(files):
    with pytest.raises(InputError, match="expected a PAPOConfig"):
        build(files, "qwen2_5_vl", PAPOTrainer, GRPOConfig)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_epochs_raise_the_reward(files, family):
    papo = build(
        files,
        family,
        **TERMS,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        num_generations=16,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        beta=0.0,
        grad_budget=3e-3,
        gradient_checkpointing=family == "qwen3_vl",
    )
    papo.train_dataset = papo.train_dataset.select(range(8))
    papo.train()
    log = [entry for entry in papo.state.log_history if "reward" in entry]
    assert log[-1]["epoch"] == 2 and len(log) == 16
    rewards = torch.tensor([entry["reward"] for entry in log])
    assert rewards[-4:].mean() > rewards[:4].mean() + 0.5, rewards.tolist()
    assert all(entry["kl_prcp"] >= 0 and entry["aug_entropy"] >= 0 for entry in log)
    assert log[0]["kl_prcp"] > 0.01
