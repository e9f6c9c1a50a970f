"""The configuration of a run: one tree of dataclasses, read from a YAML recipe.

Defaults are EGSPO-SA's with exact on-policy numerics; ``algorithm.preset`` changes several at once.
Checks that need only the configuration are made here, before any model or data is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Strategy = Literal[
    "high_entropy", "uniform", "random", "all", "uniform_reference", "random_reference"
]
EntropyOver = Literal["revealed", "block", "masked"]
EntropyReduce = Literal["mean", "sum"]
Policy = Literal["low_confidence", "random", "max_prob", "margin", "entropy"]
BlockCache = Literal["none", "prefix", "dual"]
EngineName = Literal["auto", "replicated", "fsdp2", "zero2", "zero3"]
Preset = Literal["egspo", "egspo-sa", "reference", "uniform", "random"]
Protocol = Literal["strict", "published"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass
class LoraConfig:
    """Low-rank adapters on the seven projections of every block (never the LM head)."""

    rank: int = 128
    alpha: int = 64
    dropout: float = 0.05
    target_modules: list[str] | None = None
    """Module names or suffixes; None for all seven projections."""

    def __post_init__(self) -> None:
        _require(self.rank > 0, f"model.lora.rank must be > 0, got {self.rank}")
        _require(self.alpha > 0, f"model.lora.alpha must be > 0, got {self.alpha}")
        _require(0 <= self.dropout < 1, f"model.lora.dropout must be in [0, 1), got {self.dropout}")


@dataclass
class ModelConfig:
    """Which model is trained: a checkpoint (``path``) or a new one (``config``)."""

    path: str | None = None
    """Local folder or hub name, for example ``GSAI-ML/LLaDA-8B-Instruct`` or
    ``Dream-org/Dream-v0-Instruct-7B``."""
    config: dict[str, Any] | None = None
    """Fields of a configuration for a new model, LLaDA's unless ``model_type: Dream`` is among
    them; the vocabulary comes from the tokenizer."""
    tokenizer: str | None = None
    """Folder or hub name; None takes ``path``'s, or the character tokenizer for a new model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights in memory; ``auto`` is bfloat16 for a frozen base on a GPU, else float32."""
    quantization: Literal["none", "nf4"] = "none"
    """``nf4``: the frozen base under an adapter in 4 bits (QLoRA), by bitsandbytes. The head stays
    in ``dtype``."""
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    """The backward pass computes each layer again, and only the layers' inputs are kept for it."""
    activation_offload: bool = False
    """What is kept for the backward pass is kept in host memory: all of it, or with
    ``gradient_checkpointing`` the layers' inputs."""
    lora: LoraConfig | None = None
    adapter: str | None = None
    """Folder of an adapter in PEFT format to continue from."""

    def __post_init__(self) -> None:
        _require(
            (self.path is None) != (self.config is None),
            "model needs exactly one of model.path (a checkpoint) and model.config (a new model)",
        )
        _require(
            self.adapter is None or self.lora is None,
            "model.adapter continues an existing adapter: it excludes model.lora",
        )
        _require(
            self.quantization == "none" or self.has_adapter,
            f"model.quantization: {self.quantization} freezes the weights: it needs model.lora or "
            "model.adapter",
        )

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, on a frozen base."""
        return self.lora is not None or self.adapter is not None


@dataclass
class TaskConfig:
    """The task by registered name; ``options`` go to its builder."""

    name: str = "sudoku"
    file: str | None = None
    """Python file that registers the task; like every path of a recipe, relative to the working
    directory. A run keeps a copy, and only continues with the same content."""
    options: dict[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int | None = None
    """Training prompts are cut to their last so many tokens, chat format and all, as the published
    code does at 200; null never cuts."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """Weights by reward name; rewards not named keep the task's."""
    intermediate_rewards: list[str] | None = None
    """Names of the rewards that score the one-step completions of EGSPO-SA; None for those that
    the task itself says."""
    on_reward_error: Literal["raise", "skip"] = "raise"
    """``skip`` leaves the sample out of the update, counts it and reports it."""
    reward_timeout: float | None = None
    """Seconds that one call of a reward function may take before it counts as failed; null keeps
    each function's own limit (300 unless the task says otherwise)."""

    def __post_init__(self) -> None:
        most = self.max_prompt_tokens
        _require(
            most is None or most > 0,
            f"task.max_prompt_tokens must be > 0, or null to never cut a prompt, got {most}",
        )
        _require(
            self.reward_timeout is None or self.reward_timeout > 0,
            "task.reward_timeout must be > 0, or null for each reward's own, "
            f"got {self.reward_timeout}",
        )


