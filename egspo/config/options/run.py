"""A whole run: every section, and what they ask of each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from egspo.config.options.algorithm import AlgorithmConfig
from egspo.config.options.checkpoint import CheckpointConfig
from egspo.config.options.checks import require
from egspo.config.options.distributed import DistributedConfig
from egspo.config.options.evaluation import EvalConfig
from egspo.config.options.generation import GenerationConfig
from egspo.config.options.model import ModelConfig
from egspo.config.options.objectives import check_objective
from egspo.config.options.optimizer import OptimizerConfig
from egspo.config.options.sft import SFTConfig
from egspo.config.options.task import TaskConfig

Protocol = Literal["strict", "published"]


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
    """Folder of the run: metrics, checkpoints, samples and the final model."""
    seed: int = 0
    """Of prompts, noise and a new model's weights; a run is a function of it."""
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
        check_objective(self.algorithm, self.generation)
        require(self.output_dir.strip() != "", "output_dir must name a folder, got an empty one")
        for name in (
            *("steps", "prompts_per_step", "micro_batch_size", "micro_batch_tokens"),
            "max_empty_steps",
        ):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be > 0, got {value}")
        require(
            not self.pipeline or self.algorithm.completes,
            "pipeline: true has the one-step completions scored during an update: it needs "
            "algorithm.stepwise: true and algorithm.step_values: completions",
        )
        for name, every in (
            ("eval.every", self.eval.every),
            ("checkpoint.every", self.checkpoint.every),
            ("algorithm.reference_every", self.algorithm.reference_every),
        ):
            require(
                not self.pipeline or every != 1,
                f"pipeline: true never gets ahead with {name}: 1, as no rollout is made before "
                "an evaluation, a checkpoint or a refresh of the reference",
            )
        size, tokens = self.micro_batch_size, self.micro_batch_tokens
        require(
            size is None or tokens is None,
            f"micro_batch_size ({size}) and micro_batch_tokens ({tokens}) are two ways to say the "
            "same: set one of them to null",
        )
        if size is None and tokens is None:
            self.micro_batch_size = 32
        require(
            self.algorithm.selected_steps <= self.generation.steps,
            f"algorithm.selected_steps ({self.algorithm.selected_steps}) must be at most "
            f"generation.steps ({self.generation.steps})",
        )
        if self.distributed.engine not in ("auto", "replicated"):
            self.check_shardable(self.distributed.engine)
        cache = self.generation.cache
        require(
            self.algorithm.entropy_over != "masked" or cache != "dual",
            "algorithm.entropy_over: masked needs the hidden states of later blocks, which the "
            "steps of generation.cache: dual do not compute",
        )
        require(
            self.model.quantization == "none"
            or self.model.path is not None
            or self.sft is not None,
            f"model.quantization: {self.model.quantization} needs trained weights: model.path, or "
            "an sft section",
        )
        require(
            not (self.algorithm.replay_experts and self.generation.cuda_graphs),
            "algorithm.replay_experts needs generation.cuda_graphs: false, as a graph does not say "
            "which experts it took",
        )
        require(
            not self.algorithm.detach_cache or cache != "none",
            "algorithm.detach_cache needs a generation.cache",
        )
        require(
            self.generation.temperature > 0,
            "generation.temperature must be > 0 for training: greedy rollouts have no gradient",
        )

    def check_shardable(self, engine: str) -> None:
        """Raises ValueError naming the option that a model sharded by ``engine`` excludes."""
        quantization, optimizer = self.model.quantization, self.optimizer.name
        require(
            quantization == "none",
            f"model.quantization: {quantization} does not go with {engine}, which cannot divide "
            "packed weights: use distributed.engine: replicated",
        )
        require(
            optimizer == "adamw",
            f"optimizer.name: {optimizer} does not go with {engine}: use adamw",
        )
        require(
            engine != "zero3" or self.algorithm.reference_every is None,
            "algorithm.reference_every does not go with zero3, whose weights cannot be copied part "
            "by part: use fsdp2",
        )
        require(
            not self.generation.cuda_graphs,
            f"generation.cuda_graphs does not go with {engine}: a graph reads the weights where "
            "they were, and gathering puts them elsewhere",
        )

    @property
    def continues_from_reference(self) -> bool:
        """Whether the KL goes to the adapter that training began from, and not to the base."""
        return self.model.adapter is not None and self.algorithm.beta > 0

    @property
    def replays(self) -> bool:
        """Whether old log-probabilities must be known before the update: it changes the weights
        more than once, or they have changed since the rollout."""
        algorithm = self.algorithm
        once = algorithm.schedule == "joint" and algorithm.num_iterations == 1
        return self.pipeline or not once

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
