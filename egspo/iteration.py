"""One iteration of EGSPO: prompts -> trajectories -> selected steps -> scored states -> update."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
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
from egspo.micro_batches import MicroBatches, release_memory
from egspo.optimization import NonFiniteError, apply_gradients, clip_gradients
from egspo.reduction import Count, part, surrogate_metrics
from egspo.reward_queue import RewardQueue
from egspo.rewards import ScoredRewards
from egspo.rollout import rollout_blocks
from egspo.samples import OneStepCompletions, TrajectoryRecord, sampled_group
from egspo.scoring import Scorer, Scores, States
from egspo.selection import candidate_limits, histogram, select
from egspo.training_rewards import TrainingRewards, intermediate_total, warn_of_failures
from egspo.trajectory import NEVER, PromptBatch, Trajectory
from egspo.work import ModelCost, peak_memory
from egspo_kernels import Surrogate

Metrics = dict[str, Any]

logger = logging.getLogger("egspo")


@dataclass(frozen=True)
class Samples:
    """P groups of G trajectories and their rewards; trajectory ``b`` is of prompt ``b // G``."""

    prompt_index: list[int]
    """Place of each of the P prompts in the training set."""
    trajectory: Trajectory
    rewards: Tensor
    """float64 [P, G], NaN where a sample was skipped."""
    per_function: dict[str, Tensor]
    """float64 [P, G] by reward name, unweighted; NaN where it failed or does not apply."""
    step_rewards: Tensor
    """float64 [P, G], by those reward functions only that also score one-step completions."""
    known: dict[tuple[int, str], ScoredRewards]
    """By those functions too, of each prompt and completion: what needs no second scoring. Empty
    where no one-step completions are made."""


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
        self.scorer = Scorer(denoiser, config.algorithm, config.generation)
        self.rewards = TrainingRewards(config.task, data, denoiser.eos_id)
        self.micro_batches = MicroBatches(
            config.micro_batch_size,
            config.micro_batch_tokens,
            config.generation,
            denoiser.prediction_shift,
        )
        self.cost = ModelCost.of(denoiser.model)
        self.updated = False
        """Whether the weights may have changed since the iteration began."""
        self.group: list[TrajectoryRecord] = []
        """A group of the last step with an evaluation, to look at."""

    def run(self, step: int, prompt_index: list[int], first_sequence: int) -> Metrics:
        """Rollout, select, score and update on the prompts given.

        Returns what to log, as parts for :func:`egspo.reduction.merge`.

        Args:
            step: training step, from 1.
            prompt_index: places in the training set, one per group.
            first_sequence: id of the first sequence; ids are never repeated in a run.
        """
        self.updated = False
        metrics: Metrics = {}
        ids = first_sequence + torch.arange(len(prompt_index) * self._group_size)
        ids = ids.to(self.denoiser.device)
        with RewardQueue(self.rewards.score, self.data.task.rewards) as queue:
            with self._phase(metrics, "rollout"):
                trajectory = self._rollout(prompt_index, ids, queue)
            with self._phase(metrics, "reward"):
                samples = self._reward(step, prompt_index, trajectory, queue, metrics)
        with self._phase(metrics, "select"):
            states, kept = self._select(samples, ids, metrics)
        with self._phase(metrics, "score"):
            scores, one_step = self._replay(step, samples, kept, states, metrics)
            advantage = self._advantages(step, samples, kept, states, one_step, metrics)
        with self._phase(metrics, "update"):
            sequences = len(trajectory)
            metrics.update(self._update(step, states, scores, advantage, sequences))
        tokens = int((trajectory.unmask_step != NEVER).sum())
        metrics["speed/tokens_per_second"] = tokens / max(metrics["time/rollout"], 1e-9)
        metrics["memory/peak"] = peak_memory(self.denoiser.device)
        return metrics

    @contextmanager
    def _phase(self, metrics: Metrics, name: str) -> Iterator[None]:
        """Time, FLOPs and, of the rollout, what else its forward passes took."""
        start, before = time.perf_counter(), self.denoiser.work.copy()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        metrics[f"time/{name}"] = time.perf_counter() - start
        work = self.denoiser.work - before
        if self.cost is not None and name in ("rollout", "score", "update"):
            count = self.cost.training if name == "update" else self.cost.forward
            metrics[f"flops/{name}"] = Count(count(work))
        if name == "rollout":
            metrics["rollout/forwards"] = Count(work.forwards)
            metrics["rollout/head_rows"] = Count(work.head_rows)
            metrics["rollout/logits_bytes"] = Count(work.logits_bytes)
            metrics["rollout/cache_bytes"] = Count(work.cache_bytes)

    @property
    def _group_size(self) -> int:
        return self.config.algorithm.group_size

    def _rollout(
        self, prompt_index: list[int], sequence_ids: Tensor, queue: RewardQueue
    ) -> Trajectory:
        """Denoise; completions that have ended are scored while others are still denoised."""
        algorithm, generation = self.config.algorithm, self.config.generation
        token_ids = [self.data.train.token_ids[i] for i in prompt_index]
        repeated = [ids for ids in token_ids for _ in range(self._group_size)]
        for block in rollout_blocks(
            self.denoiser,
            PromptBatch.from_lists(repeated, self.denoiser.pad_id, self.denoiser.device),
            generation,
            seed=self.config.seed,
            sequence_ids=sequence_ids,
            entropy_over=algorithm.entropy_over,
            entropy_reduce=algorithm.entropy_reduce,
            entropy_temperature=1.0 if algorithm.entropy_at == "one" else generation.temperature,
        ):
            if block.finished:
                texts = self.rewards.decode(block.ended.tokens)
                prompts = [prompt_index[i // self._group_size] for i in block.finished]
                queue.add(block.finished, texts, prompts)
        return block.trajectory

    def _reward(
        self,
        step: int,
        prompt_index: list[int],
        trajectory: Trajectory,
        queue: RewardQueue,
        metrics: Metrics,
    ) -> Samples:
        task, shape = self.data.task, (len(prompt_index), self._group_size)
        prompts = [i for i in prompt_index for _ in range(self._group_size)]
        texts, scored = queue.collect(len(prompts))
        warn_of_failures(step, scored)
        rewards = scored.total.view(shape)
        metrics["reward/mean"] = part(rewards)
        metrics["reward/std"] = part(rewards - rewards.nanmean(1, keepdim=True), "rms")
        for name, values in scored.per_function.items():
            metrics[f"reward/{name}"] = part(values)
        if task.solved is not None:
            metrics["solved"] = part(self.rewards.solved(texts, prompts))
        metrics["skipped/rewards"] = Count(scored.skipped)
        metrics["entropy/mean"] = part(trajectory.entropy)
        metrics["length/mean"] = part(trajectory.lengths)
        metrics["rollout/saved"] = part(1 - trajectory.steps / trajectory.num_steps)
        return Samples(
            prompt_index,
            trajectory,
            rewards,
            {name: values.view(shape) for name, values in scored.per_function.items()},
            intermediate_total(scored, task.rewards).view(shape),
            self.rewards.known(scored, texts, prompts) if self.config.algorithm.stepwise else {},
        )

    def _select(
        self, samples: Samples, sequence_ids: Tensor, metrics: Metrics
    ) -> tuple[States, Tensor]:
        """Selected states of the groups that have something to teach; and those groups [P']."""
        algorithm = self.config.algorithm
        kept = groups_with_spread(samples.rewards).nonzero()[:, 0]
        metrics["skipped/groups"] = Count(len(samples.prompt_index) - len(kept))
        rows = (kept[:, None] * self._group_size + torch.arange(self._group_size)).flatten()
        rows = rows.to(self.denoiser.device)
        trajectory = samples.trajectory.take(rows)
        limits = candidate_limits(
            trajectory, self.denoiser.eos_id, stop_at_eos=algorithm.stop_at_eos
        )
        # A sample without a reward has no candidates: it stays out of the update, KL included.
        scored = ~samples.rewards[kept].isnan().flatten().to(limits.device)
        limits = limits.where(scored, 0)
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
        metrics["selected/states"] = Count(len(states))
        metrics["selected/entropy"] = part(trajectory.entropy[states.row, states.step])
        return states, kept

    def _replay(
        self,
        step: int,
        samples: Samples,
        kept: Tensor,
        states: States,
        metrics: Metrics,
    ) -> tuple[Scores, OneStepCompletions | None]:
        """Score the states; the rewards of a micro-batch's one-step completions are found while
        the next is replayed."""
        algorithm, limit = self.config.algorithm, self.micro_batches
        ranks = self.config.ranks if algorithm.schedule == "per_step" else None
        groups = limit.plan(states, ranks=ranks)
        if not algorithm.stepwise:
            return self.scorer.replay(states, groups, complete=False, limit=limit), None
        prompts = [samples.prompt_index[int(kept[i])] for i in states.row.cpu() // self._group_size]
        with RewardQueue(self.rewards.score, self.rewards.intermediate, samples.known) as queue:

            def add(index: Tensor, completions: Tensor) -> None:
                places = index.tolist()
                queue.add(places, self.rewards.decode(completions), [prompts[i] for i in places])

            scores = self.scorer.replay(
                states, groups, complete=True, on_completions=add, limit=limit
            )
            start = time.perf_counter()
            texts, scored = queue.collect(len(states))
        metrics["time/step_reward"] = time.perf_counter() - start
        warn_of_failures(step, scored)
        metrics["skipped/step_rewards"] = Count(scored.skipped)
        metrics["step_reward/mean"] = part(scored.total)
        return scores, OneStepCompletions(texts, scored.total)

    def _advantages(
        self,
        step: int,
        samples: Samples,
        kept: Tensor,
        states: States,
        one_step: OneStepCompletions | None,
        metrics: Metrics,
    ) -> Tensor:
        """Advantage of every state, float64 [M]."""
        algorithm, groups = self.config.algorithm, len(kept)
        row, rank = states.row.cpu(), states.rank.cpu()
        shape = (groups, self._group_size, self.config.ranks)
        valid = torch.zeros(groups * self._group_size, self.config.ranks, dtype=torch.bool)
        valid[row, rank] = True
        rewards = samples.rewards[kept]
        if one_step is None:
            advantage = egspo_advantages(
                rewards, valid.view(shape), scale_by_std=algorithm.scale_by_std
            )
        else:
            values = torch.full(valid.shape, float("nan"), dtype=torch.float64)
            values[row, rank] = one_step.rewards
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
        metrics["advantage/mean"] = part(result)
        metrics["advantage/std"] = part(result, "std")
        metrics["advantage/max"] = part(result.abs(), "max")
        if self.config.evaluates_at(step):
            self.group = sampled_group(
                self.config,
                self.data,
                self.denoiser.eos_id,
                samples,
                kept,
                states,
                result,
                one_step,
            )
        return result.to(self.denoiser.device)

    def _update(
        self, step: int, states: States, scores: Scores, advantage: Tensor, sequences: int
    ) -> Metrics:
        """``num_iterations`` epochs over the groups of micro-batches, an optimizer step each.

        The denominators are constant: a skipped group or a padded step counts as a zero, so that
        the gradient does not depend on what could be skipped.
        """
        algorithm = self.config.algorithm
        joint = algorithm.schedule == "joint"
        weight = 1.0 / (sequences * (self.config.ranks if joint else 1))
        outcomes: list[list[Surrogate]] = []
        norms: list[float] = []
        for _ in range(algorithm.num_iterations):
            for group in scores.groups:
                outcome = self._accumulate(step, states, group, scores, advantage, weight)
                if not self.reduce_gradients(bool(group)):
                    continue
                limit = self.config.optimizer.max_grad_norm
                norms.append(clip_gradients(self.denoiser.model, limit))
                self.updated = True
                apply_gradients(self.optimizer)
                outcomes.append(outcome)
        return surrogate_metrics(outcomes, norms, with_kl=algorithm.beta > 0)

    def _accumulate(
        self,
        step: int,
        states: States,
        group: list[Tensor],
        scores: Scores,
        advantage: Tensor,
        weight: float,
    ) -> list[Surrogate]:
        """Add up the gradient of a group.

        Where memory runs out, the group begins again with smaller micro-batches: a backward pass
        that failed may have added the gradients of some of the weights.
        """
        while True:
            outcomes: list[Surrogate] = []
            group = self.micro_batches.split(states, group)
            for index in group:
                try:
                    outcome = self._backward(step, states, index, scores, advantage, weight)
                except torch.OutOfMemoryError as error:
                    self.micro_batches.shrink(states, index, "updating on", error)
                    break
                outcomes.append(outcome)
            else:
                return outcomes
            self.optimizer.zero_grad(set_to_none=True)
            release_memory(self.denoiser.device)

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
            loss, ratio = float(outcome.loss.detach()), float(outcome.ratio.max())
            raise NonFiniteError(
                f"the loss is {loss} at step {step} (largest ratio {ratio:.3g}, largest advantage "
                f"{float(advantage[index].abs().max()):.3g}); the weights did not take it"
            )
        outcome.loss.backward()  # type: ignore[no-untyped-call]
        return outcome._replace(loss=outcome.loss.detach())