@dataclass
class GenerationConfig:
    """How a completion is denoised."""

    max_new_tokens: int = 256
    steps: int = 128
    block_length: int = 32
    temperature: float = 0.9
    policy: Policy = "max_prob"
    """Which positions are unmasked first. ``low_confidence`` is the published code's order; its
    step log-probability is a surrogate, the others' is exact."""
    cache: BlockCache = "none"
    """Keys and values made once per block instead of every step: of the ``prefix`` before the
    block, or ``dual``, of everything but the block. Cheaper, and another policy than full
    attention: training and decoding must agree, so this is saved with the weights."""
    guidance: float = 0.0
    """Strength of classifier-free guidance, for a second forward pass per step; 0 for none."""
    threshold: float | None = None
    """Besides a step's quota, reveal every position that scores at least this under ``policy``.
    The quota, ``block_length`` over the steps of a block, is then the least a step reveals, and
    ``steps`` the most a completion takes."""
    max_tokens_per_step: int | None = None
    """The most positions a step reveals with ``threshold``; None for the whole block."""
    early_exit: bool = True
    """Stop a completion after the block with its first EOS. The text is the same; False denoises
    the rest too, as the published code does."""
    batch_size: int = 32
    """Sequences denoised together, at most."""
    cuda_graphs: bool = False
    """Replay the forward pass of a step as a CUDA graph per batch shape."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "steps", "block_length", "batch_size"):
            value = getattr(self, name)
            _require(value > 0, f"generation.{name} must be > 0, got {value}")
        for name in ("temperature", "guidance"):
            value = getattr(self, name)
            _require(value >= 0, f"generation.{name} must be >= 0, got {value}")
        _require(
            self.max_new_tokens % self.block_length == 0,
            f"generation.max_new_tokens ({self.max_new_tokens}) must be a multiple of "
            f"generation.block_length ({self.block_length})",
        )
        blocks = self.max_new_tokens // self.block_length
        _require(
            self.steps % blocks == 0,
            f"generation.steps ({self.steps}) must divide evenly over the {blocks} blocks "
            f"of {self.block_length} tokens",
        )
        _require(
            self.steps // blocks <= self.block_length,
            f"generation.steps ({self.steps}) gives {self.steps // blocks} steps to a block of "
            f"{self.block_length} tokens: at most one step per token",
        )
        self._check_threshold()

    def _check_threshold(self) -> None:
        threshold, most = self.threshold, self.max_tokens_per_step
        if threshold is None:
            _require(
                most is None,
                f"generation.max_tokens_per_step ({most}) needs generation.threshold: without it "
                "every step reveals its quota",
            )
            return
        policies = ("max_prob", "margin", "low_confidence")
        _require(
            self.policy in policies,
            f"generation.threshold is compared with a score in [0, 1], which policy "
            f"{self.policy!r} does not have; choose from {policies}",
        )
        _require(0 < threshold <= 1, f"generation.threshold must be in (0, 1], got {threshold}")
        least = -(-self.max_new_tokens // self.steps)
        _require(
            most is None or least <= most <= self.block_length,
            f"generation.max_tokens_per_step must be between {least}, the quota of a step, and "
            f"generation.block_length ({self.block_length}), got {most}",
        )


@dataclass
class AlgorithmConfig:
    """Step selection, advantages and loss. A preset fills what the recipe leaves out."""

    preset: Preset | None = None
    group_size: int = 8
    selected_steps: int = 8
    """K, denoising steps trained per trajectory."""
    strategy: Strategy = "high_entropy"
    entropy_share: float | None = None
    """Adaptive K, with ``high_entropy``: of each trajectory the fewest steps that hold this share
    of the entropy of its candidates, at most ``selected_steps``. None trains so many always."""
    entropy_over: EntropyOver = "revealed"
    entropy_reduce: EntropyReduce = "mean"
    entropy_at: Literal["one", "sampling"] = "one"
    """Temperature of the step entropy."""
    stop_at_eos: bool = True
    """Only steps up to the last one that revealed a non-EOS token are candidates."""
    stepwise: bool = True
    """EGSPO-SA: score the greedy one-step completion of every selected state. False is EGSPO."""
    lam: float = 0.5
    """Lambda, the weight of the stepwise term."""
    lam_schedule: Literal["constant", "late", "halving"] = "constant"
    lam_halving_updates: int = 100
    normalize_returns: bool = True
    returns: Literal["joint", "split"] = "joint"
    baseline: Literal["rank", "group"] = "rank"
    """Mean over the group at the same selection rank, or over all its selected steps. ``group``
    averages in values of later states of the same trajectory: a bias of order 1 / group_size."""
    scale_by_std: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.5
    beta: float = 0.04
    kl: Literal["k3", "exact"] = "k3"
    reference_every: int | None = None
    """RL steps between two refreshes of the reference policy by the policy; null never refreshes:
    the KL then goes to what training began from."""
    reference_blend: float = 1.0
    """Share of the policy in a refresh: 1 copies it; of adapters, factors are blended."""
    aggregation: Literal["sum", "mean", "exact"] = "sum"
    ratio_temperature: Literal["sampling", "one"] = "sampling"
    """Temperature at which log-probabilities are scored; ``one`` is the published code's."""
    schedule: Literal["joint", "per_step"] = "joint"
    """``per_step``: an optimizer step per ``ranks_per_update`` entropy ranks, highest first.
    ``joint``: all together."""
    ranks_per_update: int = 1
    """Of ``per_step``: ranks whose gradients are averaged for an optimizer step. The last step of
    a rollout has those that are left."""
    first_rank: int = 0
    """Of ``per_step``: the rank to begin with, from 0; after the last one comes rank 0. The
    published code begins with 1, so that the step of highest entropy comes last."""
    num_iterations: int = 1
    """Inner epochs over the selected steps of one rollout."""
    detach_cache: bool = False
    """With ``generation.cache``, no gradient through the pass that makes the cache: cheaper and
    biased, as it leaves out how the weights move the cached keys and values."""

    def __post_init__(self) -> None:
        _require(self.group_size >= 2, f"algorithm.group_size must be >= 2, got {self.group_size}")
        for name in ("selected_steps", "num_iterations", "lam_halving_updates"):
            value = getattr(self, name)
            _require(value > 0, f"algorithm.{name} must be > 0, got {value}")
        for name in ("lam", "clip_high", "beta"):
            value = getattr(self, name)
            _require(value >= 0, f"algorithm.{name} must be >= 0, got {value}")
        every, blend = self.reference_every, self.reference_blend
        _require(
            every is None or every > 0,
            f"algorithm.reference_every must be > 0, or null to never refresh, got {every}",
        )
        _require(
            every is None or self.beta > 0,
            f"algorithm.reference_every ({every}) needs algorithm.beta > 0: without it there is no "
            "reference policy",
        )
        _require(0 < blend <= 1, f"algorithm.reference_blend must be in (0, 1], got {blend}")
        _require(
            every is not None or blend == 1,
            f"algorithm.reference_blend ({blend}) needs algorithm.reference_every",
        )
        _require(
            0 <= self.clip_low <= 1, f"algorithm.clip_low must be in [0, 1], got {self.clip_low}"
        )
        self._check_ranks()
        share = self.entropy_share
        _require(
            share is None or 0 < share <= 1,
            f"algorithm.entropy_share must be in (0, 1], or null for a fixed K, got {share}",
        )
        _require(
            share is None or self.strategy == "high_entropy",
            f"algorithm.entropy_share ({share}) is a share of the steps of largest entropy: it "
            f"needs algorithm.strategy: high_entropy, got {self.strategy}",
        )

    def _check_ranks(self) -> None:
        most, first = self.ranks_per_update, self.first_rank
        _require(most > 0, f"algorithm.ranks_per_update must be > 0, got {most}")
        _require(first >= 0, f"algorithm.first_rank must be >= 0, got {first}")

    def update_ranks(self, ranks: int) -> list[list[int]]:
        """Ranks in [0, ``ranks``) by optimizer step, in the order in which they are made."""
        if self.schedule == "joint":
            return [list(range(ranks))]
        order = [(self.first_rank + rank) % ranks for rank in range(ranks)]
        size = self.ranks_per_update
        return [order[begin : begin + size] for begin in range(0, ranks, size)]


