"""95 % confidence intervals of means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959963984540054
_RESAMPLES = 10_000
_CHUNK = 4_000_000
"""Resampled values in memory at a time."""


class Interval(NamedTuple):
    """Of a mean, at 95 %."""

    low: float
    high: float
    method: str
    """``wilson`` or ``bootstrap``."""


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a proportion.

    Never wider than [0, 1], and never empty at 0 or 1, as the normal approximation is.

    Raises:
        ValueError: unless 0 <= successes <= trials and trials >= 1.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(
            f"expected 0 <= successes <= trials and trials >= 1, got {successes} and {trials}"
        )
    share, square = successes / trials, _Z**2
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    half = _Z / (1 + square / trials)
    half *= math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return Interval(max(0.0, centre - half), min(1.0, centre + half), "wilson")


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the mean of ``values``, the same for the same values.

    Args:
        values: of independent prompts; where a prompt has several samples, their mean.
        seed: of the 10,000 resamples.

    Raises:
        ValueError: there are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"the bootstrap needs at least two values, got {len(values)}")
    array, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(array))
    means = [
        array[
            generator.integers(len(array), size=(min(rows, _RESAMPLES - start), len(array)))
        ].mean(1)
        for start in range(0, _RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(low), float(high), "bootstrap")


def interval_of(values: Sequence[Sequence[float]], *, proportion: bool) -> Interval | None:
    """Of the mean over prompts of the mean over their samples; None where the values tell none.

    Samples of one prompt are not independent, prompts are. So where a proportion's prompts are each
    all right or all wrong, it is Wilson's interval of as many trials as prompts; else it is the
    bootstrap over prompts, which needs values that differ.

    Args:
        values: by prompt.
        proportion: whether a value is 1.0 or 0.0 for right or wrong.
    """
    means = [math.fsum(samples) / len(samples) for samples in values]
    if proportion and all(mean in (0.0, 1.0) for mean in means):
        return wilson(round(sum(means)), len(means))
    return bootstrap(means) if len(set(means)) > 1 else None
