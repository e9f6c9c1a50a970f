"""Phase 5, scored states -> loss -> update: gradients of micro-batches, then optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from egspo.algorithm.batch import Batch, Metrics
from egspo.algorithm.micro_batches import MicroBatches, release_memory
from egspo.algorithm.objectives.base import Objective
from egspo.algorithm.states import States
from egspo.config import TrainConfig
from egspo.engines import Engine
from egspo.engines.optimization import NonFiniteError
from egspo.engines.processes import Processes
from egspo.engines.reduction import Count, surrogate_metrics
from egspo_kernels import Surrogate


@dataclass(frozen=True)
class Update:
    """The objective's epochs over the groups of micro-batches, an optimizer step each."""

    config: TrainConfig
    objective: Objective
    micro_batches: MicroBatches
    engine: Engine
    processes: Processes
    before_step: Callable[[], None]
    """Called when the weights are about to change."""

    def __call__(self, batch: Batch, advantage: Tensor) -> Metrics:
        """Train on ``batch`` with the ``advantage`` float64 [M] of its states."""
        # The engine's mean over processes makes this one over all sequences.
        sequences = batch.samples.rewards.numel() / self.processes.count
        weight = self.objective.share / sequences
        counts = self.objective.counts(advantage)
        groups = [self._kept(batch.states, group, counts) for group in batch.scores.groups]
        outcomes: list[list[Surrogate]] = []
        norms: list[float] = []
        drift = advantage.new_empty(0)
        for _ in range(self.objective.epochs):
            for group in groups:
                outcome, done = self._accumulate(batch, group, advantage, weight)
                if not self.engine.reduce_gradients(bool(group)):
                    continue
                if not norms and outcome:
                    now = torch.cat([one.log_prob for one in outcome]).double()
                    drift = now - batch.scores.recorded[torch.cat(done)]
                norms.append(self.engine.clip(self.config.optimizer.max_grad_norm))
                self.before_step()
                self.engine.step()
                outcomes.append(outcome)
        metrics = surrogate_metrics(outcomes, norms, drift, with_kl=self.config.algorithm.beta > 0)
        return {"skipped/states": Count(int((~counts).sum())), **metrics}

    def _kept(self, states: States, group: list[Tensor], counts: Tensor) -> list[Tensor]:
        """The micro-batches of ``group`` without the states that do not count, packed again."""
        kept = [index[counts[index]] for index in group]
        if sum(map(len, kept)) == sum(map(len, group)):
            return group  # in the shapes of the replay
        left = torch.cat(kept)
        return self.micro_batches.split(states, [left] if len(left) else [])

    def _accumulate(
        self, batch: Batch, group: list[Tensor], advantage: Tensor, weight: float
    ) -> tuple[list[Surrogate], list[Tensor]]:
        """Add up the gradient of a group; also returns its micro-batches as they were done.

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
                    # Takes part in the passes of processes that have more to do.
                    nothing = self.objective.nothing(batch.samples.trajectory)
                    self.engine.backward(nothing, last=last)
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
                return outcomes, group
            self.engine.optimizer.zero_grad(set_to_none=True)
            release_memory(batch.samples.trajectory.tokens.device)

    def _backward(
        self, batch: Batch, index: Tensor, advantage: Tensor, weight: float, *, last: bool
    ) -> Surrogate:
        outcome = self.objective.loss(batch.states, index, batch.scores, advantage, weight)
        if not bool(outcome.loss.isfinite()):
            loss, ratio = float(outcome.loss.detach()), float(outcome.ratio.max())
            raise NonFiniteError(
                f"the loss is {loss} at step {batch.step} (largest ratio {ratio:.3g}, largest "
                f"advantage {float(advantage[index].abs().max()):.3g}); the weights did not take it"
            )
        self.engine.backward(outcome.loss, last=last)
        return outcome._replace(loss=outcome.loss.detach())