@dataclass
class OptimizerConfig:
    """AdamW; the defaults are the published settings."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """All but the first by bitsandbytes: moments in 8 bits, or paged to host memory (GPU only)."""

    learning_rate: float = 3e-5
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    eps: float = 1e-8
    max_grad_norm: float = 0.2
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm", "eps"):
            value = getattr(self, name)
            _require(value > 0, f"{name} must be > 0, got {value}")
        for name in ("weight_decay", "warmup_steps"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} must be >= 0, got {value}")
        _require(
            all(0 <= beta < 1 for beta in self.betas), f"betas must be in [0, 1), got {self.betas}"
        )


@dataclass
class SFTConfig:
    """Masked-diffusion supervised training: the warm start of a new model, or ``egspo sft``."""

    steps: int = 1000
    batch_size: int = 64
    seed: int = 0
    task_options: dict[str, Any] = field(default_factory=dict)
    """Over ``task.options``, for the supervised examples alone: easier ones, for example. Options
    that decide which examples are held out must stay as they are."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=1e-3, betas=(0.9, 0.99), weight_decay=0.01, max_grad_norm=1.0
        )
    )
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            value = getattr(self, name)
            _require(value > 0, f"sft.{name} must be > 0, got {value}")


@dataclass
class EvalConfig:
    """Greedy decoding of held-out prompts."""

    every: int = 10
    """RL steps between evaluations; 0 evaluates at the start and the end only. A group of
    trajectories of the same steps is kept for ``egspo inspect`` and the sample table."""
    examples: int | None = None
    """Held-out prompts; None for all of them."""
    temperature: float = 0.0
    patience: int | None = None
    """Stop after so many evaluations in a row without a better held-out reward; None never does."""

    def __post_init__(self) -> None:
        _require(
            self.patience is None or self.patience > 0,
            f"eval.patience must be > 0, or null to train to the end, got {self.patience}",
        )
        _require(self.every >= 0, f"eval.every must be >= 0, got {self.every}")
        _require(
            self.examples is None or self.examples > 0,
            f"eval.examples must be > 0, or null for all, got {self.examples}",
        )
        _require(self.temperature >= 0, f"eval.temperature must be >= 0, got {self.temperature}")


