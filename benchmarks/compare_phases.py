"""Regressions of whole iterations, phase by phase: the suites ``iteration`` and ``scaling``.

:mod:`benchmarks.compare` calls this and says how noise is judged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.result_files import ResultFile, Row

SUITES = ("iteration", "scaling")
OURS, CONTROL = "egspo", "baseline"
WHOLE = "iteration"
SIGMAS = 3.0
FLOPS_LEAST = 1e-3
"""FLOPs are counted: what grows by more than a rounding of the rollout's did more work."""
LEAST_SHARE = 0.01
"""A phase below this share of its iteration is too short to be timed by itself."""


class Cost(NamedTuple):
    """What a phase took; 0 seconds where nothing was timed."""

    seconds: float
    flops: int
    peak_bytes: int


Costs = dict[tuple[str, str], Cost]
"""By size (empty where there is one) and phase, :data:`WHOLE` among them."""


@dataclass
class Group:
    """What ran together: one algorithm of ``iteration``, one axis of ``scaling``."""

    settings: Any = None
    """Sizes and device; two files are only compared where they are the same."""
    ours: Costs = field(default_factory=dict)
    control: Costs = field(default_factory=dict)
    """Of the plain implementation: what changed it is the machine."""
    spread: float = 0.0
    """Standard deviation of log seconds of our iteration, from the quartiles of its rounds."""


def groups_of(file: ResultFile) -> dict[str, Group]:
    """The groups of a file read for one of :data:`SUITES`, by name."""
    groups: dict[str, Group] = {}
    for row in file.rows:
        group = groups.setdefault(row.workload, Group())
        group.settings = (row.info.get("problem") or row.info.get("base"), row.info["device"])
        if row.implementation == OURS:
            group.ours, group.spread = costs_of(row), row.spread
        elif row.implementation == CONTROL:
            group.control = costs_of(row)
    return groups


def costs_of(row: Row) -> Costs:
    """Costs of one implementation, by size and phase."""
    if "points" in row.info:
        return {
            (f"x{point['multiple']}", point["phase"]): _cost(point) for point in row.info["points"]
        }
    phases = {name: _cost(cost) for name, cost in row.info["phases"].items()}
    whole = Cost(
        sum(cost.seconds for cost in phases.values()),
        sum(cost.flops for cost in phases.values()),
        max(cost.peak_bytes for cost in phases.values()),
    )
    return {("", name): cost for name, cost in (*phases.items(), (WHOLE, whole))}


def _cost(values: Mapping[str, Any]) -> Cost:
    return Cost(values["seconds"], values["flops"], values["peak_bytes"])


def regressions(
    before: ResultFile, after: ResultFile, least: float, *, controlled: bool
) -> Iterator[tuple[str, list[str]]]:
    """Every case, a phase of a group, and what became worse in it, in words.

    Args:
        before, after: files read for the same suite.
        least: the smallest share of time or memory that counts.
        controlled: whether the plain implementation speaks for the machine; otherwise its changes
            only widen the noise.

    Raises:
        ValueError: a group was measured at other sizes, or on another device.
    """
    new = groups_of(after)
    for name, group in groups_of(before).items():
        other = new.get(name, Group())
        if other.ours and other.settings != group.settings:
            raise ValueError(
                f"{name} was measured at other sizes: {group.settings} and {other.settings}"
            )
        drift, disagreement = machine_of(group, other)
        drift = drift if controlled else 0.0
        noise = max(SIGMAS * math.hypot(group.spread, other.spread), disagreement)
        for place, cost in group.ours.items():
            label = ", ".join(filter(None, (name, *place)))
            timed = is_timed(group.ours, place)
            yield label, _worse(cost, other.ours.get(place), timed, drift, noise, least)


def machine_of(before: Group, after: Group) -> tuple[float, float]:
    """Median change of the control's phases in log seconds, and their largest less the smallest."""
    changes = [
        math.log(after.control[place].seconds / cost.seconds)
        for place, cost in before.control.items()
        if is_timed(before.control, place) and is_timed(after.control, place)
    ]
    return (statistics.median(changes), max(changes) - min(changes)) if changes else (0.0, 0.0)


def is_timed(costs: Costs, place: tuple[str, str]) -> bool:
    """Whether the phase is there, was timed, and is long enough for its time to mean something."""
    if place not in costs:
        return False
    whole = costs[place[0], WHOLE].seconds
    return whole > 0 and costs[place].seconds >= LEAST_SHARE * whole


def _worse(
    before: Cost, after: Cost | None, timed: bool, drift: float, noise: float, least: float
) -> list[str]:
    if after is None:
        return ["did not run"]
    found = []
    if timed and after.seconds > 0:
        slower = math.log(after.seconds / before.seconds) - drift
        allowed = max(math.log1p(least), noise)
        if slower > allowed:
            found.append(
                f"{math.exp(slower):.2f}x slower than the machine, which changed by "
                f"{math.exp(drift):.2f}x; noise is up to {math.exp(allowed):.2f}x"
            )
    if after.flops > (1 + FLOPS_LEAST) * before.flops:
        found.append(f"FLOPs {before.flops:.4g} -> {after.flops:.4g}")
    if after.peak_bytes > (1 + least) * before.peak_bytes + 1024:
        found.append(
            f"peak memory {before.peak_bytes / 2**20:.1f} -> {after.peak_bytes / 2**20:.1f} MiB"
        )
    return found
