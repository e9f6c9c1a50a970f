"""One iteration of EGSPO: prompts -> trajectories -> selected steps -> scored states -> update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from egspo.advantages import (
    egspo_advantages,
    egspo_sa_advantages,
    groups_with_spread,
    lambda_at,
)
from egspo.build import Data
from egspo.config import TrainConfig
from egspo.denoiser import Denoiser
from egspo.optimization import NonFiniteError, apply_gradients, clip_gradients
from egspo.rewards import ScoredRewards, score_completions
from egspo.rollout import rollout
from egspo.scoring import Scorer, Scores, States
from egspo.selection import candidate_limits, histogram, select
from egspo.tasks import Reward
from egspo.tokenization import decode_completions
from egspo.trajectory import PromptBatch, Trajectory
from egspo_kernels import Surrogate

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """P groups of G trajectories and their rewards; trajectory ``b`` is of prompt ``b // G``."""

    prompt_index: list[int]
    """Place of each of the P prompts in the training set."""
    trajectory: Trajectory
    rewards: Tensor
    """float64 [P, G], NaN where a sample was skipped."""
    step_rewards: Tensor
    """float64 [P, G], by those reward functions only that also score one-step completions."""


class Iteration:
    """The algorithm on one process; ``reduce_gradients`` averages gradients over processes.

    It is called once before every optimizer step and says whether any process has a gradient.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        denoiser: Denoiser,
        optimizer: torch.optim.Optimizer,
        reduce_gradients: Callable[[bool], bool],
    ) -> None:
        self.config, self.data, self.denoiser = config, data, denoiser
        self.optimizer, self.reduce_gradients = optimizer, reduce_gradients
        self.scorer = Scorer(denoiser, config.algorithm, config.generation.temperature)
        self.updated = False
        """Whether the weights changed since the iteration began."""

    def run(self, step: int, prompt_index: list[int], first_sequence: int) -> Metrics:
        """Rollout, select, score and update on the prompts given; returns what to log.

        Args:
            step: training step, from 1.
            prompt_index: places in the training set, one per group.
            first_sequence: id of the first sequence; ids are never repeated in a run.
        """
        self.updated = False
        metrics: Metrics = {}
        with _timed(metrics, "rollout"):
            ids = first_sequence + torch.arange(len(prompt_index) * self._group_size)
            ids = ids.to(self.denoiser.device)
            trajectory = self._rollout(prompt_index, ids)
        with _timed(metrics, "reward"):
            samples = self._reward(prompt_index, trajectory, metrics)
        with _timed(metrics, "select"):
            states, kept = self._select(samples, ids, metrics)
        with _timed(metrics, "score"):
            by_rank = self.config.algorithm.schedule == "per_step"
            groups = states.micro_batches(
                self.config.micro_batch_size, ranks=self._ranks if by_rank else None
            )
            scores = self.scorer.replay(
                states, groups, complete=self.config.algorithm.stepwise and len(states) > 0
            )
            advantage = self._advantages(step, samples, kept, states, scores, metrics)
        with _timed(metrics, "update"):
            sequences = len(trajectory)
            metrics.update(self._update(step, states, groups, scores, advantage, sequences))
        tokens = trajectory.tokens.numel()
        metrics["speed/tokens_per_second"] = tokens / max(metrics["time/rollout"], 1e-9)
        return metrics

    @property
    def _group_size(self) -> int:
        return self.config.algorithm.group_size

    @property
    def _ranks(self) -> int:
        """Columns of the selection."""
        everything = self.config.algorithm.strategy == "all"
        return self.config.generation.steps if everything else self.config.algorithm.selected_steps

    def _rollout(self, prompt_index: list[int], sequence_ids: Tensor) -> Trajectory:
        algorithm, generation = self.config.algorithm, self.config.generation
        token_ids = [self.data.train.token_ids[i] for i in prompt_index]
        repeated = [ids for ids in token_ids for _ in range(self._group_size)]
        return rollout(
            self.denoiser,
            PromptBatch.from_lists(repeated, self.denoiser.pad_id, self.denoiser.device),
            generation,
            seed=self.config.seed,
            sequence_ids=sequence_ids,
            entropy_over=algorithm.entropy_over,
            entropy_reduce=algorithm.entropy_reduce,
            entropy_temperature=1.0 if algorithm.entropy_at == "one" else generation.temperature,
        )

    def _score(self, tokens: Tensor, prompts: Sequence[int]) -> ScoredRewards:
        """Rewards of completions [N, L], each an answer to the training prompt ``prompts[n]``."""
        texts = decode_completions(self.data.tokenizer, tokens.tolist(), self.denoiser.eos_id)
        return score_completions(
            self.data.task.rewards,
            [self.data.train.examples[i].prompt for i in prompts],
            texts,
            self.data.train.columns(prompts),
            on_error=self.config.task.on_reward_error,
        )

    def _reward(self, prompt_index: list[int], trajectory: Trajectory, metrics: Metrics) -> Samples:
        prompts = [i for i in prompt_index for _ in range(self._group_size)]
        scored = self._score(trajectory.tokens, prompts)
        shape = (len(prompt_index), self._group_size)
        rewards = scored.total.view(shape)
        metrics["reward/mean"] = _mean(rewards)
        spread = _mean((rewards - rewards.nanmean(1, keepdim=True)).square())
        metrics["reward/std"] = None if spread is None else spread**0.5
        for name, values in scored.per_function.items():
            metrics[f"reward/{name}"] = _mean(values)
        if self.data.task.solved is not None:
            metrics["solved"] = self._solved(trajectory, prompts)
        metrics["skipped/rewards"] = scored.skipped
        metrics["entropy/mean"] = float(trajectory.entropy.mean())
        metrics["length/mean"] = float(trajectory.lengths.double().mean())
        step_rewards = intermediate_total(scored, self.data.task.rewards).view(shape)
        return Samples(prompt_index, trajectory, rewards, step_rewards)

    def _solved(self, trajectory: Trajectory, prompts: Sequence[int]) -> float:
        assert self.data.task.solved is not None
        texts = decode_completions(
            self.data.tokenizer, trajectory.tokens.tolist(), self.denoiser.eos_id
        )
        messages = [self.data.train.examples[i].prompt for i in prompts]
        values = self.data.task.solved(messages, texts, **self.data.train.columns(prompts))
        return sum(float(v or 0.0) for v in values) / max(len(texts), 1)

    def _select(
        self, samples: Samples, sequence_ids: Tensor, metrics: Metrics
    ) -> tuple[States, Tensor]:
        """Selected states of the groups that have something to teach; and those groups [P']."""
        algorithm = self.config.algorithm
        kept = groups_with_spread(samples.rewards).nonzero()[:, 0]
        metrics["skipped/groups"] = len(samples.prompt_index) - len(kept)
        rows = (kept[:, None] * self._group_size + torch.arange(self._group_size)).flatten()
        rows = rows.to(self.denoiser.device)
        trajectory = samples.trajectory.take(rows)
        limits = candidate_limits(
            trajectory, self.denoiser.eos_id, stop_at_eos=algorithm.stop_at_eos
        )
        selected = select(
            trajectory,
            algorithm.strategy,
            algorithm.selected_steps,
            limits=limits,
            seed=self.config.seed,
            sequence_ids=sequence_ids[rows],
        )
        states = States.from_selection(trajectory, selected)
        metrics["selected/histogram"] = histogram(selected, trajectory.num_steps).tolist()
        metrics["selected/states"] = len(states)
        if len(states):
            entropy = trajectory.entropy[states.row, states.step]
            metrics["selected/entropy"] = float(entropy.mean())
        return states, kept

    def _advantages(
        self,
        step: int,
        samples: Samples,
        kept: Tensor,
        states: States,
        scores: Scores,
        metrics: Metrics,
    ) -> Tensor:
        """Advantage of every state, float64 [M]."""
        algorithm, groups = self.config.algorithm, len(kept)
        row, rank = states.row.cpu(), states.rank.cpu()
        shape = (groups, self._group_size, self._ranks)
        valid = torch.zeros(groups * self._group_size, self._ranks, dtype=torch.bool)
        valid[row, rank] = True
        rewards = samples.rewards[kept]
        if scores.completions is None:
            advantage = egspo_advantages(
                rewards, valid.view(shape), scale_by_std=algorithm.scale_by_std
            )
        else:
            prompts = [samples.prompt_index[int(kept[i])] for i in row // self._group_size]
            scored = self._score(scores.completions, prompts)
            metrics["skipped/step_rewards"] = scored.skipped
            step_values = intermediate_total(scored, self.data.task.rewards)
            metrics["step_reward/mean"] = _mean(step_values)
            values = torch.full(valid.shape, float("nan"), dtype=torch.float64)
            values[row, rank] = step_values
            selected = torch.zeros(valid.shape, dtype=torch.int64)
            selected[row, rank] = states.step.cpu()
            lam = lambda_at(algorithm, step - 1, selected, states.trajectory.num_steps)
            advantage = egspo_sa_advantages(
                rewards,
                values.view(shape),
                valid.view(shape),
                lam.view(shape),
                step_rewards=samples.step_rewards[kept],
                normalize_returns=algorithm.normalize_returns,
                returns=algorithm.returns,
                baseline=algorithm.baseline,
                scale_by_std=algorithm.scale_by_std,
            )
        result = advantage.view(valid.shape)[row, rank]
        if len(states):
            metrics["advantage/mean"] = float(result.mean())
            metrics["advantage/std"] = float(result.std(correction=0))
            metrics["advantage/max"] = float(result.abs().max())
        return result.to(self.denoiser.device)

    def _update(
        self,
        step: int,
        states: States,
        groups: list[list[Tensor]],
        scores: Scores,
        advantage: Tensor,
        sequences: int,
    ) -> Metrics:
        """``num_iterations`` epochs over the groups of micro-batches, an optimizer step each.

        The denominators are constant: a skipped group or a padded step counts as a zero, so that
        the gradient does not depend on what could be skipped.
        """
        algorithm = self.config.algorithm
        joint = algorithm.schedule == "joint"
        weight = 1.0 / (sequences * (self._ranks if joint else 1))
        outcomes: list[list[Surrogate]] = []
        norms: list[float] = []
        for _ in range(algorithm.num_iterations):
            for group in groups:
                outcome = [
                    self._backward(step, states, index, scores, advantage, weight)
                    for index in group
                ]
                if not self.reduce_gradients(bool(group)):
                    continue
                limit = self.config.optimizer.max_grad_norm
                norms.append(clip_gradients(self.denoiser.model, limit))
                self.updated = True
                apply_gradients(self.optimizer)
                outcomes.append(outcome)
        return surrogate_metrics(outcomes, norms)

    def _backward(
        self,
        step: int,
        states: States,
        index: Tensor,
        scores: Scores,
        advantage: Tensor,
        weight: float,
    ) -> Surrogate:
        outcome = self.scorer.surrogate(states, index, scores, advantage, weight)
        if not bool(outcome.loss.isfinite()):
            ratio = float(outcome.ratio.max())
            raise NonFiniteError(
                f"the loss is {float(outcome.loss)} at step {step} (largest ratio {ratio:.3g}, "
                f"largest advantage {float(advantage[index].abs().max()):.3g}); the weights did "
                "not take it"
            )
        outcome.loss.backward()  # type: ignore[no-untyped-call]
        return outcome._replace(loss=outcome.loss.detach())


def intermediate_total(scored: ScoredRewards, rewards: Sequence[Reward]) -> Tensor:
    """Weighted sum [N] of the reward functions that score one-step completions.

    NaN where the sample was skipped; a function that does not apply to a sample adds nothing.
    """
    chosen = [scored.per_function[r.name] * r.weight for r in rewards if r.intermediate]
    total = torch.stack(chosen).nansum(0) if chosen else torch.zeros_like(scored.total)
    return total.where(~scored.total.isnan(), float("nan"))


def surrogate_metrics(outcomes: list[list[Surrogate]], norms: list[float]) -> Metrics:
    """What the updates of one iteration did; ``outcomes`` by optimizer step and micro-batch."""
    every = [outcome for group in outcomes for outcome in group]
    if not every:
        return {"updates": len(norms)}
    ratio = torch.cat([outcome.ratio for outcome in every])
    first = torch.cat([outcome.ratio for outcome in outcomes[0]]) if outcomes[0] else ratio[:0]
    return {
        "updates": len(norms),
        "loss": float(torch.stack([outcome.loss for outcome in every]).sum()) / len(outcomes),
        "ratio/mean": float(ratio.mean()),
        "ratio/max": float(ratio.max()),
        # Of the first update, where the policy has not moved: anything but rounding is a defect.
        "ratio/drift": float((first - 1).abs().max()) if first.numel() else None,
        "ratio/clamped": int(torch.stack([outcome.clamped for outcome in every]).sum()),
        "clip/low": float(torch.cat([outcome.clipped_low for outcome in every]).double().mean()),
        "clip/high": float(torch.cat([outcome.clipped_high for outcome in every]).double().mean()),
        "kl": float(torch.cat([outcome.kl for outcome in every]).mean()),
        "grad_norm": sum(norms) / len(norms),
    }


def _mean(values: Tensor) -> float | None:
    """Mean over what is not NaN; None if nothing is left."""
    kept = values[~values.isnan()]
    return float(kept.mean()) if kept.numel() else None


@contextmanager
def _timed(metrics: Metrics, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    metrics[f"time/{name}"] = time.perf_counter() - start
