"""Step selection: which denoising steps of a trajectory are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from egspo.config import Strategy
from egspo.rollouts.trajectory import NEVER, Trajectory
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
    entropy_share: float | None = None,
    advantage: Tensor | None = None,
    seed: int = 0,
    sequence_ids: Tensor | None = None,
    step_id: int = 0,
) -> Tensor:
    """Choose up to ``k`` steps of every trajectory.

    Args:
        trajectory: B trajectories of T steps.
        strategy: ``high_entropy``: the k steps of largest entropy, largest first (EGSPO);
            ``uniform``: evenly spaced, the last candidate always in; ``random``: the last
            candidate and k - 1 others; ``all``: every candidate (k is ignored);
            ``sign_aware``: the k least confident steps of a trajectory with an advantage >= 0, the
            k most confident ones with one < 0, see :func:`step_confidence`. The published
            code's: ``uniform_reference``, see :func:`_spread`; ``random_reference``: k - 1 of the
            other candidates, with replacement, the same for all trajectories of a training step,
            and the last.
        k: in [1, T].
        limits: int64 [B], see :func:`candidate_limits`.
        entropy_share: of ``high_entropy``, see :func:`select_share`.
        advantage: [B], of the trajectories; needed by ``sign_aware``.
        seed, sequence_ids: key of the noise of ``random``.
        step_id: instead of ``sequence_ids``, that of ``random_reference``.

    Returns:
        int64 [B, K], -1 where a trajectory has fewer candidates than K.
    """
    steps = trajectory.num_steps
    if not 1 <= k <= steps:
        raise ValueError(f"k must lie in [1, {steps}] (the denoising steps), got {k}")
    if entropy_share is not None:
        if strategy != "high_entropy":
            raise ValueError(f"entropy_share needs strategy 'high_entropy', got {strategy!r}")
        return select_share(trajectory.entropy, entropy_share, k, limits=limits)
    if strategy == "high_entropy":
        return select_steps(trajectory.entropy, k, limits=limits)
    if strategy == "sign_aware":
        return select_steps(_by_sign(trajectory, advantage), k, limits=limits)
    if strategy == "all":
        index = torch.arange(steps, device=limits.device).expand(len(trajectory), -1)
        return index.where(index < limits[:, None], -1)
    if strategy == "uniform":
        return _uniform(limits, k)
    if strategy == "uniform_reference":
        return _spread(limits, k)
    if strategy == "random_reference":
        return _shared(limits, k, seed ^ _SELECTION_STREAM, step_id)
    if strategy == "random":
        if sequence_ids is None:
            raise ValueError("strategy 'random' needs sequence_ids, the key of its noise")
        priority = counter_uniform(seed ^ _SELECTION_STREAM, 0, sequence_ids, steps)
        last = torch.arange(steps, device=limits.device) == limits[:, None] - 1
        return select_steps(priority.masked_fill(last, 2.0), k, limits=limits)
    raise ValueError(f"unknown strategy {strategy!r}")


def _by_sign(trajectory: Trajectory, advantage: Tensor | None) -> Tensor:
    """What ``sign_aware`` selects the largest of: [B, T]."""
    if advantage is None:
        raise ValueError("strategy 'sign_aware' needs the advantages of the trajectories")
    confidence = step_confidence(trajectory)
    return confidence * torch.where(advantage < 0, 1.0, -1.0).to(confidence)[:, None]


def step_confidence(trajectory: Trajectory) -> Tensor:
    """Mean probability of the tokens that each step revealed: [B, T], 0 where it revealed none."""
    revealed = trajectory.unmask_step != NEVER
    step = trajectory.unmask_step.long().masked_fill(~revealed, 0)
    empty = trajectory.confidence.new_zeros(len(trajectory), trajectory.num_steps)
    known = trajectory.confidence.masked_fill(~revealed, 0.0)
    total = empty.scatter_add(1, step, known)
    return total / empty.scatter_add(1, step, revealed.to(known)).clamp(min=1)


def select_share(entropy: Tensor, share: float, most: int, *, limits: Tensor) -> Tensor:
    """The fewest steps of largest entropy that hold a share of the entropy of the candidates.

    NaN counts as no entropy; a row without any selects no step.

    Args:
        entropy: float32 or float64 [B, T], nats.
        share: in (0, 1].
        most: in [0, T], steps of a row, even where they hold less.
        limits: int64 [B], see :func:`candidate_limits`.

    Returns:
        int64 [B, ``most``], the largest first, -1 beyond the steps that are needed.
    """
    order = select_steps(entropy, entropy.shape[1], limits=limits)
    values = entropy.double().gather(1, order.clamp(min=0)).masked_fill(order < 0, 0.0)
    # Summed in the order of the selection, so that rounding cannot ask for more than there is.
    held = values.nan_to_num(nan=0.0).cumsum(1)
    before = F.pad(held[:, :-1], (1, 0))
    return order.masked_fill(before >= share * held[:, -1:], -1)[:, :most]


def _uniform(limits: Tensor, k: int) -> Tensor:
    """``min(k, limit)`` evenly spaced steps ending at ``limit - 1``."""
    count = limits.clamp(max=k)[:, None]
    index = torch.arange(k, device=limits.device)[None, :]
    step = (index + 1) * limits[:, None] // count.clamp(min=1) - 1
    return step.where(index < count, -1)


def _spread(limits: Tensor, k: int) -> Tensor:
    """The last candidate, and before it ``k - 1`` evenly spaced ones from the first to the last
    but one, rounded down; every candidate of a row with at most ``k``. Ascending."""
    rows = limits.new_full((len(limits), k), -1)
    for limit in sorted(set(limits.tolist())):
        steps = torch.arange(min(limit, k))
        if limit > k:
            # In float32, as published: another rounding could choose another step.
            spaced = torch.linspace(0, limit - 2, k - 1).long()
            steps = torch.cat([spaced, torch.tensor([limit - 1])])
        rows[limits == limit, : len(steps)] = steps.to(rows)
    return rows


def _shared(limits: Tensor, k: int, seed: int, step_id: int) -> Tensor:
    """``k - 1`` candidates before the last, with replacement and the same for rows of the same
    limit, and the last."""
    last = limits[:, None] - 1  # also how many there are before it
    if k == 1:
        return last
    key = torch.tensor([step_id], device=limits.device)
    draws = counter_uniform(seed, 0, key, k - 1).double()
    others = (draws * last).long().minimum(last - 1)
    return torch.cat([others.where(last > 0, -1), last], dim=1)


def histogram(selected: Tensor, num_steps: int) -> Tensor:
    """int64 [T]: how often each step was selected, padding left out."""
    return torch.bincount(selected[selected >= 0], minlength=num_steps)
