"""What one iteration made with the weights that it rolled out with: all that its update needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from egspo.algorithm.advantages import egspo_advantages, egspo_sa_advantages, lambda_at
from egspo.algorithm.replay import Scores
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig
from egspo.engines.processes import Processes
from egspo.rewards.queue import RewardQueue
from egspo.rewards.scoring import ScoredRewards
from egspo.rollouts.trajectory import Trajectory
from egspo.runs.samples import finite_or_none

Metrics = dict[str, Any]


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
    per_function: dict[str, Tensor]
    """By reward name, float64 [B] of the trajectories here, unweighted; NaN where it failed or does
    not apply."""
    step_rewards: Tensor
    """float64 [P, G], by the functions that score one-step completions."""
    known: dict[tuple[int, str], ScoredRewards]
    """By those functions too, of each prompt and completion: what needs no second scoring. Empty
    where no one-step completions are made."""

    def prompts(self, sequences: Sequence[int]) -> list[int]:
        """Of each sequence, its prompt's place in the training set."""
        return [self.prompt_index[s // self.rewards.shape[1]] for s in sequences]


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
    sequences: list[int]
    """Those of this process whose groups have something to teach."""
    states: States
    """M selected states, of the trajectories of those sequences."""
    scores: Scores
    one_step: RewardQueue | None
    """Scores the M one-step completions in the background; None for EGSPO."""
    version: int
    """Of the weights: how many iterations had changed them."""
    metrics: Metrics
    """Of the phases so far."""

    def close(self) -> None:
        """Drop the rewards that are not being made yet."""
        if self.one_step is not None:
            self.one_step.close()


def state_advantages(
    algorithm: AlgorithmConfig,
    batch: Batch,
    one_step: OneStepCompletions | None,
    processes: Processes,
) -> Tensor:
    """Advantage of every state, float64 [M].

    Args:
        algorithm: of the run.
        batch: M states.
        one_step: M completions; None for EGSPO.
        processes: where the other members of the groups are.
    """
    states, samples = batch.states, batch.samples
    sequence = torch.tensor([batch.sequences[i] for i in states.row.tolist()], dtype=torch.int64)
    rank, step = states.rank.cpu(), states.step.cpu()
    mine = sequence, rank, step, None if one_step is None else one_step.rewards
    shape = (*samples.rewards.shape, states.ranks)
    valid = torch.zeros(shape, dtype=torch.bool).flatten(0, 1)
    selected = torch.zeros(valid.shape, dtype=torch.int64)
    values = torch.full(valid.shape, float("nan"), dtype=torch.float64)
    for row, column, steps, rewards in processes.gather(mine):
        valid[row, column], selected[row, column] = True, steps
        if rewards is not None:
            values[row, column] = rewards
    if one_step is None:
        advantage = egspo_advantages(
            samples.rewards, valid.view(shape), scale_by_std=algorithm.scale_by_std
        )
    else:
        lam = lambda_at(algorithm, batch.step - 1, selected, states.trajectory.num_steps)
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
    return advantage.view(valid.shape)[sequence, rank]
