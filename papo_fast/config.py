"""Every knob of a run, as frozen dataclasses; `papo_fast.presets` fills them in.

The command line is generated from these classes, so a field's docstring is its help text. Some
fields of `ObjectiveConfig` follow `parity` where they are None: `papo_fast.config_checks.resolve`
fills them in where a command starts. What several fields decide together stands here once, as a
property. Equations and default values: PAPO, arXiv 2507.06448, and docs/design.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from papo_fast.corruption_settings import CorruptionConfig as CorruptionConfig
from papo_fast.reward_settings import RewardConfig as RewardConfig
from papo_fast.term_settings import OF_AUG, OF_SECOND, own_terms
from papo_fast.view_settings import ViewTermSettings
from papo_fast.weight_settings import TokenWeightSettings

Estimator = Literal["sampled", "exact"]
KLPenalty = Literal["k1", "k2", "k3", "abs"]
Average = Literal["token", "sequence", "constant"]
AugRun = Literal["none", "stored", "frozen", "trained"]
LogprobSource = Literal["sampler", "pass", "update"]


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""
    """Local checkpoint directory (or hub name) of an image-text-to-text model (docs/models.md)."""
    forward: Literal["auto", "fast", "plain"] = "auto"
    """`fast`: a group's prompt runs once, for the families that allow it; `plain`: each response is
    a padded sequence of its own, for any family; auto: fast where it is possible."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the forward pass. Weights and optimizer stay in float32, where an update of 1e-6 is
    not rounded away."""
    train_vision: bool = True
    """Train the vision tower; False freezes it."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass to save memory."""
    lora_rank: int = 0
    """Train adapters of this rank and freeze everything else (LoRA); 0 trains the weights. The
    reference policy is then the model without its adapters and takes no memory."""
    lora_alpha: float = 0.0
    """LoRA's scale is lora_alpha / lora_rank; 0: twice the rank."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers that get adapters, such as q_proj; empty: all, in vision with train_vision."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's kernels for RMSNorm and SwiGLU; auto: where there is a GPU and liger-kernel."""
    trust_remote_code: bool = False
    """Let transformers run code that ships with the checkpoint. Leave off unless you trust it."""


@dataclass(frozen=True)
class DataConfig:
    train: str = ""
    """Training data: a .parquet or .jsonl file, or a hub dataset name."""
    test: str = ""
    """Held-out data for evaluation; empty: no evaluation before and after."""
    problem_key: str = "problem"
    """Column with the question's text."""
    answer_key: str = "answer"
    """Column with the reference answer."""
    images_key: str = "images"
    """Column with a list of images, as bytes or as paths relative to the file."""
    kind_key: str = "kind"
    """Optional column that splits the evaluation table, e.g. vision_dependent / text_leaning."""
    reading_key: str = "reading"
    """Optional column with what the picture says, for the split of errors into perception and
    reasoning: a response read it right if the same stands between <think> and </think>."""
    prompt_suffix: str = (
        " You first think through the reasoning process as an internal monologue, enclosed "
        "within <think> </think> tags. Then, provide your final answer enclosed within \\boxed{}."
    )
    """Appended to every question (PAPO's instruction)."""
    max_prompt_length: int = 4096
    """Longest prompt in tokens, image tokens included."""
    min_pixels: int = 200_704
    """Smaller images are enlarged to this many pixels."""
    max_pixels: int = 1_003_520
    """Larger images are shrunk to this many pixels."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """An unreadable image, an empty answer or a too long prompt: stop, or skip it and count."""
    shuffle: bool = True
    """Shuffle the training data each epoch (seeded)."""


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
    """Sequences generated at a time, by each process or server."""
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
    server_token_file: str = ""
    """File, of mode 600, with the token that the servers of `server_urls` ask for, which
    `papo-fast serve` makes where it is missing. A run's own server needs none."""


@dataclass(frozen=True)
class ParallelConfig:
    """How torchrun's processes share the model; a single process holds all of it."""

    replicas: int = 1
    """Groups of processes that each hold the whole model (HSDP); 1 shards over all of them."""
    offload: bool = False
    """Keep weights, gradients and optimizer in the CPU's memory, a layer at a time on the GPU."""


