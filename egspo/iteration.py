"""One iteration of EGSPO: prompts -> trajectories -> selected steps -> scored states -> update."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from egspo.optimization import NonFiniteError
from egspo.parallel import Engine
from egspo.processes import Processes
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
    """P groups of G completions, whose trajectories are divided among the processes.

    Sequence ``s`` is an answer to prompt ``s // G``; a group may lie in several processes.
    """

    prompt_index: list[int]
    """P places in the training set."""
    sequences: range
    """Those of this process: trajectory ``b`` is of sequence ``sequences[b]``."""
    trajectory: Trajectory
    rewards: Tensor
    """float64 [P, G], of all processes; NaN where not scored."""
    step_rewards: Tensor
    """The same by the functions that score one-step completions."""
    known: dict[tuple[int, str], ScoredRewards]
    """By those functions too, of each prompt and completion: what needs no second scoring. Empty
    where no one-step completions are made."""

    def prompts(self, sequences: list[int]) -> list[int]:
        """Of each sequence, its prompt's place in the training set."""
        return [self.prompt_index[s // self.rewards.shape[1]] for s in sequences]


class Iteration:
    """The algorithm, on one of several processes or the only one."""

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        denoiser: Denoiser,
        engine: Engine,
        processes: Processes,
    ) -> None:
        self.config, self.data, self.denoiser = config, data, denoiser
        self.engine, self.processes = engine, processes
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
        """Rollout, select, score and update on the prompts given, the same in every process.

        Returns what to log, as parts for :func:`egspo.reduction.merge`.

        Args:
            step: training step, from 1.
            prompt_index: places in the training set, one per group.
            first_sequence: id of the first sequence; ids are never repeated in a run.
        """
        self.updated = False
        metrics: Metrics = {}
        with self.engine.gathered():
            with RewardQueue(self.rewards.score, self.data.task.rewards) as queue:
                with self._phase(metrics, step, "rollout"):
                    sequences = self.processes.share(len(prompt_index) * self._group_size)
                    trajectory = self._rollout(prompt_index, sequences, first_sequence, queue)
                with self._phase(metrics, step, "reward"):
                    samples = self._reward(
                        step, prompt_index, sequences, trajectory, queue, metrics
                    )
            with self._phase(metrics, step, "select"):
                states, kept = self._select(samples, first_sequence, metrics)
            with self._phase(metrics, step, "score"):
                scores, one_step = self._replay(step, samples, kept, states, metrics)
                advantage = self._advantages(step, samples, kept, states, one_step, metrics)
        with self._phase(metrics, step, "update"):
            metrics.update(self._update(step, samples, states, scores, advantage))
        tokens = int((trajectory.unmask_step != NEVER).sum())
        metrics["speed/tokens_per_second"] = tokens / max(metrics["time/rollout"], 1e-9)
        metrics["memory/peak"] = peak_memory(self.denoiser.device)
        return metrics

    @contextmanager
    def _phase(self, metrics: Metrics, step: int, name: str) -> Iterator[None]:
        """Time, FLOPs and, of the rollout, what else its forward passes took."""
        self.processes.enter(f"{name} of step {step}")
        start, before = time.perf_counter(), self.denoiser.work.copy()
        with self.processes.collective():
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
        self, prompt_index: list[int], sequences: range, first_sequence: int, queue: RewardQueue
    ) -> Trajectory:
        """Denoise; completions that have ended are scored while others are still denoised."""
        algorithm, generation = self.config.algorithm, self.config.generation
        prompts = [prompt_index[s // self._group_size] for s in sequences]
        token_ids = [self.data.train.token_ids[i] for i in prompts]
        for block in rollout_blocks(
            self.denoiser,
            PromptBatch.from_lists(token_ids, self.denoiser.pad_id, self.denoiser.device),
            generation,
            seed=self.config.seed,
            sequence_ids=self._ids(first_sequence, sequences),
            entropy_over=algorithm.entropy_over,
            entropy_reduce=algorithm.entropy_reduce,
            entropy_temperature=1.0 if algorithm.entropy_at == "one" else generation.temperature,
        ):
            if block.finished:
                texts = self.rewards.decode(block.ended.tokens)
                queue.add(block.finished, texts, [prompts[i] for i in block.finished])
        return block.trajectory

    def _ids(self, first: int, sequences: Sequence[int]) -> Tensor:
        """Those that the randomness of sequences is counted by."""
        return torch.tensor([first + s for s in sequences], device=self.denoiser.device)

    def _reward(
        self,
        step: int,
        prompt_index: list[int],
        sequences: range,
        trajectory: Trajectory,
        queue: RewardQueue,
        metrics: Metrics,
    ) -> Samples:
        task, shape = self.data.task, (len(prompt_index), self._group_size)
        prompts = [prompt_index[s // self._group_size] for s in sequences]
        texts, scored = queue.collect(len(prompts))
        warn_of_failures(step, scored)
        mine = (scored.total, intermediate_total(scored, task.rewards))
        rewards, step_rewards = (
            torch.cat(parts).view(shape) for parts in zip(*self.processes.gather(mine), strict=True)
        )
        spread = (rewards - rewards.nanmean(1, keepdim=True)).flatten()
        metrics["reward/mean"] = part(scored.total)
        metrics["reward/std"] = part(spread[sequences.start : sequences.stop], "rms")
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
            sequences,
            trajectory,
            rewards,
            step_rewards,
            self.rewards.known(scored, texts, prompts) if self.config.algorithm.stepwise else {},
        )

    def _select(
        self, samples: Samples, first_sequence: int, metrics: Metrics
    ) -> tuple[States, list[int]]:
        """Selected states of the groups that have something to teach, and the sequence of each
        trajectory of theirs."""
        algorithm = self.config.algorithm
        teaches = groups_with_spread(samples.rewards)
        metrics["skipped/groups"] = int((~teaches).sum())
        sequences = [s for s in samples.sequences if teaches[s // self._group_size]]
        rows = torch.tensor(sequences, dtype=torch.int64) - samples.sequences.start
        trajectory = samples.trajectory.take(rows.to(self.denoiser.device))
        limits = candidate_limits(
            trajectory, self.denoiser.eos_id, stop_at_eos=algorithm.stop_at_eos
        )
        # A sample without a reward has no candidates: it stays out of the update, KL included.
        scored = ~samples.rewards.flatten()[sequences].isnan().to(limits.device)
        limits = limits.where(scored, 0)
        selected = select(
            trajectory,
            algorithm.strategy,
            algorithm.selected_steps,
            limits=limits,
            seed=self.config.seed,
            sequence_ids=self._ids(first_sequence, sequences),
        )
        states = States.from_selection(trajectory, selected)
        metrics["selected/histogram"] = histogram(selected, trajectory.num_steps).tolist()
        metrics["selected/states"] = Count(len(states))
        metrics["selected/entropy"] = part(trajectory.entropy[states.row, states.step])
        return states, sequences

    def _replay(
        self,
        step: int,
        samples: Samples,
        sequences: list[int],
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
        prompts = samples.prompts([sequences[i] for i in states.row.tolist()])
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
        sequences: list[int],
        states: States,
        one_step: OneStepCompletions | None,
        metrics: Metrics,
    ) -> Tensor:
        """Advantage of every state, float64 [M]."""
        algorithm = self.config.algorithm
        sequence = torch.tensor([sequences[i] for i in states.row.tolist()], dtype=torch.int64)
        rank = states.rank.cpu()
        # A baseline is over the group, wherever its members are.
        mine = (sequence, rank, states.step.cpu(), None if one_step is None else one_step.rewards)
        every = self.processes.gather(mine)
        shape = (*samples.rewards.shape, self.config.ranks)
        valid = torch.zeros(shape, dtype=torch.bool).flatten(0, 1)
        selected = torch.zeros(valid.shape, dtype=torch.int64)
        values = torch.full(valid.shape, float("nan"), dtype=torch.float64)
        for place in every:
            valid[place[0], place[1]], selected[place[0], place[1]] = True, place[2]
            if place[3] is not None:
                values[place[0], place[1]] = place[3]
        if one_step is None:
            advantage = egspo_advantages(
                samples.rewards, valid.view(shape), scale_by_std=algorithm.scale_by_std
            )
        else:
            lam = lambda_at(algorithm, step - 1, selected, states.trajectory.num_steps)
            advantage = egspo_sa_advantages(
                samples.rewards,
                values.view(shape),
                valid.view(shape),
                lam.view(shape),
                step_rewards=samples.step_rewards,
                normalize_returns=algorithm.normalize_returns,
                returns=algorithm.returns,
                baseline=algorithm.baseline,
                scale_by_std=algorithm.scale_by_std,
            )
        result = advantage.flatten(0, 1)[sequence, rank]
        metrics["advantage/mean"] = part(result)
        metrics["advantage/std"] = part(result, "std")
        metrics["advantage/max"] = part(result.abs(), "max")
        if self.config.evaluates_at(step):
            self.group = sampled_group(
                self.config,
                self.data,
                self.denoiser.eos_id,
                samples,
                sequences,
                states,
                result,
                one_step,
            )
        return result.to(self.denoiser.device)

    def _update(
        self, step: int, samples: Samples, states: States, scores: Scores, advantage: Tensor
    ) -> Metrics:
        """``num_iterations`` epochs over the groups of micro-batches, an optimizer step each.

        The denominators are constant: a skipped group or a padded step counts as a zero, so that
        the gradient does not depend on what could be skipped.
        """
        algorithm = self.config.algorithm
        joint = algorithm.schedule == "joint"
        # The engine's mean over processes makes this one over all sequences.
        sequences = samples.rewards.numel() / self.processes.count
        weight = 1.0 / (sequences * (self.config.ranks if joint else 1))
        outcomes: list[list[Surrogate]] = []
        norms: list[float] = []
        for _ in range(algorithm.num_iterations):
            for group in scores.groups:
                outcome = self._accumulate(step, samples, states, group, scores, advantage, weight)
                if not self.engine.reduce_gradients(bool(group)):
                    continue
                norms.append(self.engine.clip(self.config.optimizer.max_grad_norm))
                self.updated = True
                self.engine.step()
                outcomes.append(outcome)
        return surrogate_metrics(outcomes, norms, with_kl=algorithm.beta > 0)

    def _accumulate(
        self,
        step: int,
        samples: Samples,
        states: States,
        group: list[Tensor],
        scores: Scores,
        advantage: Tensor,
        weight: float,
    ) -> list[Surrogate]:
        """Add up the gradient of a group.

        Where memory runs out, the group begins again with smaller micro-batches: a backward pass
        that failed may have added the gradients of some of the weights. The passes of a sharded
        model are collective: every process makes as many, and none can begin again.
        """
        sharded = self.engine.sharded
        while True:
            outcomes: list[Surrogate] = []
            group = self.micro_batches.split(states, group)
            passes = self.processes.largest(len(group)) if sharded else len(group)
            for number in range(passes):
                last = number + 1 == passes
                if number >= len(group):
                    self.engine.backward(self._nothing(samples.trajectory), last=last)
                    continue
                index = group[number]
                try:
                    outcome = self._backward(
                        step, states, index, scores, advantage, weight, last=last
                    )
                except torch.OutOfMemoryError as error:
                    if sharded:
                        self.micro_batches.give_up(states, index, error)
                    self.micro_batches.shrink(states, index, "updating on", error)
                    break
                outcomes.append(outcome)
            else:
                return outcomes
            self.engine.optimizer.zero_grad(set_to_none=True)
            release_memory(self.denoiser.device)

    def _backward(
        self,
        step: int,
        states: States,
        index: Tensor,
        scores: Scores,
        advantage: Tensor,
        weight: float,
        *,
        last: bool,
    ) -> Surrogate:
        outcome = self.scorer.surrogate(states, index, scores, advantage, weight)
        if not bool(outcome.loss.isfinite()):
            loss, ratio = float(outcome.loss.detach()), float(outcome.ratio.max())
            raise NonFiniteError(
                f"the loss is {loss} at step {step} (largest ratio {ratio:.3g}, largest advantage "
                f"{float(advantage[index].abs().max()):.3g}); the weights did not take it"
            )
        self.engine.backward(outcome.loss, last=last)
        return outcome._replace(loss=outcome.loss.detach())

    def _nothing(self, trajectory: Trajectory) -> Tensor:
        """A loss of 0, by the passes of any other: a process with less to do takes part in them."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.denoiser.device)
        states, none = States(trajectory, zero, zero, zero), zero.double()
        scorer = replace(self.scorer, algorithm=replace(self.config.algorithm, beta=0.0))
        scores = Scores(none, None, None, None, [])
        return scorer.surrogate(states, zero, scores, none, 0.0).loss
