"""The forward passes of a training step, counted before any is made.

From sizes, schedule and prompt lengths alone. Where they do not decide, this is assumed: every
completion takes all its steps (what early exit saves comes as a share), and the trained steps are
drawn at random.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from egspo.algorithm.micro_batches import Columns
from egspo.algorithm.one_step import cheaper_source
from egspo.algorithm.value_head import UPDATES
from egspo.config import TrainConfig
from egspo.planning.causal_work import (
    causal_plan,
    causal_rollout,
    causal_training,
    drawn_steps,
)
from egspo.rollouts.engine import MAX_PADDING
from egspo.rollouts.unmasking import Step, schedule
from egspo.rollouts.work import ModelCost, Work


@dataclass(frozen=True)
class Shares:
    """What a run does of the most that its recipe allows."""

    saved_steps: float = 0.0
    """Of the denoising steps, saved by early exit: ``rollout/saved`` of a run."""
    scored_states: float = 1.0
    """Of prompts_per_step x group_size x selected_steps; without KL, EGSPO scores none of a group
    whose rewards are all the same."""
    trained_states: float = 1.0
    """Of the same; without KL, none whose advantage is 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.saved_steps < 1:
            raise ValueError(f"saved_steps must be in [0, 1), got {self.saved_steps}")
        for name in ("scored_states", "trained_states"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")


def expected_work(
    config: TrainConfig,
    prompts: Sequence[int],
    prediction_shift: int,
    cost: ModelCost,
    block_size: int | None = None,
) -> dict[str, Work]:
    """The passes of the phases ``rollout``, ``score`` and ``update`` of one step.

    Nothing is saved by early exit, and every group is trained.

    Args:
        config: of the run.
        prompts: tokens of the prompts of the step.
        prediction_shift, cost: of the model.
        block_size: of a block-causal model; None where attention has no direction.
    """
    lengths = [length for length in prompts for _ in range(config.algorithm.group_size)]
    if block_size is not None:
        score, update = causal_training(config, lengths)
        _add_values(config, score, update, [len(causal_plan(config, n)) for n in lengths])
        return {"rollout": causal_rollout(config, prompts), "score": score, "update": update}
    source = None
    if config.algorithm.completes:
        source = cheaper_source(config, cost, sum(prompts) / len(prompts), prediction_shift)
    plan = schedule(
        config.generation.max_new_tokens, config.generation.steps, config.generation.block_length
    )
    score, update = _training(config, plan, lengths, prediction_shift, completes=source == "replay")
    _add_values(config, score, update, [len(plan)] * len(lengths))
    return {
        "rollout": _rollout(config, plan, lengths, prediction_shift, completes=source == "rollout"),
        "score": score,
        "update": update,
    }


def _add_values(config: TrainConfig, score: Work, update: Work, steps: Sequence[int]) -> None:
    """What the value head takes, of trajectories of so many steps."""
    if config.algorithm.predicts:
        everything = config.algorithm.strategy == "all"
        score.value_rows = sum(n if everything else min(config.ranks, n) for n in steps)
        update.value_rows = 2 * UPDATES * sum(steps)


def _rollout(
    config: TrainConfig,
    plan: Sequence[Step],
    lengths: Sequence[int],
    shift: int,
    *,
    completes: bool,
) -> Work:
    generation, work = config.generation, Work()
    length, copies = generation.max_new_tokens, 2 if generation.guidance else 1
    queue = sorted(lengths, reverse=True)
    while queue:  # as the rollout fills its batches
        allowed = MAX_PADDING * (queue[0] + length)
        batch = [n for n in queue[: generation.batch_size] if queue[0] - n <= allowed]
        sequences, width = copies * len(batch), queue[0] + length
        queue = queue[len(batch) :]
        for step in plan:
            if generation.cache == "none":
                work.add(sequences, width, width)
            else:
                if step.masked == generation.block_length:
                    work.add(sequences, width, width)
                dual = generation.cache == "dual"
                window = generation.block_length if dual else length - step.start
                work.add(sequences, window + shift, width)
            work.head_rows += len(batch) * step.masked
            once = generation.cache == "dual" and step.masked < generation.block_length
            if config.algorithm.entropy_over == "masked" or (completes and not once):
                work.head_rows += len(batch) * (length - step.end)
    return work


def _training(
    config: TrainConfig,
    plan: Sequence[Step],
    lengths: Sequence[int],
    shift: int,
    *,
    completes: bool,
) -> tuple[Work, Work]:
    """Of replay and update."""
    algorithm, generation = config.algorithm, config.generation
    draw = random.Random(0)
    ranks = config.ranks
    states = [
        (rank, row, step)
        for row in range(len(lengths))
        for rank, step in enumerate(drawn_steps(config, len(plan), draw))
    ]
    # The order of replay: by trajectory and step with a cache, the longest prompts first.
    states.sort(key=lambda s: (s[1], s[2]) if generation.cache != "none" else (s[0], s[1]))
    states.sort(key=lambda s: -lengths[s[1]])
    columns = Columns(
        generation,
        shift,
        row=[row for _, row, _ in states],
        prompt=[lengths[row] for _, row, _ in states],
        start=[plan[step].start for _, _, step in states],
    )
    every = range(len(states))
    updates = algorithm.update_ranks(ranks)
    groups = [[i for i in every if states[i][0] in together] for together in updates]
    passes = Work()
    for group in groups:
        for index in columns.split(group, config.micro_batch_size, config.micro_batch_tokens):
            passes += columns.work(index)
    revealed = sum(plan[step].quota for _, _, step in states)
    # Positions that are still masked after a step.
    done = itertools.accumulate(step.quota for step in plan)
    after = [generation.max_new_tokens - count for count in done]

    score, update = Work(), Work()
    reference = algorithm.beta > 0
    policy = config.replays or completes
    for _ in range(policy + reference):
        score += passes
    score.head_rows = revealed * (policy + (reference and algorithm.kl == "k3"))
    if completes:
        score.head_rows += sum(after[step] for _, _, step in states)
    for _ in range(algorithm.num_iterations):
        update += passes
    update.head_rows = revealed * algorithm.num_iterations
    update.scored_rows = 0 if config.replays else revealed
    return score, update
