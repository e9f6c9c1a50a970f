"""What one iteration made with the weights that it rolled out with: all that its update needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from egspo.advantages import egspo_advantages, egspo_sa_advantages, lambda_at
from egspo.config import AlgorithmConfig
from egspo.reward_queue import RewardQueue
from egspo.rewards import ScoredRewards
from egspo.samples import OneStepCompletions
from egspo.scoring import Scores, States
from egspo.trajectory import Trajectory

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
    known: dict[tuple[int, str], ScoredRewards]
    """By those functions too, of each prompt and completion: what needs no second scoring. Empty
    where no one-step completions are made."""


@dataclass(frozen=True)
class Batch:
    """Trajectories, selected states and what replay found; rewards may still be on their way."""

    step: int
    """Training step, from 1."""
    samples: Samples
    kept: Tensor
    """int64 [P'], the groups that have something to teach."""
    states: States
    """M selected states, of the P' * G trajectories of those groups."""
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
    algorithm: AlgorithmConfig, batch: Batch, one_step: OneStepCompletions | None
) -> Tensor:
    """Advantage of every state, float64 [M].

    Args:
        algorithm: of the run.
        batch: M states.
        one_step: M completions; None for EGSPO.
    """
    states, rewards = batch.states, batch.samples.rewards[batch.kept]
    row, rank = states.row.cpu(), states.rank.cpu()
    shape = (*rewards.shape, states.ranks)
    valid = torch.zeros(rewards.numel(), states.ranks, dtype=torch.bool)
    valid[row, rank] = True
    if one_step is None:
        advantage = egspo_advantages(
            rewards, valid.view(shape), scale_by_std=algorithm.scale_by_std
        )
    else:
        values = torch.full(valid.shape, float("nan"), dtype=torch.float64)
        values[row, rank] = one_step.rewards
        selected = torch.zeros(valid.shape, dtype=torch.int64)
        selected[row, rank] = states.step.cpu()
        lam = lambda_at(algorithm, batch.step - 1, selected, states.trajectory.num_steps)
        advantage = egspo_sa_advantages(
            rewards,
            values.view(shape),
            valid.view(shape),
            lam.view(shape),
            step_rewards=batch.samples.step_rewards[batch.kept],
            normalize_returns=algorithm.normalize_returns,
            returns=algorithm.returns,
            baseline=algorithm.baseline,
            scale_by_std=algorithm.scale_by_std,
        )
    return advantage.view(valid.shape)[row, rank]
