"""What `papo_fast.integrations.verl_engine` imports of verl 0.9.1, for tests without verl.

Names, arguments and order of calls are verl's (tests/data/verl_interfaces.json); the bodies do the
same on a padded batch without FSDP. bench/peers/verl.sh runs the engine in verl itself.
"""

from __future__ import annotations

import types

import torch

from papo_fast.integrations.verl import FusedLinearForPPO


class MicroBatch(dict):
    """The few methods of a TensorDict that are called."""

    def select(self, *names):
        return MicroBatch({name: self[name] for name in names})

    def to_padded_tensor(self):
        return {name: torch.nested.to_padded_tensor(x, 0) for name, x in self.items()}


class EngineRegistry:
    registered: dict = {}

    @classmethod
    def register(cls, model_type, backend, device="cuda", vendor=None):
        def decorator(engine_class):
            for one in backend:
                for kind in device:
                    for maker in vendor:
                        cls.registered[model_type, one, kind, maker] = engine_class
            return engine_class

        return decorator


class FSDPEngineWithLMHead:
    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        self.model_config = model_config
        self.mode = "train"
        self.lr_scheduler = types.SimpleNamespace(last_epoch=0)

    def initialize(self):
        self.module = self._build_module()

    def _build_module(self):
        return self.model_config.model

    def prepare_model_inputs(self, micro_batch):
        ids = torch.nested.to_padded_tensor(micro_batch["input_ids"], 0)
        lengths = micro_batch["input_ids"].offsets().diff()
        pictures = micro_batch["multi_modal_inputs"]
        inputs = {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "mm_token_type_ids": (ids == self.module.config.image_token_id).long(),
            "temperature": micro_batch["temperature"],
            "return_dict": True,
        }
        for name in {name for one in pictures for name in one or {}}:
            inputs[name] = torch.cat([one[name] for one in pictures])
        return inputs, {}

    def _gather_and_unpad_packed(self, tensor, pad_size):
        return tensor[:-pad_size] if pad_size else tensor

    def prepare_model_outputs(self, output, output_args, micro_batch, logits_processor_func):
        offsets = micro_batch["input_ids"].offsets()
        if "pad_size" in output_args:
            values = self._gather_and_unpad_packed(output.log_probs[0], output_args["pad_size"])
        else:
            rows = zip(output.log_probs, offsets.diff().tolist(), strict=True)
            values = torch.cat([row[:n] for row, n in rows])
        return {"log_probs": torch.nested.nested_tensor_from_jagged(values, offsets)}

    def forward_step(self, micro_batch, loss_function, forward_only):
        inputs, output_args = self.prepare_model_inputs(micro_batch)
        output = self.module(**inputs, use_cache=False)
        found = self.prepare_model_outputs(output, output_args, micro_batch, loss_function)
        return loss_function(model_output=found, data=micro_batch, dp_group=None)


def no_padding_2_padding(tensor, data):
    responses = data["responses"].offsets().diff().tolist()
    rows = [x[-n - 1 : -1] for x, n in zip(tensor.unbind(), responses, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def agg_loss(
    loss_mat,
    loss_mask,
    loss_agg_mode,
    dp_size=1,
    batch_num_tokens=None,
    global_batch_size=None,
    loss_scale_factor=None,
):
    if loss_agg_mode == "token-mean":
        return (loss_mat * loss_mask).sum() / batch_num_tokens * dp_size
    assert loss_agg_mode == "seq-mean-token-sum"
    return (loss_mat * loss_mask).sum() / global_batch_size * dp_size


def ppo_loss(config, model_output, data, dp_group=None):
    for name in ("dp_size", "batch_num_tokens", "global_batch_size"):
        config.global_batch_info[name] = data[name]
    padded = data.select("response_mask", "advantages").to_padded_tensor()
    gain = no_padding_2_padding(model_output["log_probs"], data) * padded["advantages"]
    info = config.global_batch_info
    loss = -agg_loss(gain, padded["response_mask"], config.loss_agg_mode, **info)
    return loss, {"actor/pg_loss": loss.item()}


class AggregationType:
    SUM = "sum"


class Metric:
    def __init__(self, aggregation, value=None):
        self.aggregation, self.values = aggregation, [value.item()]


MODULES = {
    "verl.trainer.ppo.core_algos": {"agg_loss": agg_loss},
    "verl.utils.experimental.torch_functional": {"FusedLinearForPPO": FusedLinearForPPO},
    "verl.utils.metric": {"AggregationType": AggregationType, "Metric": Metric},
    "verl.workers.engine": {"EngineRegistry": EngineRegistry},
    "verl.workers.engine.fsdp.transformer_impl": {"FSDPEngineWithLMHead": FSDPEngineWithLMHead},
    "verl.workers.utils.losses": {"ppo_loss": ppo_loss},
    "verl.workers.utils.padding": {"no_padding_2_padding": no_padding_2_padding},
}


def modules():
    """{name: module} for `sys.modules`, packages included."""
    found = {}
    for name, contents in MODULES.items():
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            package = ".".join(parts[:n])
            module = found.setdefault(package, types.ModuleType(package))
            module.__path__ = []
        found[name].__dict__.update(contents)
    return found
