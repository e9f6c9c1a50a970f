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

from egspo_kernels import Surrogate

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


def share(same: int, total: int) -> Part:
    """The part of ``same`` among ``total`` that are counted."""
    return Part("mean", total, float(same), float(same), 1.0)


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


def surrogate_metrics(
    outcomes: list[list[Surrogate]], norms: list[float], drift: Tensor, *, with_kl: bool
) -> dict[str, Any]:
    """What the updates of one iteration did.

    Args:
        outcomes: by optimizer step and micro-batch; a step to which only other processes had
            something to give is an empty list.
        norms: of the gradient, by optimizer step.
        drift: of the first optimizer step, log-probabilities less those that the rollout recorded.
        with_kl: whether there is a reference policy.
    """
    every = [outcome for group in outcomes for outcome in group]

    def of(name: str) -> Tensor:
        return torch.cat([getattr(outcome, name) for outcome in every] or [torch.empty(0)])

    loss = [sum(float(outcome.loss) for outcome in every) / len(outcomes)] if outcomes else []
    return {
        "updates": len(norms),
        "loss": part(torch.tensor(loss)),
        "ratio/mean": part(of("ratio")),
        "ratio/max": part(of("ratio"), "max"),
        # There the policy has not moved: anything but rounding is a defect.
        "ratio/drift": part((drift.exp() - 1).abs(), "max"),
        "ratio/clamped": Count(sum(int(outcome.clamped) for outcome in every)),
        "clip/low": part(of("clipped_low")),
        "clip/high": part(of("clipped_high")),
        "kl": part(of("kl")) if with_kl else None,
        "grad_norm": sum(norms) / len(norms) if norms else None,
    }