@dataclass
class CheckpointConfig:
    every: int = 50
    """RL steps between checkpoints; 0 saves at the end only."""
    keep_last: int = 2
    keep_best: bool = True
    """Also save the step of the best held-out reward so far, and keep it."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, f"checkpoint.every must be >= 0, got {self.every}")
        _require(self.keep_last > 0, f"checkpoint.keep_last must be > 0, got {self.keep_last}")


@dataclass
class DistributedConfig:
    """Several processes, started by ``accelerate launch`` or ``torchrun``."""

    engine: EngineName = "auto"
    """``replicated``: the whole model in every process. ``fsdp2``, ``zero2`` and ``zero3`` shard
    what is trained. ``auto`` is what accelerate was configured for, ``replicated`` by default."""
    reshard: bool = True
    """``fsdp2``: free a block's whole weights between its forward and backward pass."""
    offload: bool = False
    """``fsdp2``: keep weights and optimizer state in host memory between passes."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others before the run ends with an error that says who
    is missing and in which phase. Longer than any process may be longer than others: rollout,
    rewards, saving."""

    def __post_init__(self) -> None:
        _require(self.timeout > 0, f"distributed.timeout must be > 0, got {self.timeout}")
        for name, default in (("reshard", True), ("offload", False)):
            value = getattr(self, name)
            _require(
                value == default or self.engine == "fsdp2",
                f"distributed.{name}: {str(value).lower()} needs distributed.engine: fsdp2, got "
                f"{self.engine}",
            )


