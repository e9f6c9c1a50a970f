"""Areas under learning curves, differences seed by seed, and how many seeds would tell."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from egspo.inspection.plotting import mean_interval, t_quantile

_POWER = 0.8416212335729143
"""80 % quantile of the normal distribution."""
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the ends of its 95 % Student interval; None where there is no such
    end."""

    mean: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """1 or -1 where the interval is on one side of zero, else 0."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return 0
        return 1 if self.low > 0 else -1


def estimate(values: Iterable[float]) -> Estimate:
    """Of at least one value."""
    mean, half = mean_interval(list(values))
    return Estimate(mean, None, None) if half is None else Estimate(mean, mean - half, mean + half)


def area(costs: Sequence[float], rewards: Sequence[float], budget: float) -> float:
    """Mean reward while ``budget`` is spent: the area under the curve over ``[0, budget]`` divided
    by its width. The curve is linear between evaluations.

    Args:
        costs: what was spent at each evaluation, increasing from 0.
        rewards: there.
        budget: > 0, at most the last cost.

    Raises:
        ValueError: the curve does not begin at 0 or does not reach ``budget``.
    """
    if not costs or costs[0] != 0 or not 0 < budget <= costs[-1]:
        raise ValueError(
            f"the curve must begin at 0 and reach the budget {budget:.4g}, got {list(costs)}"
        )
    total = 0.0
    for left, right, before, after in zip(costs, costs[1:], rewards, rewards[1:], strict=False):
        if left >= budget:
            break
        end = min(right, budget)
        at_end = before + (after - before) * (end - left) / (right - left)
        total += (end - left) * (before + at_end) / 2
    return total / budget


def differences(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """``one`` less ``other`` by seed, of the seeds that both have."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def seeds_needed(found: Sequence[float]) -> int | None:
    """Paired seeds with which half of the mean difference would be told from zero.

    By a two-sided t test at 5 % with a power of 80 %: the least n with
    ``sqrt(n) |mean| / 2 >= (t(n - 1) + z(0.8)) s``.

    Returns:
        None where fewer than two differences were seen, or more than :data:`MOST_SEEDS` are needed.
    """
    if len(found) < 2:
        return None
    half, spread = abs(statistics.fmean(found)) / 2, statistics.stdev(found)
    if half == 0:
        return None
    low, high = 2, MOST_SEEDS
    if not _tells(high, half, spread):
        return None
    while low < high:  # more seeds never tell less
        middle = (low + high) // 2
        low, high = (low, middle) if _tells(middle, half, spread) else (middle + 1, high)
    return low


def _tells(seeds: int, half: float, spread: float) -> bool:
    return math.sqrt(seeds) * half >= (t_quantile(seeds - 1) + _POWER) * spread
