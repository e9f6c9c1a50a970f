"""Phase 2, trajectories -> rewards: of the final completions, and later of one-step completions."""

from __future__ import annotations

import torch

from egspo.algorithm.batch import Groups, Metrics, OneStepCompletions, Samples
from egspo.engines.processes import Processes
from egspo.engines.reduction import Count, part
from egspo.rewards.queue import RewardQueue
from egspo.rewards.training import TrainingRewards, intermediate_total, warn_of_failures
from egspo.rollouts.trajectory import Trajectory


def collect_rewards(
    step: int,
    groups: Groups,
    trajectory: Trajectory,
    queue: RewardQueue,
    rewards: TrainingRewards,
    processes: Processes,
    *,
    keep_known: bool,
) -> tuple[Samples, Metrics]:
    """Wait for the rewards of the B completions here, and exchange them with the other processes.

    Args:
        step: training step, to warn of failed rewards with.
        groups: of all processes.
        trajectory: of ``groups.sequences``.
        queue: where the rollout put its completions.
        rewards: of the task.
        processes: this one among all of them.
        keep_known: keep what was scored, for one-step completions that say the same.
    """
    task, here = rewards.data.task, groups.sequences
    texts, scored = queue.collect(len(here))
    warn_of_failures(step, scored)
    mine = (scored.total, intermediate_total(scored, task.rewards))
    total, step_rewards = (
        torch.cat(parts).view(groups.shape) for parts in zip(*processes.gather(mine), strict=True)
    )
    spread = (total - total.nanmean(1, keepdim=True)).flatten()
    metrics: Metrics = {
        "reward/mean": part(scored.total),
        "reward/std": part(spread[here.start : here.stop], "rms"),
        **{f"reward/{name}": part(values) for name, values in scored.per_function.items()},
        "skipped/rewards": Count(scored.skipped),
    }
    prompts = groups.prompts()
    if task.solved is not None:
        metrics["solved"] = part(rewards.solved(texts, prompts))
    known = rewards.known(scored, texts, prompts) if keep_known else {}
    return Samples(groups, trajectory, total, scored.per_function, step_rewards, known), metrics


def collect_one_step(
    step: int, queue: RewardQueue, count: int
) -> tuple[OneStepCompletions, Metrics]:
    """Wait for the rewards of the one-step completions of ``count`` states."""
    texts, scored = queue.collect(count)
    warn_of_failures(step, scored)
    metrics = {
        "skipped/step_rewards": Count(scored.skipped),
        "step_reward/mean": part(scored.total),
    }
    return OneStepCompletions(texts, scored.total), metrics
