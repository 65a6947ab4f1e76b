"""Rollout by vLLM inside the training process: one engine per rank, on the rank's own device.

Weights go over as tensors, whole and one at a time, through vLLM's `reload_weights`; under FSDP2
all ranks gather each one together. While the policy is updated the engine sleeps: its weights and
its cache leave the GPU, and the weights come back as new ones. On the CPU sleeping does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from papo_fast.config import Config
from papo_fast.data.encoded import EncodedPrompt
from papo_fast.data.encoder import PromptEncoder
from papo_fast.errors import InputError
from papo_fast.model.policy import Policy
from papo_fast.parallel import world_size
from papo_fast.rollout.vllm_requests import (
    RequestFormat,
    cpu_options,
    engine_options,
    prompt_passes,
    prompt_seeds,
)
from papo_fast.rollout.vllm_setup import prepare_this_process
from papo_fast.samples import Completion


class VLLMRollout:
    """`RolloutEngine` in this process.

    Args:
        config: `model`, `data` and `rollout` decide what is loaded and how large the caches are.
        encoder: of the same checkpoint.
        device: the policy's.

    Raises:
        InputError: vLLM is not installed, or does not fit into `rollout.gpu_memory`.
    """

    def __init__(self, config: Config, encoder: PromptEncoder, device: torch.device):
        on_cpu = device.type == "cpu"
        prepare_this_process(on_cpu=on_cpu)
        from vllm import LLM

        options = engine_options(config, encoder)
        options |= {"model": config.model.path, "seed": 0, "use_tqdm_on_load": False}
        if on_cpu:
            options |= cpu_options(config, encoder)
        else:
            options["enable_sleep_mode"] = True
        if world_size() > 1:
            # every rank is an engine of its own within torchrun's processes
            options["distributed_executor_backend"] = "external_launcher"
        threads = torch.get_num_threads(), torch.set_num_threads
        try:
            # vLLM seeds torch's own random numbers
            with torch.random.fork_rng([] if on_cpu else [device]):
                self.llm = LLM(**options)
        except ValueError as error:
            raise InputError(
                f"vLLM does not start with rollout.gpu_memory = {config.rollout.gpu_memory}, "
                f"rollout.batch_size = {config.rollout.batch_size}: {error}"
            ) from error
        finally:
            # vLLM's CPU worker makes torch.set_num_threads do nothing, for everybody
            torch.set_num_threads = threads[1]
            torch.set_num_threads(threads[0])
        self.format = RequestFormat(encoder)
        self.can_sleep = not on_cpu
        self.asleep = False

    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        n: int,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        advance: Callable[[int], None],
    ) -> list[list[Completion]]:
        """Sample `n` responses per prompt at `temperature` (see `RolloutEngine`)."""
        from vllm import SamplingParams

        if self.asleep:
            raise RuntimeError("generate after sleep: load_weights first")
        if not prompts:  # a rank without a share
            return []
        requests, parameters = [], []
        for prompt, its_seed in zip(prompts, prompt_seeds(seed, len(prompts), n), strict=True):
            ids, pictures = self.format.prompt(prompt)
            request = {"prompt_token_ids": ids}
            if pictures:
                request["multi_modal_data"] = {"image": pictures}
            requests.append(request)
            sampling = self.format.sampling(n, temperature, max_new_tokens, its_seed)
            # not from_optional, which cuts the bias off at -100
            parameters.append(SamplingParams(**sampling))
        groups = []
        for prompt, answer in zip(
            prompts, self.llm.generate(requests, parameters, use_tqdm=False), strict=True
        ):
            self.format.check_prompt(prompt, answer.prompt_token_ids, "vLLM")
            groups.append([self._completion(output) for output in answer.outputs])
        advance(len(prompts))
        return groups

    def _completion(self, output) -> Completion:
        drawn = zip(output.token_ids, output.logprobs, strict=True)
        logprobs = [of_step[token].logprob for token, of_step in drawn]
        return self.format.completion(output.token_ids, logprobs, output.finish_reason)

    def load_weights(self, policy: Policy) -> None:
        """Take over the policy's weights and forget keys, values and pictures of the old ones."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": policy.whole_weights()}
        )
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of the old weights")
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()

    @staticmethod
    def prompt_passes(n: int) -> int:
        """See `vllm_requests.prompt_passes`."""
        return prompt_passes(n)

    def sleep(self) -> None:
        """Level 2: neither weights nor cache are kept, as all of them are about to be replaced."""
        if self.can_sleep and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def close(self) -> None:
        """Free what the engine holds; ends the default process group too, which it has joined."""
        self.llm.llm_engine.engine_core.shutdown()
