"""EGSPO and EGSPO-SA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from egspo.config.options.checks import require

Strategy = Literal[
    "high_entropy",
    "uniform",
    "random",
    "all",
    "sign_aware",
    "uniform_reference",
    "random_reference",
]


EntropyOver = Literal["revealed", "block", "masked"]


EntropyReduce = Literal["mean", "sum"]


SharePrompts = Literal["auto", "always", "never"]


Preset = Literal[
    "egspo",
    "egspo-sa",
    "reference",
    "uniform",
    "random",
    "d1",
    "wd1",
    "coupled-grpo",
    "espo",
    "spg",
    "just-grpo",
]


@dataclass
class AlgorithmConfig:
    """Step selection, advantages and loss. A preset fills what the recipe leaves out."""

    preset: Preset | None = None
    """Fills in several options at once, where the recipe leaves them out."""
    objective: str = "stepwise"
    """What is scored, and how an advantage meets a likelihood: ``stepwise`` (EGSPO, EGSPO-SA), or
    on completions that are masked again ``mean_field``, ``weighted``, ``coupled``,
    ``sequence_elbo`` or ``sandwich`` (docs/methods.md); a class of your own by
    ``package.module:Class``."""
    group_size: int = 8
    """Completions of each prompt, compared with each other."""
    selected_steps: int = 8
    """K, denoising steps trained per trajectory."""
    strategy: Strategy = "high_entropy"
    """Which steps are trained: those of largest entropy, evenly spaced ones, random ones, or
    all; or by the sign of ``R_i - mean_j R_j`` (``sign_aware``): the least confident steps where it
    is positive or zero, the most confident ones where it is negative."""
    entropy_share: float | None = None
    """Adaptive K, with ``high_entropy``: of each trajectory the fewest steps that hold this share
    of the entropy of its candidates, at most ``selected_steps``. None trains so many always."""
    entropy_over: EntropyOver = "revealed"
    """Positions that a step's entropy is over: those it revealed, all masked ones of the block,
    or all masked ones."""
    entropy_reduce: EntropyReduce = "mean"
    """Over those positions."""
    entropy_at: Literal["one", "sampling"] = "one"
    """Temperature of the step entropy."""
    stop_at_eos: bool = False
    """Only steps up to the last one that revealed a non-EOS token are candidates: what decides
    where a completion ends is then left out, which biases the gradient."""
    stepwise: bool = True
    """EGSPO-SA: score the greedy one-step completion of every selected state. False is EGSPO."""
    one_step: Literal["auto", "rollout", "replay"] = "auto"
    """Where one-step completions come from: the passes of the ``rollout``, with the head at every
    masked position of every step; or the ``replay`` of the selected states. ``auto`` counts both
    and takes the cheaper."""
    step_values: Literal["completions", "head"] = "completions"
    """V of a state in EGSPO-SA: the reward of its one-step completion, or what a linear head on the
    rollout's hidden states predicts of the final reward (``head``). The head is trained beside the
    policy, and takes neither passes nor rewards of its own."""
    value_learning_rate: float = 1e-2
    """Of Adam on the value head."""
    lam: float = 0.5
    """Lambda, the weight of the stepwise term."""
    lam_schedule: Literal["constant", "late", "halving"] = "constant"
    """``late`` grows from 0 at the first denoising step to ``lam`` at the last, ``halving``
    halves it every ``lam_halving_updates``."""
    lam_halving_updates: int = 100
    """RL steps."""
    normalize_returns: bool = True
    """Divide the stepwise return by ``1 + lam``."""
    returns: Literal["joint", "split"] = "joint"
    """The baseline is subtracted from the whole stepwise return, or (``split``) from the final
    reward alone."""
    baseline: Literal["group", "rank"] = "group"
    """Mean over the whole group, of the own completion only the return itself; or over the group at
    the same selection rank, as the published code does: biased, since the rank of a state depends
    on what its action led to."""
    scale_by_std: bool = False
    """Divide advantages by the group's standard deviation, as GRPO does."""
    clip_low: float = 0.2
    """The probability ratio is clipped to at least ``1 - clip_low``"""
    clip_high: float = 0.5
    """and at most ``1 + clip_high``."""
    beta: float = 0.04
    """Weight of the KL to the reference policy; 0 loads and computes none."""
    kl: Literal["k3", "exact", "k2"] = "k3"
    """An estimate from the log-ratio, or the sum over the vocabulary; ``k2`` (half the square of
    the log-ratio) is that of ``sequence_elbo``."""
    reference_every: int | None = None
    """RL steps between two refreshes of the reference policy by the policy; null never refreshes:
    the KL then goes to what training began from."""
    reference_blend: float = 1.0
    """Share of the policy in a refresh: 1 copies it; of adapters, factors are blended."""
    aggregation: Literal["exact", "sum", "mean"] = "exact"
    """``exact``: the log-ratio is summed over a step's tokens, and the loss divided by the tokens
    of a step in the schedule (``max_new_tokens / steps``), one number for all steps: unbiased
    where they differ in size; ``sum``: divided by the step's own number of tokens (the published
    code); ``mean``: mean log-ratio."""
    ratio_temperature: Literal["sampling", "one"] = "sampling"
    """Temperature at which log-probabilities are scored; ``one`` is the published code's."""
    schedule: Literal["joint", "per_step"] = "joint"
    """``per_step``: an optimizer step per ``ranks_per_update`` entropy ranks, highest first.
    ``joint``: all together."""
    ranks_per_update: int = 1
    """Of ``per_step``: ranks whose gradients are averaged for an optimizer step. Those that the
    last step of a rollout lacks count as zeros."""
    first_rank: int = 0
    """Of ``per_step``: the rank to begin with, from 0; after the last one comes rank 0. The
    published code begins with 1, so that the step of highest entropy comes last."""
    num_iterations: int = 1
    """Inner epochs over the selected steps of one rollout; or optimizer steps, each with masks of
    its own, where completions are masked again."""
    prompt_masking: float = 0.15
    """Of ``mean_field``, ``weighted`` and ``sandwich``: probability that a prompt token is masked
    (with ``sandwich``, also one of an earlier block)."""
    mask_samples: int = 2
    """Of ``sequence_elbo``: complementary pairs of masks for each completion and optimizer step; of
    ``sandwich``: masks."""
    weight_scale: float = 1.0
    """Psi of ``weighted``: weights are a softmax of plus and minus psi times the advantage."""
    bound_power: float = 1.5
    """Beta of the upper bound of ``sandwich``, at least 1."""
    bound_share: float = 0.5
    """Omega of ``sandwich``, share of the upper bound in what stands for the likelihood where the
    advantage is negative; the rest is the lower bound."""
    completion_blocks: Literal["all", "active"] = "all"
    """Of block-causal models: a one-step completion fills every later block too, greedily in one
    step behind what is then known, or ends with the ``active`` block of the state: cheaper."""
    share_prompts: SharePrompts = "auto"
    """Of block-causal models: a pass of replay or update computes the whole blocks of a prompt once
    for all trajectories in it that answer it. ``auto``: where that spares a fifth of the columns,
    and not with a sharded engine, whose processes must make as many passes; ``always``: also there,
    and where it spares nothing."""
    replay_experts: bool = False
    """Of block-causal models with experts: replay and update take the experts that the rollout
    chose; the reference policy and one-step completions choose their own."""
    detach_cache: bool = False
    """With ``generation.cache``, no gradient through the pass that makes the cache: cheaper and
    biased, as it leaves out how the weights move the cached keys and values."""

    def __post_init__(self) -> None:
        require(self.group_size >= 2, f"algorithm.group_size must be >= 2, got {self.group_size}")
        for name in (
            *("selected_steps", "num_iterations", "lam_halving_updates"),
            *("ranks_per_update", "mask_samples"),
        ):
            value = getattr(self, name)
            require(value > 0, f"algorithm.{name} must be > 0, got {value}")
        for name in ("lam", "clip_high", "beta", "first_rank", "weight_scale"):
            value = getattr(self, name)
            require(value >= 0, f"algorithm.{name} must be >= 0, got {value}")
        every, blend = self.reference_every, self.reference_blend
        require(
            every is None or every > 0,
            f"algorithm.reference_every must be > 0, or null to never refresh, got {every}",
        )
        require(
            every is None or self.beta > 0,
            f"algorithm.reference_every ({every}) needs algorithm.beta > 0: without it there is no "
            "reference policy",
        )
        require(0 < blend <= 1, f"algorithm.reference_blend must be in (0, 1], got {blend}")
        require(
            every is not None or blend == 1,
            f"algorithm.reference_blend ({blend}) needs algorithm.reference_every",
        )
        require(
            0 <= self.clip_low <= 1, f"algorithm.clip_low must be in [0, 1], got {self.clip_low}"
        )
        for name in ("prompt_masking", "bound_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"algorithm.{name} must be in [0, 1], got {value}")
        power = self.bound_power
        require(power >= 1, f"algorithm.bound_power must be >= 1, got {power}")
        share = self.entropy_share
        require(
            share is None or 0 < share <= 1,
            f"algorithm.entropy_share must be in (0, 1], or null for a fixed K, got {share}",
        )
        require(
            share is None or self.strategy == "high_entropy",
            f"algorithm.entropy_share ({share}) is a share of the steps of largest entropy: it "
            f"needs algorithm.strategy: high_entropy, got {self.strategy}",
        )

        self._check_values()

    def _check_values(self) -> None:
        rate = self.value_learning_rate
        require(rate > 0, f"algorithm.value_learning_rate must be > 0, got {rate}")
        defaults = type(self).__dataclass_fields__
        if self.step_values == "head":
            require(
                self.stepwise,
                "algorithm.step_values: head predicts what the stepwise term compares rewards "
                "with: it needs algorithm.stepwise: true",
            )
            for option in ("one_step", "completion_blocks"):
                value = getattr(self, option)
                require(
                    value == defaults[option].default,
                    f"algorithm.{option} ({value}) is about one-step completions, which "
                    "algorithm.step_values: head does not make",
                )
        require(
            self.step_values == "head" or rate == defaults["value_learning_rate"].default,
            f"algorithm.value_learning_rate ({rate}) is of algorithm.step_values: head",
        )

    @property
    def completes(self) -> bool:
        """Whether one-step completions are made and scored."""
        return self.stepwise and self.step_values == "completions"

    @property
    def predicts(self) -> bool:
        """Whether a value head stands in for them."""
        return self.stepwise and self.step_values == "head"

    def sharing(self, *, sharded: bool) -> SharePrompts:
        """``share_prompts`` of a run whose passes are collective, or not."""
        return "never" if sharded and self.share_prompts == "auto" else self.share_prompts

    def update_ranks(self, ranks: int) -> list[list[int]]:
        """Ranks in [0, ``ranks``) by optimizer step, in the order in which they are made."""
        if self.schedule == "joint":
            return [list(range(ranks))]
        order = [(self.first_rank + rank) % ranks for rank in range(ranks)]
        size = self.ranks_per_update
        return [order[begin : begin + size] for begin in range(0, ranks, size)]
