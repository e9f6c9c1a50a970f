"""Advantages: one per trajectory (EGSPO), or one per selected step (EGSPO-SA).

Groups of G completions of one prompt; R_i is the reward of completion i, V_ik the reward of the
greedy one-step completion of its k-th selected state. EGSPO-SA's return is
``G_ik = R_i + lambda (R_i - V_ik)`` (arXiv 2603.12554).

V_ik depends on the state alone and the group mean on the other members, up to the member's own
share 1 / G, which scales the gradient by (G - 1) / G and does not turn it. The exception is
``baseline="group"``: its own share holds V of *later* states, which the action did influence, a
bias of order lambda / G that ``"rank"`` does not have.
"""

from __future__ import annotations

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
    returns = rewards[..., None].expand(valid.shape)
    return _centre(returns, valid, scored=~rewards.isnan(), over="rank", scale=scale_by_std)


def egspo_sa_advantages(
    rewards: Tensor,
    values: Tensor,
    valid: Tensor,
    lam: Tensor,
    *,
    step_rewards: Tensor | None = None,
    normalize_returns: bool = True,
    returns: Literal["joint", "split"] = "joint",
    baseline: Literal["rank", "group"] = "rank",
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
        baseline: of ``joint``: the mean over the group at the same rank k (``rank``), or over all
            ranks too (``group``).
        scale_by_std: divide by the standard deviation of what the baseline averages.

    Returns:
        float [P, G, K], 0 where not valid or not scored.
    """
    valid = valid & ~values.isnan()
    scored = ~rewards.isnan()
    final = rewards if step_rewards is None else step_rewards
    step_term = lam * (final[..., None] - values)
    if returns == "split":
        result = egspo_advantages(rewards, valid, scale_by_std=scale_by_std) + step_term
        result = result.where(valid & scored[..., None], 0.0)
    else:
        result = _centre(
            rewards[..., None] + step_term, valid, scored=scored, over=baseline, scale=scale_by_std
        )
    return result / (1 + lam) if normalize_returns else result


def _centre(
    returns: Tensor, valid: Tensor, *, scored: Tensor, over: Literal["group", "rank"], scale: bool
) -> Tensor:
    """``returns`` minus their mean over the group, over valid and scored entries only."""
    keep = valid & scored[..., None]
    dims = (1, 2) if over == "group" else (1,)
    count = keep.sum(dims, keepdim=True).clamp(min=1)
    mean = returns.where(keep, 0.0).sum(dims, keepdim=True) / count
    centred = (returns - mean).where(keep, 0.0)
    if scale:
        variance = centred.square().sum(dims, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + _STD_FLOOR)
    return centred


def groups_with_spread(rewards: Tensor) -> Tensor:
    """bool [P]: the group's scored rewards differ, so that it has something to teach."""
    high = rewards.nan_to_num(nan=float("-inf")).amax(1)
    low = rewards.nan_to_num(nan=float("inf")).amin(1)
    return high > low
