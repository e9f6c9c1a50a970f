"""Advantages: one per trajectory (EGSPO), or one per selected step (EGSPO-SA).

Groups of G completions of one prompt; R_i is the reward of completion i, V_ik the reward of the
greedy one-step completion of its k-th selected state. EGSPO-SA's return is
``G_ik = R_i + lambda (R_i - V_ik)`` (arXiv 2603.12554).

V_ik depends on the state alone and the group's mean on the other members, up to the member's own
share 1 / G, which scales the gradient by (G - 1) / G and does not turn it. The exception is
``baseline="rank"``: which rank a state has depends on the entropies of later states, which the
action did influence, so that a mean that differs between the ranks biases the gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from egspo.config import AlgorithmConfig

_STD_FLOOR = 1e-6


def lambda_at(config: AlgorithmConfig, update: int, steps: Tensor, num_steps: int) -> Tensor:
    """Lambda for each selected step, float64, shape of ``steps``.

    ``constant``; ``late``: grows linearly from 0 at the first denoising step to lambda at the
    last; ``halving``: halved every ``lam_halving_updates`` updates.
    """
    lam = torch.full_like(steps, config.lam, dtype=torch.float64)
    if config.lam_schedule == "late":
        return lam * steps.clamp(min=0) / max(num_steps - 1, 1)
    if config.lam_schedule == "halving":
        return lam * 0.5 ** (update // config.lam_halving_updates)
    return lam


def egspo_advantages(rewards: Tensor, valid: Tensor, *, scale_by_std: bool = False) -> Tensor:
    """``R_i - mean_j R_j``, the same at every selected step.

    Args:
        rewards: float [P, G]; NaN marks a completion that was not scored: it neither counts in
            the mean nor gets an advantage.
        valid: bool [P, G, K], False at padding.
        scale_by_std: divide by the group's standard deviation.

    Returns:
        float [P, G, K], 0 where not valid.
    """
    returns, scored = rewards[..., None].expand(valid.shape), ~rewards.isnan()
    keep = scored[..., None].expand(valid.shape)
    # A member's reward counts however many steps of it were selected.
    return _centre(returns, keep, scale=scale_by_std).where(valid, 0.0)


def egspo_sa_advantages(
    rewards: Tensor,
    values: Tensor,
    valid: Tensor,
    lam: Tensor,
    *,
    step_rewards: Tensor | None = None,
    normalize_returns: bool = True,
    returns: Literal["joint", "split"] = "joint",
    baseline: Literal["group", "rank"] = "group",
    scale_by_std: bool = False,
) -> Tensor:
    """Stepwise advantages.

    Args:
        rewards: float [P, G]; NaN as in :func:`egspo_advantages`.
        values: float [P, G, K], rewards of the one-step completions; NaN where not scored.
        valid: bool [P, G, K], False at padding.
        lam: float, broadcastable to [P, G, K].
        step_rewards: float [P, G], what ``values`` are compared with where only some of the reward
            functions score one-step completions; ``rewards`` by default.
        normalize_returns: divide by 1 + lambda.
        returns: ``joint``: ``G_ik`` minus a group mean; ``split``:
            ``(R_i - mean_j R_j) + lambda (R_i - V_ik)``, where only the first part is centred.
        baseline: of ``joint``: the mean of the return itself and of the other members' mean
            returns over their ranks (``group``), or the mean over the group at the same rank k
            (``rank``).
        scale_by_std: divide by the standard deviation of the group's returns, of ``rank`` those of
            the same rank.

    Returns:
        float [P, G, K], 0 where not valid or not scored.
    """
    valid = valid & ~values.isnan() & ~rewards[..., None].isnan()
    final = rewards if step_rewards is None else step_rewards
    step_term = lam * (final[..., None] - values)
    if returns == "split":
        result = egspo_advantages(rewards, valid, scale_by_std=scale_by_std) + step_term
        result = result.where(valid, 0.0)
    elif baseline == "rank":
        result = _centre(rewards[..., None] + step_term, valid, scale=scale_by_std)
    else:
        result = _leave_own_out(rewards, rewards[..., None] + step_term, valid, scale_by_std)
    return result / (1 + lam) if normalize_returns else result


def _centre(returns: Tensor, keep: Tensor, *, scale: bool) -> Tensor:
    """``returns`` [P, G, K] minus their mean over the group, over the entries to ``keep`` only;
    exactly 0 where these are all the same."""
    count = keep.sum(1, keepdim=True).clamp(min=1)
    mean = returns.where(keep, 0.0).sum(1, keepdim=True) / count
    low = returns.where(keep, math.inf).amin(1, keepdim=True)
    high = returns.where(keep, -math.inf).amax(1, keepdim=True)
    centred = (returns - mean).where(keep & (high > low), 0.0)
    if scale:
        variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + _STD_FLOOR)
    return centred


def _leave_own_out(rewards: Tensor, returns: Tensor, valid: Tensor, scale: bool) -> Tensor:
    """``returns`` [P, G, K] less the mean of themselves and of the other members' mean returns.

    Of its own trajectory nothing but the return itself is in the mean: returns of other states
    hold what the action influenced. A member without valid entries counts with its reward.
    """
    scored = ~rewards.isnan()
    first = valid.flatten(1).int().argmax(1, keepdim=True)
    pivot = returns.flatten(1).gather(1, first)[..., None]  # so that equal returns give exactly 0
    shifted = (returns - pivot).where(valid, 0.0)
    entries = valid.sum(2)
    member = (shifted.sum(2) / entries.clamp(min=1)).where(
        entries > 0, (rewards - pivot[..., 0]).where(scored, 0.0)
    )
    others = (member.sum(1, keepdim=True) - member)[..., None]
    count = scored.sum(1)[:, None, None].clamp(min=1)
    centred = (shifted - (shifted + others) / count).where(valid, 0.0)
    if scale:
        kept = valid.sum((1, 2), keepdim=True)
        mean = shifted.sum((1, 2), keepdim=True) / kept.clamp(min=1)
        squares = (shifted - mean).where(valid, 0.0).square().sum((1, 2), keepdim=True)
        centred = centred / ((squares / (kept - 1).clamp(min=1)).sqrt() + _STD_FLOOR)
    return centred


def groups_with_spread(rewards: Tensor) -> Tensor:
    """bool [P]: the group's scored rewards differ, so that it has something to teach."""
    high = rewards.nan_to_num(nan=float("-inf")).amax(1)
    low = rewards.nan_to_num(nan=float("inf")).amin(1)
    return high > low
