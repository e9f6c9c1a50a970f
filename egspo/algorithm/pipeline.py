"""The order of a run's rollouts and updates: in turn, or each rollout ahead of one update."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from egspo.algorithm.batch import Batch, Metrics
from egspo.algorithm.iteration import Iteration
from egspo.config import TrainConfig

Work = Callable[[int], tuple[list[int], int]]
"""Step -> places of its prompts in the training set, and the id of its first sequence."""


class Pipeline:
    """The steps of a run, one after the other.

    With ``config.pipeline`` the batch of the next step is made before the update of this one, so
    that the rewards of its one-step completions are found meanwhile. It is then one update old when
    its own turn comes, which the ratio to the probabilities of its own weights accounts for. Before
    an evaluation or a checkpoint nothing is made ahead, so that a run goes on from there as if it
    had not stopped.

    Args:
        config: of the run.
        iteration: makes batches and updates.
        work: what a step rolls out.
    """

    def __init__(self, config: TrainConfig, iteration: Iteration, work: Work) -> None:
        self.config, self.iteration, self.work = config, iteration, work
        self._ahead: Batch | None = None

    def step(self, step: int) -> Metrics:
        """Make the update of ``step``; the metrics are of its batch, whenever that was made."""
        with closing(self._ahead or self._produce(step)) as batch:
            self._ahead = self._produce(step + 1) if self.config.runs_ahead_at(step) else None
            return self.iteration.update(batch)

    def close(self) -> None:
        """Drop what was made ahead."""
        if self._ahead is not None:
            self._ahead.close()

    def _produce(self, step: int) -> Batch:
        return self.iteration.produce(step, *self.work(step))
