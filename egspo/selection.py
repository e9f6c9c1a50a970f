"""Step selection: which denoising steps of a trajectory are trained."""

from __future__ import annotations

import torch
from torch import Tensor

from egspo.config import Strategy
from egspo.trajectory import Trajectory
from egspo_kernels import counter_uniform, select_steps

# Keeps the noise of random selection apart from the noise of the rollout.
_SELECTION_STREAM = 0x73656C656374


def candidate_limits(trajectory: Trajectory, eos_id: int, *, stop_at_eos: bool) -> Tensor:
    """int64 [B]: only steps before the limit are candidates.

    With ``stop_at_eos`` that is up to the last step that revealed any token other than EOS; a
    completion of nothing but EOS has no candidates. Without, it is the steps taken.
    """
    if not stop_at_eos:
        return trajectory.steps
    steps = trajectory.unmask_step.long().masked_fill(trajectory.tokens == eos_id, -1)
    return steps.max(dim=1).values + 1


def select(
    trajectory: Trajectory,
    strategy: Strategy,
    k: int,
    *,
    limits: Tensor,
    seed: int = 0,
    sequence_ids: Tensor | None = None,
) -> Tensor:
    """Choose up to ``k`` steps of every trajectory.

    Args:
        trajectory: B trajectories of T steps.
        strategy: ``high_entropy``: the k steps of largest entropy, largest first (EGSPO);
            ``uniform``: evenly spaced, the last candidate always in; ``random``: the last
            candidate and k - 1 others; ``all``: every candidate (k is ignored).
        k: in [1, T].
        limits: int64 [B], see :func:`candidate_limits`.
        seed, sequence_ids: key of the noise of ``random``.

    Returns:
        int64 [B, K], -1 where a trajectory has fewer candidates than K.
    """
    steps = trajectory.num_steps
    if not 1 <= k <= steps:
        raise ValueError(f"k must lie in [1, {steps}] (the denoising steps), got {k}")
    if strategy == "high_entropy":
        return select_steps(trajectory.entropy, k, limits=limits)
    if strategy == "all":
        index = torch.arange(steps, device=limits.device).expand(len(trajectory), -1)
        return index.where(index < limits[:, None], -1)
    if strategy == "uniform":
        return _uniform(limits, k)
    if strategy == "random":
        if sequence_ids is None:
            raise ValueError("strategy 'random' needs sequence_ids, the key of its noise")
        priority = counter_uniform(seed ^ _SELECTION_STREAM, 0, sequence_ids, steps)
        last = torch.arange(steps, device=limits.device) == limits[:, None] - 1
        return select_steps(priority.masked_fill(last, 2.0), k, limits=limits)
    raise ValueError(f"unknown strategy {strategy!r}")


def _uniform(limits: Tensor, k: int) -> Tensor:
    """``min(k, limit)`` evenly spaced steps ending at ``limit - 1``."""
    count = limits.clamp(max=k)[:, None]
    index = torch.arange(k, device=limits.device)[None, :]
    step = (index + 1) * limits[:, None] // count.clamp(min=1) - 1
    return step.where(index < count, -1)


def histogram(selected: Tensor, num_steps: int) -> Tensor:
    """int64 [T]: how often each step was selected, padding left out."""
    return torch.bincount(selected[selected >= 0], minlength=num_steps)
