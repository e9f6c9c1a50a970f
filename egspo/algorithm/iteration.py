"""One iteration: prompts -> trajectories -> selected steps -> scored states -> loss -> update."""

from __future__ import annotations

from contextlib import closing

from egspo.algorithm.batch import Batch, Groups, Metrics, OneStepCompletions, Samples
from egspo.algorithm.micro_batches import MicroBatches
from egspo.algorithm.objectives.registry import build_objective
from egspo.algorithm.phases.clock import PhaseClock
from egspo.algorithm.phases.replay import replay_states
from egspo.algorithm.phases.rewards import collect_one_step, collect_rewards
from egspo.algorithm.phases.rollout import Rollout, rollout_metrics
from egspo.algorithm.phases.selection import selection_metrics
from egspo.algorithm.phases.update import Update
from egspo.algorithm.sampled_group import sampled_group
from egspo.algorithm.value_head import ValueHead
from egspo.config import TrainConfig
from egspo.engines import Engine
from egspo.engines.processes import Processes
from egspo.engines.reduction import part, share
from egspo.rewards.queue import RewardQueue
from egspo.rewards.training import TrainingRewards
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.work import peak_memory
from egspo.runs.samples import TrajectoryRecord
from egspo.tasks.prompts import Data


class Iteration:
    """The algorithm, on one of several processes or the only one.

    Args:
        config, data: of the run.
        denoiser, engine: of the policy.
        processes: this one among all of them.
        values: the value head, where the run has one.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        denoiser: Denoiser,
        engine: Engine,
        processes: Processes,
        values: ValueHead | None = None,
    ) -> None:
        assert (values is not None) == config.algorithm.predicts
        self.config, self.data, self.denoiser = config, data, denoiser
        self.engine, self.processes, self.values = engine, processes, values
        self.rewards = TrainingRewards(config.task, data, denoiser.eos_id)
        self.micro_batches = MicroBatches(
            config.micro_batch_size,
            config.micro_batch_tokens,
            config.generation,
            denoiser.prediction_shift,
            denoiser.block_size is not None,
            config.algorithm.sharing(sharded=engine.sharded),
        )
        self.phase = PhaseClock(denoiser, processes)
        lengths = [len(ids) for ids in data.train.token_ids]
        self.objective = build_objective(
            config, denoiser, self.micro_batches, processes, sum(lengths) / len(lengths)
        )
        self.micro_batches.together = self.objective.canvases
        complete = self.objective.completes_in_rollout
        self.rollout = Rollout(config, data, denoiser, self.rewards, complete)
        self.optimize = Update(
            config, self.objective, self.micro_batches, engine, processes, self.mark_updated
        )
        self.updated = False
        """Whether the weights may have changed in the last update."""
        self.changed = False
        """Whether anything that is saved may have, since whoever saves set this to False."""
        self.routed = (0, 0)
        """Agreement of routers with the rollout in the passes before the first optimizer step."""
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
        with self.engine.gathered():
            samples, metrics = self.sample(step, prompt_index, first_sequence)
            return self.prepare(step, samples, metrics)

    def sample(
        self, step: int, prompt_index: list[int], first_sequence: int
    ) -> tuple[Samples, Metrics]:
        """Rollout and rewards, as :meth:`produce` has them."""
        metrics: Metrics = {}
        self.denoiser.agreement.take()
        size = self.config.algorithm.group_size
        groups = Groups.shared(prompt_index, size, first_sequence, self.processes)
        with RewardQueue(self.rewards.score, self.data.task.rewards) as queue:
            with self.phase(metrics, step, "rollout"):
                trajectory = self.rollout(groups, queue)
            with self.phase(metrics, step, "reward"):
                samples, about_rewards = collect_rewards(
                    *(step, groups, trajectory, queue, self.rewards, self.processes),
                    keep_known=self.objective.completes,
                )
        return samples, {
            **metrics,
            **rollout_metrics(trajectory, metrics["time/rollout"]),
            **about_rewards,
        }

    def prepare(self, step: int, samples: Samples, metrics: Metrics) -> Batch:
        """Selection and replay of samples, whose ``metrics`` become those of the batch."""
        metrics = dict(metrics)
        with self.phase(metrics, step, "select"):
            selection = self.objective.select(samples)
        with self.phase(metrics, step, "score"):
            scores, one_step = replay_states(self.objective, samples, selection, self.rewards)
            values = None if self.values is None else self.values.predict(selection.states)
        metrics |= selection_metrics(selection)
        if samples.trajectory.experts is not None:
            metrics["routing/agreement"] = share(*self.denoiser.agreement.take())
        return Batch(step, samples, selection, scores, one_step, values, self.version, metrics)

    def update(self, batch: Batch) -> Metrics:
        """Advantages and update, by the ratio to the weights that made the batch.

        Returns what to log of all phases, as parts for :func:`egspo.engines.reduction.merge`.
        """
        self.updated, self.routed = False, (0, 0)
        self.denoiser.agreement.take()
        metrics: Metrics = {**batch.metrics, "staleness": self.version - batch.version}
        one_step = self._one_step(batch, metrics)
        with self.phase(metrics, batch.step, "update"):
            advantage = self.objective.advantages(batch, one_step)
            metrics["advantage/mean"] = part(advantage)
            metrics["advantage/std"] = part(advantage, "std")
            metrics["advantage/max"] = part(advantage.abs(), "max")
            if self.config.evaluates_at(batch.step):
                self.group = sampled_group(
                    self.config, self.data, self.denoiser.eos_id, batch, advantage, one_step
                )
            metrics |= self.optimize(batch, advantage.to(self.denoiser.device))
            if self.values is not None:
                metrics |= self._train_values(self.values, batch)
        routing = metrics.get("routing/agreement")
        if routing is not None and not routing.number and not metrics["staleness"]:
            metrics["routing/agreement"] = share(*self.routed)  # nothing was replayed before
        if metrics["staleness"]:
            metrics["ratio/drift"] = None  # the policy has moved, and its ratio is no defect
        self.version += self.updated
        metrics["memory/peak"] = peak_memory(self.denoiser.device)
        return metrics

    def mark_updated(self) -> None:
        """The weights are about to change."""
        if not self.updated:
            self.routed = self.denoiser.agreement.take()
        self.updated = self.changed = True

    def _train_values(self, values: ValueHead, batch: Batch) -> Metrics:
        """Once the rewards of the batch have been predicted."""
        self.changed = True
        samples = batch.samples
        here = samples.groups.sequences
        rewards = samples.rewards.flatten()[here.start : here.stop]
        return values.train(samples.trajectory, rewards)

    def _one_step(self, batch: Batch, metrics: Metrics) -> OneStepCompletions | None:
        """The one-step completions and their rewards, waited for; None where there are none."""
        if batch.one_step is None:
            return None
        with batch.one_step, self.phase(metrics, batch.step, "step_reward"):
            one_step, found = collect_one_step(batch.step, batch.one_step, len(batch.states))
        metrics |= found
        return one_step
