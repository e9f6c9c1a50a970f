"""One iteration of EGSPO: prompts -> trajectories -> selected steps -> scored states -> update."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from egspo.algorithm.advantages import groups_with_spread
from egspo.algorithm.batch import Batch, Metrics, OneStepCompletions, Samples, state_advantages
from egspo.algorithm.micro_batches import MicroBatches, release_memory
from egspo.algorithm.replay import Scorer, Scores
from egspo.algorithm.sampled_group import sampled_group
from egspo.algorithm.selection import candidate_limits, histogram, select
from egspo.algorithm.states import States
from egspo.config import TrainConfig
from egspo.engines import Engine
from egspo.engines.optimization import NonFiniteError
from egspo.engines.processes import Processes
from egspo.engines.reduction import Count, part, surrogate_metrics
from egspo.rewards.queue import RewardQueue
from egspo.rewards.training import TrainingRewards, intermediate_total, warn_of_failures
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.engine import rollout_blocks
from egspo.rollouts.trajectory import NEVER, PromptBatch, Trajectory
from egspo.rollouts.work import ModelCost, peak_memory
from egspo.runs.samples import TrajectoryRecord
from egspo.tasks.prompts import Data
from egspo_kernels import Surrogate

logger = logging.getLogger("egspo")


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
        self.version = 0
        """How many iterations have changed the weights."""
        self.group: list[TrajectoryRecord] = []
        """A group of the last step with an evaluation, to look at."""

    def run(self, step: int, prompt_index: list[int], first_sequence: int) -> Metrics:
        """:meth:`produce` and :meth:`update` in turn: on the policy."""
        with closing(self.produce(step, prompt_index, first_sequence)) as batch:
            return self.update(batch)

    def produce(self, step: int, prompt_index: list[int], first_sequence: int) -> Batch:
        """Rollout, select and replay by the weights as they are; the prompts are those of all
        processes.

        The rewards of one-step completions may not be there yet: close what is not updated on.

        Args:
            step: training step, from 1.
            prompt_index: places in the training set, one per group.
            first_sequence: id of the first sequence; ids are never repeated in a run.
        """
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
                scores, one_step = self._replay(samples, kept, states)
        tokens = int((trajectory.unmask_step != NEVER).sum())
        metrics["speed/tokens_per_second"] = tokens / max(metrics["time/rollout"], 1e-9)
        return Batch(step, samples, kept, states, scores, one_step, self.version, metrics)

    def update(self, batch: Batch) -> Metrics:
        """Advantages and update, by the ratio to the weights that made the batch.

        Returns what to log of all phases, as parts for :func:`egspo.engines.reduction.merge`.
        """
        self.updated = False
        metrics: Metrics = {**batch.metrics, "staleness": self.version - batch.version}
        one_step = None if batch.one_step is None else self._collect(batch, batch.one_step, metrics)
        with self._phase(metrics, batch.step, "update"):
            advantage = self._advantages(batch, one_step, metrics)
            metrics.update(self._update(batch, advantage))
        if metrics["staleness"]:
            metrics["ratio/drift"] = None  # the policy has moved, and its ratio is no defect
        self.version += self.updated
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
            scored.per_function,
            step_rewards,
            self.rewards.known(scored, texts, prompts) if self.config.algorithm.stepwise else {},
        )

    def _select(
        self, samples: Samples, first_sequence: int, metrics: Metrics
    ) -> tuple[States, list[int]]:
        """Selected states of the groups that have something to teach, and the sequences that their
        trajectories are of."""
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
            entropy_share=algorithm.entropy_share,
            seed=self.config.seed,
            sequence_ids=self._ids(first_sequence, sequences),
            step_id=first_sequence,
        )
        if algorithm.entropy_share is not None:
            # K of the longest row anywhere: the denominator and the optimizer steps of everyone.
            used = int((selected >= 0).sum(1).max()) if len(selected) else 0
            selected = selected[:, : max(self.processes.largest(used), 1)]
        states = States.from_selection(trajectory, selected)
        metrics["selected/k"] = states.ranks
        metrics["selected/histogram"] = histogram(selected, trajectory.num_steps).tolist()
        metrics["selected/states"] = Count(len(states))
        metrics["selected/entropy"] = part(trajectory.entropy[states.row, states.step])
        return states, sequences

    def _replay(
        self, samples: Samples, sequences: list[int], states: States
    ) -> tuple[Scores, RewardQueue | None]:
        """Score the states; the rewards of a micro-batch's one-step completions are found while
        the next is replayed, and after."""
        algorithm, limit = self.config.algorithm, self.micro_batches
        groups = limit.plan(states, ranks=algorithm.update_ranks(states.ranks))
        if not algorithm.stepwise:
            return self.scorer.replay(states, groups, complete=False, limit=limit), None
        prompts = samples.prompts([sequences[i] for i in states.row.tolist()])
        with ExitStack() as failure:
            queue = RewardQueue(self.rewards.score, self.rewards.intermediate, samples.known)
            failure.enter_context(queue)

            def add(index: Tensor, completions: Tensor) -> None:
                places = index.tolist()
                queue.add(places, self.rewards.decode(completions), [prompts[i] for i in places])

            scores = self.scorer.replay(
                states, groups, complete=True, on_completions=add, limit=limit
            )
            failure.pop_all()  # there was none: the queue goes on until the update needs it
        return scores, queue

    def _collect(self, batch: Batch, queue: RewardQueue, metrics: Metrics) -> OneStepCompletions:
        """Wait for the rewards of the one-step completions."""
        with queue, self._phase(metrics, batch.step, "step_reward"):
            texts, scored = queue.collect(len(batch.states))
        warn_of_failures(batch.step, scored)
        metrics["skipped/step_rewards"] = Count(scored.skipped)
        metrics["step_reward/mean"] = part(scored.total)
        return OneStepCompletions(texts, scored.total)

    def _advantages(
        self, batch: Batch, one_step: OneStepCompletions | None, metrics: Metrics
    ) -> Tensor:
        """Advantage of every state, float64 [M]."""
        result = state_advantages(self.config.algorithm, batch, one_step, self.processes)
        metrics["advantage/mean"] = part(result)
        metrics["advantage/std"] = part(result, "std")
        metrics["advantage/max"] = part(result.abs(), "max")
        if self.config.evaluates_at(batch.step):
            self.group = sampled_group(
                self.config, self.data, self.denoiser.eos_id, batch, result, one_step
            )
        return result.to(self.denoiser.device)

    def _update(self, batch: Batch, advantage: Tensor) -> Metrics:
        """``num_iterations`` epochs over the groups of micro-batches, an optimizer step each.

        The denominators are constant: a skipped group or a padded step counts as a zero, so that
        the gradient does not depend on what could be skipped.
        """
        algorithm = self.config.algorithm
        # The engine's mean over processes makes this one over all sequences.
        sequences = batch.samples.rewards.numel() / self.processes.count
        updates = algorithm.update_ranks(batch.states.ranks)
        outcomes: list[list[Surrogate]] = []
        norms: list[float] = []
        for _ in range(algorithm.num_iterations):
            for ranks, group in zip(updates, batch.scores.groups, strict=True):
                weight = 1.0 / (sequences * len(ranks))
                outcome = self._accumulate(batch, group, advantage, weight)
                if not self.engine.reduce_gradients(bool(group)):
                    continue
                norms.append(self.engine.clip(self.config.optimizer.max_grad_norm))
                self.updated = True
                self.engine.step()
                outcomes.append(outcome)
        return surrogate_metrics(outcomes, norms, with_kl=algorithm.beta > 0)

    def _accumulate(
        self, batch: Batch, group: list[Tensor], advantage: Tensor, weight: float
    ) -> list[Surrogate]:
        """Add up the gradient of a group.

        Where memory runs out, the group begins again with smaller micro-batches: a backward pass
        that failed may have added the gradients of some of the weights. The passes of a sharded
        model are collective: every process makes as many, and none can begin again.
        """
        sharded, states = self.engine.sharded, batch.states
        while True:
            outcomes: list[Surrogate] = []
            group = self.micro_batches.split(states, group)
            passes = self.processes.largest(len(group)) if sharded else len(group)
            for number in range(passes):
                last = number + 1 == passes
                if number >= len(group):
                    self.engine.backward(self._nothing(batch), last=last)
                    continue
                index = group[number]
                try:
                    outcome = self._backward(batch, index, advantage, weight, last=last)
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
        self, batch: Batch, index: Tensor, advantage: Tensor, weight: float, *, last: bool
    ) -> Surrogate:
        outcome = self.scorer.surrogate(batch.states, index, batch.scores, advantage, weight)
        if not bool(outcome.loss.isfinite()):
            loss, ratio = float(outcome.loss.detach()), float(outcome.ratio.max())
            raise NonFiniteError(
                f"the loss is {loss} at step {batch.step} (largest ratio {ratio:.3g}, largest "
                f"advantage {float(advantage[index].abs().max()):.3g}); the weights did not take it"
            )
        self.engine.backward(outcome.loss, last=last)
        return outcome._replace(loss=outcome.loss.detach())

    def _nothing(self, batch: Batch) -> Tensor:
        """A loss of 0, by the passes of any other: a process with less to do takes part in them."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.denoiser.device)
        states = States(batch.samples.trajectory, zero, zero, zero, 1)
        none = zero.double()
        algorithm = replace(
            self.config.algorithm, beta=0.0, reference_every=None, reference_blend=1.0
        )
        scorer = replace(self.scorer, algorithm=algorithm)
        return scorer.surrogate(states, zero, Scores(none, None, None, None, []), none, 0.0).loss
