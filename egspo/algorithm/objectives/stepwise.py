"""EGSPO and EGSPO-SA: the clipped surrogate of selected denoising steps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from egspo.algorithm.advantages import egspo_advantages, egspo_sa_advantages, lambda_at
from egspo.algorithm.batch import Batch, OneStepCompletions, Samples, Selection
from egspo.algorithm.micro_batches import MicroBatches
from egspo.algorithm.objectives.base import OnCompletions
from egspo.algorithm.one_step import cheaper_source
from egspo.algorithm.phases.selection import select_states
from egspo.algorithm.replay import Scorer, Scores
from egspo.algorithm.states import States
from egspo.config import AlgorithmConfig, TrainConfig
from egspo.engines.processes import Processes
from egspo.rollouts.denoiser import Denoiser
from egspo.rollouts.trajectory import Trajectory
from egspo.rollouts.work import ModelCost
from egspo_kernels import Surrogate


class StepwiseObjective:
    """An :class:`~egspo.algorithm.objectives.base.Objective`.

    Args:
        config: of the run.
        denoiser: of the policy.
        micro_batches: how many states share a pass.
        processes: this one among all of them.
        prompt_tokens: of a prompt, on average.
    """

    def __init__(
        self,
        config: TrainConfig,
        denoiser: Denoiser,
        micro_batches: MicroBatches,
        processes: Processes,
        prompt_tokens: float,
    ) -> None:
        self.config, self.micro_batches, self.processes = config, micro_batches, processes
        self.canvases, self.epochs = 1, config.algorithm.num_iterations
        algorithm = replace(config.algorithm, share_prompts=micro_batches.share_prompts)
        self.scorer = Scorer(denoiser, algorithm, config.generation)
        self.completes = config.algorithm.completes
        self.completes_in_rollout = self.completes and (
            cheaper_source(
                config,
                ModelCost.of(denoiser.model),
                prompt_tokens,
                denoiser.prediction_shift,
                causal=denoiser.block_size is not None,
            )
            == "rollout"
        )

    def select(self, samples: Samples) -> Selection:
        return select_states(samples, self.config, self.scorer.denoiser.eos_id, self.processes)

    def score(
        self,
        states: States,
        *,
        on_completions: OnCompletions = lambda index, completions: None,
    ) -> Scores:
        ranks = self.config.algorithm.update_ranks(states.ranks)
        made = None
        if self.completes_in_rollout:
            made = states.trajectory.one_step_completions(states.row, states.step)
            on_completions(torch.arange(len(states), device=made.device), made)
        scores = self.scorer.replay(
            states,
            self.micro_batches.plan(states, ranks=ranks),
            complete=self.completes and made is None,
            old=self.config.replays,
            on_completions=on_completions,
            limit=self.micro_batches,
        )
        return scores if made is None else replace(scores, completions=made)

    def advantages(self, batch: Batch, one_step: OneStepCompletions | None) -> Tensor:
        return state_advantages(self.config.algorithm, batch, one_step, self.processes)

    def counts(self, advantage: Tensor) -> Tensor:
        return (advantage != 0) | (self.config.algorithm.beta > 0)

    @property
    def share(self) -> float:
        algorithm, generation = self.config.algorithm, self.config.generation
        steps = self.config.ranks
        if algorithm.schedule == "per_step":
            steps = min(algorithm.ranks_per_update, steps)
        exact = algorithm.aggregation == "exact"
        return 1.0 / steps / (generation.max_new_tokens / generation.steps if exact else 1.0)

    def loss(
        self, states: States, index: Tensor, scores: Scores, advantage: Tensor, weight: float
    ) -> Surrogate:
        return self.scorer.surrogate(states, index, scores, advantage, weight)

    def nothing(self, trajectory: Trajectory) -> Tensor:
        zero = torch.zeros(1, dtype=torch.int64, device=trajectory.tokens.device)
        states = States(trajectory, zero, zero, zero, 1)
        none = zero.double()
        algorithm = replace(
            self.config.algorithm, beta=0.0, reference_every=None, reference_blend=1.0
        )
        scorer = replace(self.scorer, algorithm=algorithm)
        unscored = Scores(none, none, None, None, None, [])
        return scorer.surrogate(states, zero, unscored, none, 0.0).loss


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
        one_step: M completions; None where there are none.
        processes: where the other members of the groups are.
    """
    states, samples = batch.states, batch.samples
    sequence = torch.tensor(batch.selection.sequence_of_states(), dtype=torch.int64)
    rank, step = states.rank.cpu(), states.step.cpu()
    mine = sequence, rank, step, batch.values if one_step is None else one_step.rewards
    shape = (*samples.rewards.shape, states.ranks)
    valid = torch.zeros(shape, dtype=torch.bool).flatten(0, 1)
    selected = torch.zeros(valid.shape, dtype=torch.int64)
    values = torch.full(valid.shape, float("nan"), dtype=torch.float64)
    for row, column, steps, found in processes.gather(mine):
        valid[row, column], selected[row, column] = True, steps
        if found is not None:
            values[row, column] = found
    if not algorithm.stepwise:
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
            step_rewards=None if one_step is None else samples.step_rewards,
            normalize_returns=algorithm.normalize_returns,
            returns=algorithm.returns,
            baseline=algorithm.baseline,
            scale_by_std=algorithm.scale_by_std,
        )
    return advantage.view(valid.shape)[sequence, rank]
