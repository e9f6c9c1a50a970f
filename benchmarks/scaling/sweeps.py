"""One size after the other grows by powers of two; costs, and the slope of each against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.iteration.measure import PHASES, Algorithm, Bench, Implementation, flops_at
from benchmarks.iteration.problem import Problem

BASE = Problem(
    d_model=64,
    layers=1,
    heads=4,
    mlp=192,
    vocabulary=2048,
    prompt_tokens=8,
    new_tokens=16,
    steps=16,
    block_length=8,
    prompts=2,
    group_size=2,
    selected_steps=2,
    lora_rank=4,
    micro_batch=4,
    rollout_batch=4,
)
"""For a CPU. The rollout's batch and the micro-batch stay as they are: they bound memory."""

AXES: dict[str, tuple[str, Callable[[Problem, int], Problem]]] = {
    "V": ("vocabulary", lambda p, m: replace(p, vocabulary=p.vocabulary * m)),
    "D": (
        "model width, the MLP with it",
        lambda p, m: replace(p, d_model=p.d_model * m, mlp=p.mlp * m),
    ),
    "T": ("denoising steps", lambda p, m: replace(p, steps=p.steps * m)),
    "L": (
        "new tokens, as many blocks more",
        lambda p, m: replace(p, new_tokens=p.new_tokens * m, steps=p.steps * m),
    ),
    "K": ("selected steps", lambda p, m: replace(p, selected_steps=p.selected_steps * m)),
    "B": ("prompts", lambda p, m: replace(p, prompts=p.prompts * m)),
    "G": ("completions of a prompt", lambda p, m: replace(p, group_size=p.group_size * m)),
}
"""By symbol: what grows, and the problem in which it is ``m`` times as large."""

MULTIPLES = (1, 2, 4)
QUANTITIES = ("seconds", "flops", "peak_bytes")


@dataclass(frozen=True)
class Point:
    """One measurement."""

    axis: str
    multiple: int
    """Of the base problem's size."""
    implementation: Implementation
    phase: str
    """One of the four, or ``iteration``."""
    seconds: float
    flops: int
    peak_bytes: int


def problems(base: Problem, axis: str, multiples: Sequence[int]) -> list[Problem]:
    """``base`` with the size on ``axis`` multiplied.

    A trajectory has no more steps than tokens: on T, ``base`` is the one with the largest multiple.

    Raises:
        ValueError: a multiple does not fit the other sizes.
    """
    if axis == "T":
        base = replace(base, steps=base.steps // max(multiples))
    return [AXES[axis][1](base, multiple) for multiple in multiples]


def measure(
    base: Problem,
    axis: str,
    multiples: Sequence[int],
    implementation: Implementation,
    algorithm: Algorithm,
    device: str,
    repeats: int,
) -> list[Point]:
    """Costs at every multiple; ``repeats`` of the timing, the fastest counts, 0 leaves it out."""
    points = []
    sizes = zip(multiples, problems(base, axis, multiples), strict=True)
    for multiple, problem in sizes:
        bench = Bench(problem, device)
        memory = bench.run(implementation, algorithm, "memory")
        work, phases = bench.work(implementation, algorithm)
        runs = [bench.run(implementation, algorithm, "time") for _ in range(repeats)]
        seconds = {name: min((run[name].seconds for run in runs), default=0.0) for name in phases}
        flops = flops_at(problem, implementation, work)
        peak = {name: cost.peak_bytes for name, cost in memory.items()}
        seconds["iteration"], flops["iteration"] = sum(seconds.values()), sum(flops.values())
        peak["iteration"] = max(peak.values())
        points += [
            Point(axis, multiple, implementation, name, seconds[name], flops[name], peak[name])
            for name in (*PHASES, "iteration")
        ]
    return points


def slope(points: Sequence[Point], quantity: str) -> float | None:
    """Of log cost against log size, by least squares; None where nothing was measured."""
    costs = [getattr(point, quantity) for point in points]
    if min(costs) <= 0:
        return None
    x = [math.log(point.multiple) for point in points]
    y = [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def slopes(points: Sequence[Point]) -> list[dict[str, Any]]:
    """A row for each axis, implementation and phase, with the slope of each quantity."""
    rows = []
    for key in dict.fromkeys((p.axis, p.implementation, p.phase) for p in points):
        chosen = [p for p in points if (p.axis, p.implementation, p.phase) == key]
        row = dict(zip(("axis", "implementation", "phase"), key, strict=True))
        rows.append({**row, **{name: slope(chosen, name) for name in QUANTITIES}})
    return rows
