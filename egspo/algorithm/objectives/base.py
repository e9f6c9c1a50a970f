"""What an iteration asks of an objective: the one seam between rollout and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from egspo.algorithm.batch import Batch, OneStepCompletions, Samples, Selection
from egspo.algorithm.replay import Scores
from egspo.algorithm.states import States
from egspo.rollouts.trajectory import Trajectory
from egspo_kernels import Surrogate

OnCompletions = Callable[[Tensor, Tensor], object]
"""Takes int64 [m] places of states and their one-step completions int64 [m, L]."""


class Objective(Protocol):
    """Decides what is scored, how an advantage meets a likelihood, and a micro-batch's loss.

    What is scored are :class:`~egspo.algorithm.states.States`: canvases of a trajectory, and the
    positions whose tokens are to be predicted from them. They need not be those of the rollout: a
    trajectory whose ``unmask_step`` says something else masks something else.

    The methods are called by all processes, in the order in which they stand here.
    """

    epochs: int
    """How often an update goes over the groups of micro-batches."""
    completes: bool
    """Whether it wants one-step completions of its states, and their rewards."""
    completes_in_rollout: bool
    """Whether it takes them from the rollout's own passes."""

    @property
    def canvases(self) -> int:
        """States that only have a loss together, as they are of one completion: they stand one
        after the other, and share a micro-batch."""

    def select(self, samples: Samples) -> Selection:
        """M states of the samples here, and the sequences that they are of."""

    def score(
        self,
        states: States,
        *,
        on_completions: OnCompletions = lambda index, completions: None,
    ) -> Scores:
        """What must be known of M states before any update, and their micro-batches in groups: an
        optimizer step each."""

    def advantages(self, batch: Batch, one_step: OneStepCompletions | None) -> Tensor:
        """Of every state, float64 [M] on the CPU."""

    def counts(self, advantage: Tensor) -> Tensor:
        """bool [M]: which states have a loss with a gradient. The others are not passed again."""

    @property
    def share(self) -> float:
        """Weight of a state, or of ``canvases`` together, in the loss of its sequence. It must not
        depend on what was sampled: a skipped group or a padded step counts as a zero."""

    def loss(
        self, states: States, index: Tensor, scores: Scores, advantage: Tensor, weight: float
    ) -> Surrogate:
        """Of the micro-batch ``index`` int64 [m], each state, or its ``canvases`` together,
        weighted by ``weight``; with gradients."""

    def nothing(self, trajectory: Trajectory) -> Tensor:
        """A loss of 0 by the passes of any other, for a process that has less to do than others."""
