"""One-step mean-field GRPO, as d1's diffu-GRPO (arXiv 2504.12216): what EGSPO is compared with.

The likelihood of a completion is replaced by a product over its tokens, each with the probability
that *one* forward pass gives it on a canvas whose completion is masked as a whole and whose prompt
tokens are masked with probability 0.15. Every inner update draws its own prompt masks; the old
log-probabilities of an update are those of the policy before the first update under the same
masks. With ``r = exp(log p - log p_old)`` of a token and ``A_i = R_i - mean_j R_j`` of its
completion, the loss is

    - sum_i sum_k min(r_ik A_i, clip(r_ik, 1 - clip_low, 1 + clip_high) A_i) / (tokens of the step)

over the tokens up to and including the first EOS. Log-probabilities are at temperature 1 over the
whole vocabulary. ``algorithm.num_iterations`` is d1's mu.

Rollout, rewards, optimizer, evaluation and the counting of FLOPs are egspo's. Two things of d1 are
not here: the KL to a reference policy, and its sampling order (the rollout is the recipe's).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from egspo.algorithm.advantages import egspo_advantages, groups_with_spread
from egspo.algorithm.batch import Groups, Metrics
from egspo.algorithm.iteration import Iteration
from egspo.algorithm.phases.rewards import collect_rewards
from egspo.algorithm.phases.rollout import rollout_metrics
from egspo.algorithm.pipeline import Pipeline
from egspo.config import TrainConfig
from egspo.engines import Engine
from egspo.engines.processes import Processes
from egspo.engines.reduction import Count, part
from egspo.rewards.queue import RewardQueue
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.trajectory import PromptBatch, Trajectory
from egspo.rollouts.work import peak_memory
from egspo.tasks.prompts import Data
from egspo.training.trainer import Trainer
from egspo_kernels import counter_uniform

PROMPT_MASKED = 0.15
"""Probability that a prompt token is masked in an update."""

# Keeps the noise of the prompt masks apart from the rollout's.
_MASK_STREAM = 0x6431


def prompt_masks(prompts: PromptBatch, seed: int, update: int, sequence_ids: Tensor) -> Tensor:
    """bool [B, P]: the prompt tokens that inner update ``update`` masks, padding never.

    A function of (seed, update, sequence) alone.
    """
    noise = counter_uniform(seed ^ _MASK_STREAM, update, sequence_ids, prompts.ids.shape[1])
    return (noise < PROMPT_MASKED) & prompts.mask


def token_log_probs(
    denoiser: Denoiser, prompts: PromptBatch, masked: Tensor, tokens: Tensor
) -> Tensor:
    """float32 [B, L]: log-probability of every completion token by itself, from one pass.

    Args:
        denoiser: the policy; its work is counted.
        prompts: of B completions.
        masked: bool [B, P], prompt tokens that the policy does not see.
        tokens: int64 [B, L], the completions, which it does not see either.
    """
    length = tokens.shape[1]
    ids = prompts.ids.masked_fill(masked, denoiser.mask_id)
    canvas = torch.nn.functional.pad(ids, (0, length), value=denoiser.mask_id)
    attention = torch.nn.functional.pad(prompts.mask, (0, length), value=True)
    with denoiser.autocast():
        hidden = denoiser.hidden_states(canvas, None if bool(attention.all()) else attention)
        logits = denoiser.logits(hidden[:, -length:].flatten(0, 1)).float()
    log_probs = logits.log_softmax(1).gather(1, tokens.flatten()[:, None])
    return log_probs.view(tokens.shape)


def counted_tokens(tokens: Tensor, eos_id: int) -> Tensor:
    """bool [B, L]: tokens up to and including the first EOS."""
    before = (tokens == eos_id).int().cumsum(1) - (tokens == eos_id).int()
    return before == 0


class MeanFieldIteration(Iteration):
    """The algorithm above in the place of EGSPO's: :class:`egspo.algorithm.iteration.Iteration`.

    Raises:
        ValueError: ``config`` asks for what it does not have.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        denoiser: Denoiser,
        engine: Engine,
        processes: Processes,
    ) -> None:
        if processes.count > 1:
            raise ValueError(f"one-step GRPO runs on one process, got {processes.count}")
        for name, value, expected in (
            ("algorithm.beta", config.algorithm.beta, 0.0),
            ("algorithm.scale_by_std", config.algorithm.scale_by_std, False),
            ("algorithm.stepwise", config.algorithm.stepwise, False),
            ("generation.cache", config.generation.cache, "none"),
            ("generation.guidance", config.generation.guidance, 0.0),
        ):
            if value != expected:
                raise ValueError(f"one-step GRPO needs {name}={expected!r}, got {value!r}")
        if config.micro_batch_size is None:
            raise ValueError("one-step GRPO needs micro_batch_size, got micro_batch_tokens")
        super().__init__(config, data, denoiser, engine, processes)

    def run(self, step: int, prompt_index: list[int], first_sequence: int) -> Metrics:
        """Rollout, score and update on the prompts given; as the method it overrides."""
        self.updated = False
        metrics: Metrics = {}
        trajectory, rewards = self._sampled(step, prompt_index, first_sequence, metrics)
        size = self.config.algorithm.group_size
        ids = torch.arange(first_sequence, first_sequence + len(trajectory))
        ids = ids.to(self.denoiser.device)
        kept = groups_with_spread(rewards).nonzero()[:, 0]
        metrics["skipped/groups"] = len(prompt_index) - len(kept)
        rows = (kept[:, None] * size + torch.arange(size)).flatten()
        valid = torch.ones(*rewards.shape, 1, dtype=torch.bool)
        advantage = egspo_advantages(rewards, valid).flatten()[rows].to(ids.device)
        rows = rows.to(ids.device)
        # A group that is skipped counts as a zero: the gradient does not depend on what is skipped.
        tokens = int(counted_tokens(trajectory.tokens, self.denoiser.eos_id).sum())
        trajectory, ids = trajectory.take(rows), ids[rows]
        masks = [
            prompt_masks(trajectory.prompts, self.config.seed, update, ids)
            for update in range(self.config.algorithm.num_iterations)
        ]
        with self.phase(metrics, step, "score"), torch.no_grad():
            old = [self._log_probs(trajectory, masked) for masked in masks]
        with self.phase(metrics, step, "update"):
            head_rows = self.denoiser.work.head_rows
            metrics.update(self._updates(trajectory, masks, old, advantage, tokens))
            head_rows = self.denoiser.work.head_rows - head_rows
        if self.phase.cost is not None:  # logits are kept for the backward pass, not made again
            again = self.phase.cost.per_head_row * head_rows
            metrics["flops/update"] = Count(metrics["flops/update"].value - again)
        metrics["memory/peak"] = peak_memory(self.denoiser.device)
        return metrics

    def _sampled(
        self, step: int, prompt_index: list[int], first_sequence: int, metrics: Metrics
    ) -> tuple[Trajectory, Tensor]:
        """Trajectories, and their rewards float64 [P, G]."""
        size = self.config.algorithm.group_size
        groups = Groups.shared(prompt_index, size, first_sequence, self.processes)
        with RewardQueue(self.rewards.score, self.data.task.rewards) as queue:
            with self.phase(metrics, step, "rollout"):
                trajectory = self.rollout(groups, queue)
            with self.phase(metrics, step, "reward"):
                samples, found = collect_rewards(
                    *(step, groups, trajectory, queue, self.rewards, self.processes),
                    keep_known=False,
                )
        metrics.update(rollout_metrics(trajectory, metrics["time/rollout"]), **found)
        return trajectory, samples.rewards

    def _parts(self, count: int) -> list[slice]:
        size = self.config.micro_batch_size
        assert size is not None
        return [slice(first, first + size) for first in range(0, count, size)]

    def _log_probs(self, trajectory: Trajectory, masked: Tensor) -> Tensor:
        """float32 [B, L] of all trajectories."""
        parts = [
            token_log_probs(
                self.denoiser,
                PromptBatch(trajectory.prompts.ids[rows], trajectory.prompts.mask[rows]),
                masked[rows],
                trajectory.tokens[rows],
            )
            for rows in self._parts(len(trajectory))
        ]
        return torch.cat(parts) if parts else trajectory.confidence.new_empty(0)

    def _updates(
        self,
        trajectory: Trajectory,
        masks: list[Tensor],
        old: list[Tensor],
        advantage: Tensor,
        tokens: int,
    ) -> Metrics:
        """An optimizer step for each of the masks."""
        counted = counted_tokens(trajectory.tokens, self.denoiser.eos_id)
        ratios: list[Tensor] = []
        losses: list[float] = []
        norms: list[float] = []
        for masked, old_log_probs in zip(masks, old, strict=True):
            loss, ratio = self._backward_all(
                trajectory, masked, old_log_probs, advantage, counted, tokens
            )
            if not self.engine.reduce_gradients(bool(len(trajectory))):
                continue
            norms.append(self.engine.clip(self.config.optimizer.max_grad_norm))
            self.updated = True
            self.engine.step()
            losses.append(loss)
            ratios.append(ratio)
        nothing = torch.empty(0)
        every, first = torch.cat(ratios or [nothing]), torch.cat(ratios[:1] or [nothing])
        return {
            "updates": len(norms),
            "loss": part(torch.tensor(losses)),
            "ratio/mean": part(every),
            "ratio/max": part(every, "max"),
            "ratio/drift": part((first - 1).abs(), "max"),
            "clip/low": part(every < 1 - self.config.algorithm.clip_low),
            "clip/high": part(every > 1 + self.config.algorithm.clip_high),
            "grad_norm": sum(norms) / len(norms) if norms else None,
        }

    def _backward_all(
        self,
        trajectory: Trajectory,
        masked: Tensor,
        old: Tensor,
        advantage: Tensor,
        counted: Tensor,
        tokens: int,
    ) -> tuple[float, Tensor]:
        """Add up the gradient over micro-batches; the loss, and the counted tokens' ratios."""
        loss, ratios = 0.0, []
        for rows in self._parts(len(trajectory)):
            prompts = PromptBatch(trajectory.prompts.ids[rows], trajectory.prompts.mask[rows])
            log_probs = token_log_probs(
                self.denoiser, prompts, masked[rows], trajectory.tokens[rows]
            )
            ratio = (log_probs - old[rows]).exp()
            value = surrogate_loss(ratio, advantage[rows], counted[rows], self.config) / tokens
            value.backward()  # type: ignore[no-untyped-call]
            loss += float(value.detach())
            ratios.append(ratio.detach()[counted[rows]])
        return loss, torch.cat(ratios or [torch.empty(0)])


