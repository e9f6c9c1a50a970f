"""Metrics of several processes made one, exactly: no mean of means.

A process gives :class:`Part` (of a mean, a maximum and so on) or :class:`Count` instead of a
finished number wherever processes hold different values, and :func:`merge` finishes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

How = Literal["mean", "rms", "std", "max"]


class Part(NamedTuple):
    """What one process knows of a statistic over values that all processes share."""

    how: How
    number: int
    total: float
    squares: float
    largest: float


class Count(NamedTuple):
    """Something counted; the counts of all processes add up."""

    value: int


def part(values: Tensor, how: How = "mean") -> Part:
    """The part of ``values``, of any shape; NaN marks what does not apply and is left out.

    Args:
        values: numbers or booleans.
        how: ``mean``; ``rms``: root of the mean square; ``std``: population standard deviation;
            ``max``.
    """
    kept = values.detach().double().flatten()
    kept = kept[~kept.isnan()]
    if not kept.numel():
        return Part(how, 0, 0.0, 0.0, -math.inf)
    total, squares, largest = torch.stack([kept.sum(), kept.square().sum(), kept.max()]).tolist()
    return Part(how, kept.numel(), total, squares, largest)


def merge(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record from those of all processes.

    Parts are joined and counts added; so are lists (histograms), column by column. ``time/`` and
    ``memory/`` are the largest of a process, ``speed/`` the sum. Anything else is the same in every
    process. A statistic over no values is None.
    """
    merged: dict[str, Any] = {}
    for name in {name: None for record in records for name in record}:
        values = [record[name] for record in records if name in record]
        if isinstance(values[0], Part):
            merged[name] = _join(values)
        elif isinstance(values[0], Count):
            merged[name] = sum(count.value for count in values)
        elif isinstance(values[0], list):
            merged[name] = [sum(column) for column in zip(*values, strict=True)]
        elif name.startswith(("time/", "memory/")):
            merged[name] = max(values)
        elif name.startswith("speed/"):
            merged[name] = sum(values)
        else:
            merged[name] = values[0]
    return merged


def _join(parts: Sequence[Part]) -> float | None:
    number = sum(part.number for part in parts)
    if number == 0:
        return None
    if parts[0].how == "max":
        return max(part.largest for part in parts)
    mean = math.fsum(part.total for part in parts) / number
    if parts[0].how == "mean":
        return mean
    square = math.fsum(part.squares for part in parts) / number
    centre = mean * mean if parts[0].how == "std" else 0.0
    return math.sqrt(max(square - centre, 0.0))
