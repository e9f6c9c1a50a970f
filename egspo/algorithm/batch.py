"""What one iteration made with the weights that it rolled out with: all that its update needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from egspo.algorithm.replay import Scores
from egspo.algorithm.states import States
from egspo.engines.processes import Processes
from egspo.rewards.queue import RewardQueue
from egspo.rewards.scoring import ScoredRewards
from egspo.rollouts.trajectory import Trajectory
from egspo.runs.samples import finite_or_none

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Groups:
    """P prompts and G sequences for each, divided among the processes.

    Sequence ``s`` is an answer to prompt ``s // G``; a group may lie in several processes.
    """

    prompt_index: list[int]
    """P places in the training set."""
    size: int
    """G."""
    first_id: int
    """Id of the first sequence: its randomness is counted by it."""
    sequences: range
    """Those of this process, of P * G."""

    @classmethod
    def shared(
        cls, prompt_index: list[int], size: int, first_id: int, processes: Processes
    ) -> Groups:
        """With this process's share of the sequences."""
        return cls(prompt_index, size, first_id, processes.share(len(prompt_index) * size))

    @property
    def shape(self) -> tuple[int, int]:
        """P and G."""
        return len(self.prompt_index), self.size

    def prompts(self, sequences: Sequence[int] | None = None) -> list[int]:
        """Of each sequence (those here by default), its prompt's place in the training set."""
        of = self.sequences if sequences is None else sequences
        return [self.prompt_index[s // self.size] for s in of]

    def ids(self, sequences: Sequence[int]) -> Tensor:
        """int64, those that the randomness of ``sequences`` is counted by."""
        return torch.tensor([self.first_id + s for s in sequences], dtype=torch.int64)


@dataclass(frozen=True)
class Samples:
    """Trajectories with their rewards."""

    groups: Groups
    trajectory: Trajectory
    """Row ``b`` is of sequence ``groups.sequences[b]``."""
    rewards: Tensor
    """float64 [P, G], of all processes; NaN where not scored."""
    per_function: dict[str, Tensor]
    """By reward name, float64 [B] of the trajectories here, unweighted; NaN where it failed or does
    not apply."""
    step_rewards: Tensor
    """float64 [P, G], by the functions that score one-step completions."""
    known: dict[tuple[int, str], ScoredRewards]
    """By those functions too, of each prompt and completion: what needs no second scoring. Empty
    where no one-step completions are made."""


@dataclass(frozen=True)
class Selection:
    """What of the samples is scored and trained."""

    states: States
    """M states of R trajectories."""
    sequences: list[int]
    """R sequences of this process that those trajectories are of."""
    equal_groups: int
    """Groups of all processes whose final rewards are all the same, or missing."""
    skipped_groups: int
    """Those of them that were left out, as no term of theirs can be anything but zero."""
    of_rollout: bool = True
    """Whether the states are steps of the rollout, and not completions that were masked again."""

    def sequence_of_states(self) -> list[int]:
        """Of each of the M states."""
        return [self.sequences[row] for row in self.states.row.tolist()]


@dataclass(frozen=True)
class OneStepCompletions:
    """Of M states."""

    texts: list[str]
    rewards: Tensor
    """float64 [M], NaN where not scored."""

    def at(self, state: int) -> tuple[str, float | None]:
        return self.texts[state], finite_or_none(self.rewards[state])


@dataclass(frozen=True)
class Batch:
    """Trajectories, selected states and what replay found; rewards may still be on their way."""

    step: int
    """Training step, from 1."""
    samples: Samples
    selection: Selection
    scores: Scores
    one_step: RewardQueue | None
    """Scores the M one-step completions in the background; None where there are none."""
    values: Tensor | None
    """float64 [M], what the value head predicts of the states; None where there is none."""
    version: int
    """Of the weights: how many iterations had changed them."""
    metrics: Metrics
    """Of the phases so far."""

    @property
    def states(self) -> States:
        """M selected states."""
        return self.selection.states

    def close(self) -> None:
        """Drop the rewards that are not being made yet."""
        if self.one_step is not None:
            self.one_step.close()