@dataclass(frozen=True)
class ObjectiveConfig(TokenWeightSettings, ViewTermSettings):
    parity: Literal["ours", "official", "paper"] = "ours"
    """`ours`: exact terms; `official`: the authors' code; `paper`: the paper's printed equations.
    Sets every field below whose default is None, and nothing else."""
    clip_low: float = 0.2
    """Policy ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.3
    """Policy ratio is clipped above at 1 + clip_high."""
    clip_dual: float | None = 3.0
    """Dual clip: bounds the loss at clip_dual * |A| where A < 0; None turns it off."""
    kl_coef: float = 0.01
    """β, weight of the KL to the reference policy; 0 loads no reference model."""
    kl_estimator: Estimator = "sampled"
    """Reference KL from sampled tokens (`kl_penalty`), or exact over the vocabulary."""
    kl_penalty: KLPenalty = "k3"
    """Sampled estimator of the reference KL."""
    kl_prcp_coef: float = 0.02
    """γ, weight of the perception KL, which is maximised."""
    kl_prcp_estimator: Estimator | None = None
    """Perception KL from sampled tokens (`kl_prcp_penalty`), or exact over the vocabulary."""
    kl_prcp_penalty: KLPenalty = "k3"
    """Sampled estimator of the perception KL."""
    kl_prcp_top_p: float | None = None
    """Keep the perception KL on the largest share of each sequence's tokens; None: on all. In
    official parity: on the tokens that are not below its (1 - share) quantile."""
    kl_prcp_clip: float | None = None
    """Upper bound of a token's perception KL; None: no bound of ours. In official parity a bound
    comes with a lower one, 0, which acts on k1."""
    kl_prcp_anneal_steps: int = 0
    """Updates over which γ goes linearly from kl_prcp_coef to 0; 0: constant. In official parity
    η₁ and η₂ shrink by the same factor."""
    entropy_coef: float = 0.0
    """η₁, weight of the entropy with the real image, which is minimised."""
    aug_entropy_coef: float = 0.0
    """η₂, weight of the entropy with the corrupted image, which is minimised."""
    entropy_estimator: Estimator | None = None
    """Entropies as mean of -logprobs of the sampled tokens, or exact over the vocabulary."""
    kl_prcp_direction: Literal["forward", "reverse"] = "forward"
    """Perception KL(π ‖ π_aug), or `reverse`: KL(π_aug ‖ π), exact only, whose gradient with the
    corrupted stream constant is what the authors' sampled term has in expectation."""
    aug: Literal["stored", "frozen", "trained"] | None = None
    """How the corrupted stream runs. `stored`: its log-probs of the sampled tokens are taken once
    per rollout, as the authors do; sampled terms only. `frozen`: the update runs it, and it is a
    constant in every gradient. `trained`: gradients flow into it too."""
    average: Average | None = None
    """Token mean, mean of sequence means, or Dr. GRPO's constant denominator."""
    average_over: Literal["global", "micro"] | None = None
    """Denominators of the mean: the whole global batch, or each micro-batch (the authors' code)."""
    advantage: Literal["grpo", "dr_grpo"] = "grpo"
    """Group-relative advantage with (`grpo`) or without (`dr_grpo`) division by the group's std."""
    sft_coef: float = 0.0
    """Weight of a likelihood term on right responses."""
    terms: tuple[str, ...] = ()
    """Terms of your own that are added to the loss, as FILE.py:name, each with =COEFFICIENT behind
    it; without one it is 1. A positive one is minimised."""

    def resolved(self) -> ObjectiveConfig:
        """A copy in which every field that follows `parity` is filled in (docs/design.md)."""
        estimator = "exact" if self.parity == "ours" else "sampled"
        exact = "exact" in (
            self.kl_prcp_estimator or estimator,
            self.entropy_estimator or estimator,
        )
        # With gradients into it a policy learns to spot corrupted pictures (docs/evidence.md).
        constant = "frozen" if exact or self.parity == "ours" else "stored"
        follow = {
            "kl_prcp_estimator": estimator,
            "entropy_estimator": estimator,
            "aug": "trained" if self.parity == "paper" else constant,
            "average": "token",
            "average_over": "micro" if self.parity == "official" else "global",
        }
        if self.parity == "paper" and self.kl_coef > 0:
            follow["average"] = "sequence"  # the paper's PAPO-G; its PAPO-D (β = 0) averages tokens
        missing = {k: v for k, v in follow.items() if getattr(self, k) is None}
        return dataclasses.replace(self, **missing)

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef != 0

    @property
    def has_aug_terms(self) -> bool:
        own = any(name in OF_AUG for term in own_terms(self.terms) for name in term.needs)
        built_in = self.kl_prcp_coef != 0 or self.aug_entropy_coef != 0
        return own or built_in or self.needs_second

    @property
    def needs_second(self) -> bool:
        """A second corrupted view, which runs as the first one does."""
        own = any(name in OF_SECOND for term in own_terms(self.terms) for name in term.needs)
        return own or self.has_dvrp_term or self.margin_coef != 0

    @property
    def needs_aug(self) -> bool:
        return self.has_aug_terms or self.weighs_on != "none"

    @property
    def aug_stream(self) -> AugRun:
        """How the corrupted stream runs in an update, `none` where it needs none.

        Raises `ValueError` for a configuration that is not resolved: it does not know yet.
        """
        if not self.has_aug_terms:
            return "frozen" if self.weighs_on == "current" else "none"
        if self.aug is None:
            raise ValueError("the objective is not resolved: pass config.resolved()")
        return self.aug

    @property
    def streams_at_once(self) -> int:
        """Streams in the largest forward pass of an update."""
        views = 2 if self.needs_second else 1
        return {"trained": 1 + views, "frozen": views}.get(self.aug_stream, 1)


