"""What a run came to: the best step, whether it was still getting better, what more would cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from egspo.runs.checkpoint import CHECKPOINTS, list_checkpoints, step_of
from egspo.training.best import HELD_OUT, BestSoFar
from egspo.training.progress import duration

_LEAST = 4
"""Evaluations that a trend is told from; it is of the later half of them, or of so many."""
_SURE = 2.0
"""Standard errors that a slope must be away from zero."""

Record = Mapping[str, Any]


def outcome(output: Path, final: Path, records: Sequence[Record], gpus: int) -> list[str]:
    """Lines for the end of a run.

    Args:
        output: its folder.
        final: the trained model in it.
        records: its metrics.
        gpus: that it ran on; 0 for none.
    """
    lines = []
    for name, label in ((HELD_OUT, "held-out reward"), ("eval/solved", "held-out solved")):
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            lines.append(f"{label}: {values[0]:.3f} -> {values[-1]:.3f}")
    last = int(records[-1]["step"]) if records else 0
    best = BestSoFar.of(records)
    if best.step is not None:
        lines.append(_best(best, output, final, last))
        lines.append(f"curve: {_trend(records)}")
    cost = _cost(records, last, gpus)
    return [*lines, *([cost] if cost else []), f"model: {final}"]


def _best(best: BestSoFar, output: Path, final: Path, last: int) -> str:
    assert best.step is not None
    kept = {step_of(folder): folder for folder in list_checkpoints(output / CHECKPOINTS)}
    where: Path | str = final if best.step == last else kept.get(best.step, "")
    if best.step == 0:
        where = "before training"
    return (
        f"best held-out reward: {best.reward:.3f} at step {best.step} "
        f"({where or 'not kept: checkpoint.keep_best is off'})"
    )


def _trend(records: Sequence[Record]) -> str:
    """Of the later evaluations, by the least-squares slope and its standard error."""
    points = [(r["step"], r[HELD_OUT]) for r in records if r.get(HELD_OUT) is not None]
    if len(points) < _LEAST:
        return f"{len(points)} evaluations do not tell whether the held-out reward still rises"
    points = points[-max(_LEAST, len(points) // 2) :]
    steps, values = [float(step) for step, _ in points], [float(value) for _, value in points]
    x, y = fmean(steps), fmean(values)
    spread = math.fsum((s - x) ** 2 for s in steps)
    slope = math.fsum((s - x) * (v - y) for s, v in zip(steps, values, strict=True)) / spread
    rest = math.fsum((v - y - slope * (s - x)) ** 2 for s, v in zip(steps, values, strict=True)) / (
        len(points) - 2
    )
    error = math.sqrt(rest / spread)
    over = f"over the last {len(points)} evaluations (steps {points[0][0]} to {points[-1][0]})"
    per = f"{slope * 100:+.3g} +- {error * 100:.2g} per 100 steps"
    if abs(slope) <= _SURE * error or slope == 0:
        return f"the held-out reward neither rises nor falls beyond its noise {over}: {per}"
    if slope > 0:
        return f"the held-out reward still rises {over}: {per}"
    return f"the held-out reward falls {over}: {per}; take the best step"


def _cost(records: Sequence[Record], last: int, gpus: int) -> str:
    """Of as many steps again, by the median step, and evaluations as often as before."""
    # The first step also compiles, allocates and fills caches.
    made = [r for r in records if r["step"] > 1] or [r for r in records if r["step"] == 1]
    if not made:
        return ""
    evaluated = [r["time/eval"] for r in made if r.get("time/eval")]
    steps = median(r["time/step"] - (r.get("time/eval") or 0.0) for r in made)
    each = steps + math.fsum(evaluated) / len(made)
    seconds = each * last
    hours = seconds * gpus / 3600
    devices = f", {hours:.3g} GPU-hours on {gpus} GPU(s)" if gpus else ""
    return (
        f"more: training for {last} further step(s) would take about {duration(seconds)}{devices}, "
        f"at the measured {each:.3g} s a step (--resume steps={2 * last})"
    )
