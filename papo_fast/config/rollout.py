"""How responses are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["hf", "vllm", "vllm_server"] = "hf"
    """What generates the responses: transformers on the policy's own weights (`hf`), vLLM inside
    every process of the run (`vllm`), or vLLM servers over HTTP (`vllm_server`)."""
    prompts: int = 384
    """Prompts per rollout (per training step)."""
    group_size: int = 5
    """G, responses sampled per prompt."""
    temperature: float = 1.0
    """Sampling temperature; the policy is scored at the same temperature."""
    max_new_tokens: int = 2048
    """Longest response in tokens."""
    batch_size: int = 64
    """Sequences generated at a time, by each process or server; vLLM is faster with e.g. 256."""
    overlap: bool = False
    """Sample the next batch by vLLM servers while this one trains. Its responses are one step off
    the policy, which importance weights or old log-probs of the sampler correct for."""
    dynamic_filter: bool = False
    """DAPO's dynamic sampling: drop groups whose mean accuracy is outside `filter_range`."""
    filter_range: tuple[float, float] = (0.01, 0.99)
    """Mean accuracies, both excluded, between which a group is kept by `dynamic_filter`."""
    filter_prompts: int = 128
    """Prompts generated at a time while the dynamic filter fills the batch."""
    max_filter_rounds: int = 20
    """Rounds of `filter_prompts` after which no more is sampled for a batch."""
    filter_unfilled: Literal["error", "top_up"] = "error"
    """A batch that is not full then: an error, or topped up with groups that the filter dropped,
    whose advantages are zero."""
    old_logprobs: Literal["recompute", "sampler"] = "recompute"
    """Old log-probs from one more pass of the trainer (none is needed where a rollout makes a
    single update), or as the sampler reported them: the ratio then corrects for its rounding."""
    importance_cap: float = 2.0
    """Where vLLM samples and old log-probs are recomputed: each token's policy loss is weighted by
    min(p_trainer / p_sampler, this); 0: no weights. Never in official parity."""
    gpu_memory: float = 0.4
    """Share of each GPU's memory that vLLM takes for its weights and KV cache."""
    tensor_parallel: int = 1
    """GPUs that share the model of one vLLM server."""
    server_urls: tuple[str, ...] = ()
    """vLLM servers, e.g. http://127.0.0.1:8000, each started by `papo-fast serve` with the options
    of this run; processes take them in turn. None: the run starts its own, without a port."""
    server_timeout: float = 600.0
    """Seconds after which a request to a vLLM server, or the start of one, counts as failed."""
    server_weights: str = ""
    """Folder in which new weights are handed to vLLM servers, on a disk that they share with the
    run, e.g. under /dev/shm on one machine; each run makes a folder of its own in it. Empty: in
    the run's folder."""
    server_transfer: Literal["disk", "nccl", "ipc"] = "disk"
    """How new weights reach vLLM servers: as files in `server_weights` (`disk`); from GPU to GPU by
    vLLM's transfer engine (`nccl`; servers have GPUs of their own); or read by a single server from
    the memory of the GPU that it shares with a run of one process (`ipc`)."""
    server_token_file: str = ""
    """File, of mode 600, with the token that the servers of `server_urls` ask for, which
    `papo-fast serve` makes where it is missing. A run's own server needs none."""
