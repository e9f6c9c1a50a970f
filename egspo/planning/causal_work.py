"""The forward passes of a training step with a block-causal model, counted before any is made."""

from __future__ import annotations

import random
from collections.abc import Sequence

from egspo.algorithm.micro_batches import Columns
from egspo.config import TrainConfig
from egspo.planning.memory_sharded import SHARDED
from egspo.rollouts.block import block_plan
from egspo.rollouts.engine import MAX_PADDING
from egspo.rollouts.unmasking import Step
from egspo.rollouts.work import Work


def causal_plan(config: TrainConfig, prompt: int) -> list[Step]:
    """All steps of a completion behind ``prompt`` tokens; starts and ends are of whole blocks."""
    generation, steps = config.generation, []
    size, length = generation.block_length, generation.max_new_tokens
    for start in range(-(prompt % size), length, size):
        masked = min(start + size, length) - max(start, 0)
        steps += [
            Step(start, start + size, step.masked, step.quota)
            for step in block_plan(generation, masked)
        ]
    return steps


def causal_rollout(config: TrainConfig, prompts: Sequence[int]) -> Work:
    """Of one group per prompt: its prompt once, then a block a step.

    Batches are filled as the rollout does, but go through their blocks together.
    """
    generation, work = config.generation, Work()
    size, length = generation.block_length, generation.max_new_tokens
    queue = sorted(
        ((n, p) for p, n in enumerate(prompts) for _ in range(config.algorithm.group_size)),
        key=lambda each: -each[0],
    )
    prefilled: set[int] = set()
    while queue:
        longest = queue[0][0]
        allowed = MAX_PADDING * (longest + length)
        batch = [each for each in queue[: generation.batch_size] if longest - each[0] <= allowed]
        queue = queue[len(batch) :]
        fresh = {p: n for n, p in batch if p not in prefilled}
        if fresh:
            work.add(len(fresh), max(fresh.values()), max(fresh.values()))
        prefilled |= set(fresh)
        starts = [-(n % size) for n, _ in batch]
        while alive := [start for start in starts if start < length]:
            _block(config, work, alive, longest)
            starts = [start + size for start in alive]
    return work


def _block(config: TrainConfig, work: Work, starts: list[int], longest: int) -> None:
    """The steps of a block, which begins at ``starts`` in the sequences of a batch."""
    generation = config.generation
    size, length = generation.block_length, generation.max_new_tokens
    masked = [min(start + size, length) - max(start, 0) for start in starts]
    plans = [block_plan(generation, count) for count in masked]
    for index in range(max(map(len, plans))):
        rows = [plan for plan in plans if len(plan) > index]
        riding = index == 0 and max(starts) > 0
        work.add(len(rows), 2 * size if riding else size, longest + max(starts) + size)
        work.head_rows += sum(plan[index].masked for plan in rows)


def causal_training(config: TrainConfig, lengths: Sequence[int]) -> tuple[Work, Work]:
    """Of replay and update, of so many prompt tokens by trajectory."""
    algorithm, generation = config.algorithm, config.generation
    plans = [causal_plan(config, length) for length in lengths]
    draw, ranks = random.Random(0), config.ranks
    if algorithm.strategy == "all":
        ranks = max(map(len, plans))
    states = [
        (rank, row, step)
        for row, plan in enumerate(plans)
        for rank, step in enumerate(drawn_steps(config, len(plan), draw))
    ]
    states.sort(key=lambda s: (-lengths[s[1]], s[1], s[2]))
    drawn = [plans[row][step] for _, row, step in states]
    columns = Columns(
        generation,
        0,
        row=[row for _, row, _ in states],
        prompt=[lengths[row] for _, row, _ in states],
        start=[step.start for step in drawn],
        causal=True,
        answered=[row // algorithm.group_size for _, row, _ in states],
        share_prompts=algorithm.sharing(sharded=config.distributed.engine in SHARDED),
    )
    every = range(len(states))
    groups = [[i for i in every if states[i][0] in g] for g in algorithm.update_ranks(ranks)]
    passes, chains = Work(), Work()
    for group in groups:
        for index in columns.split(group, config.micro_batch_size, config.micro_batch_tokens):
            passes += columns.work(index)
            chains += _chains(config, columns, index)
    revealed = sum(step.quota for step in drawn)
    score, update = Work(), Work()
    reference = algorithm.beta > 0
    # Completions are always those of a replay: see egspo.algorithm.one_step.
    policy = config.replays or algorithm.completes
    for _ in range(policy + reference):
        score += passes
    score.head_rows = revealed * (policy + (reference and algorithm.kl == "k3"))
    if algorithm.completes:
        score.head_rows += sum(step.masked - step.quota for step in drawn)
        if algorithm.completion_blocks == "all":
            score += chains
    for _ in range(algorithm.num_iterations):
        update += passes
    update.head_rows = revealed * algorithm.num_iterations
    update.scored_rows = 0 if config.replays else revealed
    return score, update


def drawn_steps(config: TrainConfig, steps: int, draw: random.Random) -> list[int]:
    """Of a trajectory of so many steps those that are trained, by rank."""
    if config.algorithm.strategy == "all":
        return list(range(steps))
    return draw.sample(range(steps), min(config.ranks, steps))


def _chains(config: TrainConfig, columns: Columns, index: Sequence[int]) -> Work:
    """The blocks behind those of a micro-batch's states, filled greedily to the end."""
    work, generation = Work(), config.generation
    size, length = generation.block_length, generation.max_new_tokens
    longest = max(columns.prompt[i] for i in index)
    starts = [columns.start[i] + size for i in index]
    while alive := [start for start in starts if start < length]:
        work.add(len(alive), 2 * size, longest + max(alive) + size)
        work.head_rows += sum(min(start + size, length) - max(start, 0) for start in alive)
        starts = [start + size for start in alive]
    return work
