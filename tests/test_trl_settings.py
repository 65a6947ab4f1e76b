"""PAPO on TRL's trainer: adapters, Liger's layers, settings it refuses, and that it learns."""

import sys

import pytest
import torch

from support.family_checkpoints import FAMILIES, byte_tokenizer
from support.trl_runs import TERMS, build, loss_and_gradients, write_files  # first: it asks for TRL

# isort: split
import datasets
from peft import LoraConfig
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.liger import apply_liger_kernel
from trl import GRPOConfig, GRPOTrainer

from papo_fast.errors import InputError
from papo_fast.integrations.trl import PAPOConfig, PAPOTrainer, use_token_stats

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
        ({"use_adaptive_entropy": True, "entropy_loss_coef": 0.1}, "use_adaptive_entropy"),
        ({"parity": "exact"}, "parity"),
        ({"corruption_ratio": 1.5}, "corruption.ratio"),
    ],
)
def test_settings_that_make_no_sense_are_refused(files, changes, message):
    with pytest.raises(InputError, match=message):
        build(files, "qwen2_5_vl", **changes)


@pytest.mark.parametrize("trainer", [GRPOTrainer, PAPOTrainer])
def test_a_router_loss_is_refused_when_the_trainer_is_made(tmp_path, trainer):
    tokenizer = byte_tokenizer()
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))

    def make(**settings):
        config = GRPOConfig if trainer is GRPOTrainer else PAPOConfig
        made = trainer(
            model,
            lambda completions, **_: [0.0] * len(completions),
            config(str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=0.0, **settings),
            train_dataset=datasets.Dataset.from_list([{"prompt": "1+1="}] * 8),
            processing_class=tokenizer,
        )
        return made if trainer is PAPOTrainer else use_token_stats(made)

    with pytest.raises(InputError, match=r"router_aux_loss_coef = 0\.001: .* no router logits"):
        make()
    terms = {} if trainer is GRPOTrainer else dict(kl_prcp_coef=0.0)
    make(router_aux_loss_coef=0.0, **terms)
    model.config.output_router_logits = True
    with pytest.raises(InputError, match="output_router_logits=False"):
        make(router_aux_loss_coef=0.0, **terms)


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
