"""A group of a training step, to look at."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from egspo.algorithm.batch import Batch, OneStepCompletions
from egspo.config import TrainConfig
from egspo.rollouts.completion import completions_of
from egspo.runs.samples import SelectedStep, TrajectoryRecord, finite_or_none
from egspo.tasks.prompts import Data


def sampled_group(
    config: TrainConfig,
    data: Data,
    eos_id: int,
    batch: Batch,
    advantage: Tensor,
    one_step: OneStepCompletions | None,
) -> list[TrajectoryRecord]:
    """The first group of an iteration that has something to teach, or the first at all: those
    members that are in this process.

    Args:
        config, data: of the run.
        eos_id: end of text.
        batch: M selected states and the rollout that they are of.
        advantage: float64 [M].
        one_step: M completions; None where there are none.
    """
    samples, states, sequences = batch.samples, batch.states, batch.selection.sequences
    size, here = samples.groups.size, samples.groups.sequences
    sequence = batch.selection.sequence_of_states()
    taught = sorted(s for s, value in zip(sequence, advantage.tolist(), strict=True) if value)
    group = [*taught, *sequences, here[0]][0] // size
    members = [s for s in here if s // size == group]
    rewards, step_rewards = samples.rewards.flatten(), samples.step_rewards.flatten()
    device = samples.trajectory.tokens.device
    rows = torch.tensor([s - here.start for s in members], device=device)
    trajectory = samples.trajectory.take(rows)
    selected: list[list[SelectedStep]] = [[] for _ in members]
    for m, of in enumerate(sequence):
        if of not in members or not batch.selection.of_rollout:
            continue
        text, value = (None, None) if one_step is None else one_step.at(m)
        if batch.values is not None:
            value = finite_or_none(batch.values[m])
        selected[members.index(of)].append(
            SelectedStep(
                int(states.rank[m]), int(states.step[m]), finite_or_none(advantage[m]), text, value
            )
        )
    example = samples.groups.prompt_index[group]
    completions = completions_of(
        trajectory, data.tokenizer, eos_id, indices=range(len(members)), step_map=True
    )
    return [
        TrajectoryRecord(
            index=completion.index,
            completion=completion.text,
            finish_reason=completion.finish_reason,
            tokens=len(completion.token_ids),
            generation=config.generation,
            step_map=completion.step_map or [],
            messages=data.train.examples[example].prompt,
            prompt_index=example,
            reward=finite_or_none(rewards[members[row]]),
            rewards={
                name: float(values[rows[row]])
                for name, values in samples.per_function.items()
                if math.isfinite(values[rows[row]])
            },
            step_reward=finite_or_none(step_rewards[members[row]]) if one_step else None,
            step_entropy=[
                finite_or_none(value) for value in trajectory.entropy[row, : trajectory.steps[row]]
            ],
            selected=selected[row],
        )
        for row, completion in enumerate(completions)
    ]