def surrogate_loss(
    ratio: Tensor, advantage: Tensor, counted: Tensor, config: TrainConfig
) -> Tensor:
    """The clipped surrogate, summed over the counted tokens.

    Args:
        ratio: float [B, L].
        advantage: float [B], of the completions.
        counted: bool [B, L].
        config: ``algorithm.clip_low`` and ``algorithm.clip_high``.
    """
    gain = advantage[:, None].to(ratio.dtype)
    clipped = ratio.clamp(1 - config.algorithm.clip_low, 1 + config.algorithm.clip_high)
    return -torch.minimum(ratio * gain, clipped * gain)[counted].sum()


class MeanFieldTrainer(Trainer):
    """A training run with :class:`MeanFieldIteration`."""

    def __init__(self, config: TrainConfig, *, resume: Path | None = None) -> None:
        super().__init__(config, resume=resume)
        if config.pipeline:
            raise ValueError("one-step GRPO needs pipeline=false, got true")
        self.iteration = MeanFieldIteration(
            config, self.data, self.denoiser, self.engine, self.processes
        )
        self.pipeline = _InTurn(config, self.iteration, self._work)


class _InTurn(Pipeline):
    """Of an iteration that is not made in two halves."""

    def step(self, step: int) -> Metrics:
        return self.iteration.run(step, *self.work(step))
