"""Phase 3, trajectories -> selected steps: the states that are trained."""

from __future__ import annotations

import torch

from egspo.algorithm.advantages import egspo_advantages, groups_with_spread
from egspo.algorithm.batch import Metrics, Samples, Selection
from egspo.algorithm.selection import candidate_limits, histogram, select
from egspo.algorithm.states import States
from egspo.config import TrainConfig
from egspo.engines.processes import Processes
from egspo.engines.reduction import Count, part


def select_states(
    samples: Samples, config: TrainConfig, eos_id: int, processes: Processes
) -> Selection:
    """Selected states of the groups that can have something to teach.

    Left out are groups of which every advantage is known to be zero, where nothing but advantages
    counts: equal final rewards with neither one-step completions, whose rewards may differ, nor KL.

    Args:
        samples: with their rewards.
        config: of the run.
        eos_id: end of text.
        processes: this one among all of them.
    """
    algorithm, groups = config.algorithm, samples.groups
    equal = ~groups_with_spread(samples.rewards)
    teaches = ~equal | (algorithm.stepwise or algorithm.beta > 0)
    sequences = [s for s in groups.sequences if teaches[s // groups.size]]
    device = samples.trajectory.tokens.device
    rows = torch.tensor(sequences, dtype=torch.int64) - groups.sequences.start
    trajectory = samples.trajectory.take(rows.to(device))
    limits = candidate_limits(trajectory, eos_id, stop_at_eos=algorithm.stop_at_eos)
    # A sample without a reward has no candidates: it stays out of the update, KL included.
    scored = ~samples.rewards.flatten()[sequences].isnan().to(limits.device)
    limits = limits.where(scored, 0)
    every = torch.ones(*samples.rewards.shape, 1, dtype=torch.bool)
    advantage = egspo_advantages(samples.rewards, every).flatten()[sequences]
    selected = select(
        trajectory,
        algorithm.strategy,
        algorithm.selected_steps,
        limits=limits,
        entropy_share=algorithm.entropy_share,
        advantage=advantage.to(device),
        seed=config.seed,
        sequence_ids=groups.ids(sequences).to(device),
        step_id=groups.first_id,
    )
    if algorithm.entropy_share is not None:
        # K of the longest row anywhere: the optimizer steps of everyone.
        used = int((selected >= 0).sum(1).max()) if len(selected) else 0
        selected = selected[:, : max(processes.largest(used), 1)]
    states = States.from_selection(trajectory, selected)
    return Selection(states, sequences, int(equal.sum()), skipped_groups=int((~teaches).sum()))


def selection_metrics(selection: Selection) -> Metrics:
    """What is logged of the selected states."""
    states = selection.states
    trajectory = states.trajectory
    metrics: Metrics = {
        "reward/equal_groups": selection.equal_groups,
        "skipped/groups": selection.skipped_groups,
    }
    if selection.of_rollout:
        metrics["selected/k"] = states.ranks
        metrics["selected/histogram"] = histogram(states.step, trajectory.num_steps).tolist()
    metrics["selected/states"] = Count(len(states))
    if selection.of_rollout:
        metrics["selected/entropy"] = part(trajectory.entropy[states.row, states.step])
    return metrics