@dataclass(frozen=True)
class TrainConfig:
    lr: float = 1e-6
    """Learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """After the warm-up: constant (the paper), or falling linearly to 0 at the last update."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    update_prompts: int = 128
    """Global batch of one update, in prompts; a rollout makes rollout.prompts / this updates."""
    max_tokens: int = 16_384
    """Tokens per forward and backward pass: prompts with their pictures, once for the responses
    they share, and responses, in both streams. A group that is larger is split."""
    epochs: int = 2
    """Passes over the training data."""
    steps: int = 0
    """Rollouts to train for; 0: what `epochs` gives."""
    checkpoint_every: int = 0
    """Steps between checkpoints, from which --resume continues, the first after step 1; 0: one only
    when something stops the run (SIGTERM, Ctrl-C, an error)."""
    keep_checkpoints: int = 2
    """Latest checkpoints that stay; the one with the best reward stays besides."""
    max_bad_updates: int = 3
    """Updates in a row with a gradient that is not finite (skipped, counted) that end the run."""


@dataclass(frozen=True)
class EvalConfig:
    samples: int = 8
    """k of mean@k: samples per question."""
    limit: int = 0
    """Questions per kind; 0: all."""
    temperature: float = 1.0
    """Sampling temperature of the evaluation."""
    corrupted: bool = True
    """Also evaluate with corrupted images: a model that looks must get worse."""
    examples: int = 12
    """Questions whose pictures and first responses are kept for the report."""


@dataclass(frozen=True)
class DigitsConfig:
    """The built-in task: arithmetic over handwritten digits, for the `tiny` presets."""

    enabled: bool = False
    """Build model and data on this machine instead of reading `model.path`, `data.train`."""
    cache: str = "runs/digits"
    """Where the data and the warm-started model are kept between runs."""
    train_questions: int = 8192
    """Training questions written to parquet."""
    test_questions: int = 512
    """Held-out questions written to parquet, half of each kind."""
    warm_accuracy: float = 0.36
    """Accuracy on vision-dependent questions at which the supervised warm start stops."""
    warm_max_steps: int = 1500
    """Supervised steps after which the warm start stops with an error."""
    task: Literal["digits", "digits-shortcut"] = "digits"
    """`digits-shortcut`: training questions carry hints that are right in 80 % of the rows, and the
    test has hints that are right, absent and misleading in equal parts."""
    held_out: Literal["test", "dev"] = "test"
    """Whose handwriting the held-out questions show; `dev` for choosing settings, so that the test
    stays unseen."""


@dataclass(frozen=True)
class Config:
    preset: str = ""
    """Name of the preset this configuration started from."""
    name: str = ""
    """Name of the run; empty: the preset and the seed."""
    out: str = "runs"
    """Folder of all runs; this one writes to OUT/NAME."""
    seed: int = 0
    """Seed of everything random. The same seed gives the same metrics, bit for bit on the CPU."""
    device: str = "auto"
    """`auto`: cuda where there is one, else cpu."""
    threads: int = 0
    """CPU threads for torch; 0: leave as it is."""
    overwrite: bool = False
    """Replace the run of the same name if there is one."""
    resume: bool = False
    """Continue the run of the same name from its last checkpoint, or start it if it has none."""
    track: Literal["none", "auto", "wandb", "tensorboard", "trackio"] = "none"
    """Also log the metrics to a tracker that is installed; auto: the first of these three."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    digits: DigitsConfig = field(default_factory=DigitsConfig)

    @property
    def run_name(self) -> str:
        return self.name or f"{self.preset or 'run'}-seed{self.seed}"

    @property
    def updates_per_rollout(self) -> int:
        return self.rollout.prompts // self.train.update_prompts

    @property
    def old_logprobs_from(self) -> LogprobSource:
        """Whose log-probs the policy ratio is taken to.

        `sampler`: those that the sampler reported. `update`: where a rollout makes a single update,
        that update's own. `pass`: those of a pass of the trainer before the first update.
        """
        if self.rollout.old_logprobs == "sampler":
            return "sampler"
        return "update" if self.updates_per_rollout == 1 else "pass"

    @property
    def weighs_by_sampler(self) -> bool:
        """Whether the policy loss gets importance weights of the trainer over the sampler.

        It does not where old log-probs are the sampler's: the policy ratio then is that of the
        trainer over the sampler already. Nor with `hf`, whose sampler is the trainer's model, nor
        in the authors' objective.
        """
        rollout = self.rollout
        return (
            rollout.importance_cap > 0
            and rollout.engine != "hf"
            and rollout.old_logprobs == "recompute"
            and self.objective.parity != "official"
        )