@dataclass
class TrainConfig:
    """A whole run."""

    model: ModelConfig
    task: TaskConfig = field(default_factory=TaskConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sft: SFTConfig | None = None
    """With it, a new model is first trained on the task's reference completions (cached)."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    protocol: Protocol = "strict"
    """``published``: the settings, prompts and rewards of the paper's code, faults included, filled
    in where the recipe leaves them out; for comparison with its numbers."""
    output_dir: str = "runs/egspo"
    seed: int = 0
    steps: int = 100
    """RL iterations: rollout, select, score, update."""
    pipeline: bool = False
    """Make the rollout of the next step before the update of this one: its rewards are found
    meanwhile, and it is one update old (the metric ``staleness``), except after an evaluation or a
    checkpoint."""
    prompts_per_step: int = 8
    """Over all processes; each is answered ``algorithm.group_size`` times."""
    micro_batch_size: int | None = None
    """States in one forward of replay and update, at most; or else"""
    micro_batch_tokens: int | None = None
    """columns that it computes, at most, so that short prompts pack more states. With neither,
    ``micro_batch_size`` is 32. Where memory runs out, both are halved for the rest of the run."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """``auto``: bf16 autocast where there is a GPU that has it."""
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Get the metrics, and the sample table of the steps with an evaluation."""
    max_empty_steps: int | None = 20
    """End with an error after so many steps in a row that had nothing to update on, as no reward
    applied or every group was skipped; null goes on."""
    allow_changed_data: bool = False
    """``--resume`` goes on with other training or held-out examples than those of the run."""

    def __post_init__(self) -> None:
        for name in (
            *("steps", "prompts_per_step", "micro_batch_size", "micro_batch_tokens"),
            "max_empty_steps",
        ):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be > 0, got {value}")
        _require(
            not self.pipeline or self.algorithm.stepwise,
            "pipeline: true has the one-step completions scored during an update: it needs "
            "algorithm.stepwise: true",
        )
        for name, every in (
            ("eval.every", self.eval.every),
            ("checkpoint.every", self.checkpoint.every),
            ("algorithm.reference_every", self.algorithm.reference_every),
        ):
            _require(
                not self.pipeline or every != 1,
                f"pipeline: true never gets ahead with {name}: 1, as no rollout is made before "
                "an evaluation, a checkpoint or a refresh of the reference",
            )
        size, tokens = self.micro_batch_size, self.micro_batch_tokens
        _require(
            size is None or tokens is None,
            f"micro_batch_size ({size}) and micro_batch_tokens ({tokens}) are two ways to say the "
            "same: set one of them to null",
        )
        if size is None and tokens is None:
            self.micro_batch_size = 32
        _require(
            self.algorithm.selected_steps <= self.generation.steps,
            f"algorithm.selected_steps ({self.algorithm.selected_steps}) must be at most "
            f"generation.steps ({self.generation.steps})",
        )
        if self.distributed.engine not in ("auto", "replicated"):
            self.check_shardable(self.distributed.engine)
        cache = self.generation.cache
        _require(
            self.algorithm.entropy_over != "masked" or cache != "dual",
            "algorithm.entropy_over: masked needs the hidden states of later blocks, which the "
            "steps of generation.cache: dual do not compute",
        )
        _require(
            self.model.quantization == "none"
            or self.model.path is not None
            or self.sft is not None,
            f"model.quantization: {self.model.quantization} needs trained weights: model.path, or "
            "an sft section",
        )
        _require(
            not self.algorithm.detach_cache or cache != "none",
            "algorithm.detach_cache needs a generation.cache",
        )
        _require(
            self.generation.temperature > 0,
            "generation.temperature must be > 0 for training: greedy rollouts have no gradient",
        )

    def check_shardable(self, engine: str) -> None:
        """Raises ValueError naming the option that a model sharded by ``engine`` excludes."""
        quantization, optimizer = self.model.quantization, self.optimizer.name
        _require(
            quantization == "none",
            f"model.quantization: {quantization} does not go with {engine}, which cannot divide "
            "packed weights: use distributed.engine: replicated",
        )
        _require(
            optimizer == "adamw",
            f"optimizer.name: {optimizer} does not go with {engine}: use adamw",
        )
        _require(
            engine != "zero3" or self.algorithm.reference_every is None,
            "algorithm.reference_every does not go with zero3, whose weights cannot be copied part "
            "by part: use fsdp2",
        )
        _require(
            not self.generation.cuda_graphs,
            f"generation.cuda_graphs does not go with {engine}: a graph reads the weights where "
            "they were, and gathering puts them elsewhere",
        )

    @property
    def ranks(self) -> int:
        """Columns of the selection: denoising steps trained per trajectory, at most."""
        everything = self.algorithm.strategy == "all"
        return self.generation.steps if everything else self.algorithm.selected_steps

    def evaluates_at(self, step: int) -> bool:
        """Whether the RL step ``step``, from 1, is followed by an evaluation."""
        return step == self.steps or bool(self.eval.every and step % self.eval.every == 0)

    def saves_at(self, step: int) -> bool:
        """Whether the RL step ``step`` is followed by a checkpoint, however good it is."""
        return bool(self.checkpoint.every and step % self.checkpoint.every == 0)

    def runs_ahead_at(self, step: int) -> bool:
        """Whether the rollout after the RL step ``step`` is made before the step's update."""
        every = self.algorithm.reference_every
        # What is made ahead is scored by a reference that must still be the one of its update.
        refreshes = every is not None and step % every == 0
        return self.pipeline and not (self.evaluates_at(step) or self.saves_at(step) or refreshes)


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Entropy-selected steps, one advantage per trajectory.
    "egspo": {"algorithm": {"strategy": "high_entropy", "stepwise": False}},
    # The default: entropy-selected steps, stepwise advantages.
    "egspo-sa": {"algorithm": {"strategy": "high_entropy", "stepwise": True}},
    # Ablations: EGSPO on steps chosen without looking at the entropy.
    "uniform": {"algorithm": {"strategy": "uniform", "stepwise": False}},
    "random": {"algorithm": {"strategy": "random", "stepwise": False}},
    # The authors' public code, including what `egspo-sa` does otherwise.
    "reference": {
        "algorithm": {
            "strategy": "high_entropy",
            "stepwise": True,
            "entropy_over": "revealed",
            "baseline": "rank",
            "aggregation": "sum",
            "ratio_temperature": "one",
            "schedule": "per_step",
            "ranks_per_update": 2,
            "first_rank": 1,
            "stop_at_eos": False,
        },
        "generation": {"policy": "low_confidence", "early_exit": False},
    },
}
