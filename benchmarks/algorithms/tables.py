"""Tables and the plot of the learning study, from its result files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.algorithms.results import Comparison, compare
from benchmarks.algorithms.statistics import MOST_SEEDS, Estimate
from benchmarks.algorithms.study import OPTIMIZERS, TASKS
from benchmarks.markdown import made_on, table
from egspo.inspection.plotting import STYLE, mean_interval, save_figure

PLOT = "studies-learning.png"
COLOURS = ("#d9772b", "#2f6db3", "#3a9267", "#7e61a8", "#6b7280", "#c0504d", "#8c6d4f")
FEWEST = 5
"""Seeds below which nobody is named."""


def section(contents: Sequence[Mapping[str, Any]]) -> str:
    """Everything of the study in Markdown."""
    parts = [f"![Held-out reward against FLOPs]({PLOT})", *map(_task, contents)]
    return "\n\n".join(parts)


def _task(content: Mapping[str, Any]) -> str:
    settings = content["settings"]
    parts = [
        f"### {TASKS[content['task']].task.title}",
        f"`recipes/{content['recipe']}.yaml`, {settings['steps']} steps of "
        f"{settings['prompts_per_step']} prompts x {settings['group_size']} completions of "
        f"{settings['denoising_steps']} denoising steps, evaluated on {settings['held_out']} "
        "held-out prompts.",
    ]
    for optimizer in OPTIMIZERS:
        budgets, rows = compare(content, optimizer)
        if rows:
            parts += [_rows(optimizer, budgets, rows), verdict(rows)]
    left = content["left_out"]
    if left:
        parts.append(f"Left out for want of time: {len(left)} runs, listed in the result file.")
    parts.append(made_on(content, [r["commit"] for arm in content["arms"] for r in arm["runs"]]))
    return "\n\n".join(parts)


def _rows(optimizer: str, budgets: Mapping[str, float], rows: Sequence[Comparison]) -> str:
    head = [
        optimizer,
        *("seeds", "learning rate", "TFLOP", "reward at the end"),
        f"mean reward over {budgets['flops'] / 1e12:.3g} TFLOP",
        "less that of high_entropy",
        f"the same over {budgets['seconds']:.0f} s",
        "seeds to see half of it",
    ]
    lines = []
    for row in rows:
        flops, seconds = row.paired["flops"], row.paired["seconds"]
        needed = "" if flops is None else row.seeds_needed or f"> {MOST_SEEDS}"
        lines.append(
            [
                row.arm.name,
                str(row.seeds),
                f"{row.rate:g}" + ("" if row.tuned else ", not tuned"),
                f"{row.flops / 1e12:.3g}",
                plus_minus(row.end),
                plus_minus(row.area),
                "" if flops is None else plus_minus(flops, sign=True),
                "" if seconds is None else plus_minus(seconds, sign=True),
                str(needed) if row.seeds > 1 else "",
            ]
        )
    return table(head, lines)


def verdict(rows: Sequence[Comparison]) -> str:
    """Which differences from the steps of largest entropy are larger than seeds explain."""
    named: dict[str, list[str]] = {"above": [], "below": [], "not separated from": []}
    few = []
    for row in rows:
        paired = row.paired["flops"]
        if paired is None:
            continue
        if row.seeds < FEWEST:
            few.append(row.arm.name)
            continue
        where = {1: "above", -1: "below", 0: "not separated from"}[paired.sign]
        named[where].append(row.arm.name)
    count = sum(map(len, named.values()))
    parts = [
        f"{where} it: {'; '.join(f'*{name}*' for name in names)}"
        for where, names in named.items()
        if names
    ]
    said = (
        "Against `high_entropy` with the same K and λ, by the 95 % interval of the difference "
        f"over FLOPs, seed by seed, not corrected for there being {count}: "
        + ". ".join(parts)
        + "."
        if parts
        else "Nothing is judged against `high_entropy` here."
    )
    if few:
        said += f" With fewer than {FEWEST} seeds, not judged: " + "; ".join(few) + "."
    return said


def plus_minus(value: Estimate, digits: int = 3, sign: bool = False) -> str:
    """``0.713 ± 0.021``."""
    text = f"{value.mean:{'+' if sign else ''}.{digits}f}"
    return text if value.high is None else f"{text} ± {value.high - value.mean:.{digits}f}"


def draw(contents: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Held-out reward against FLOPs and against seconds: means and 95 % intervals over seeds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(12, 4.2 * len(contents)), dpi=110, layout="constrained")
        grid = figure.subplots(len(contents), 2, squeeze=False)
        labels = {"flops": ("TFLOP", 1e12), "seconds": ("seconds", 1.0)}
        for panels, content in zip(grid, contents, strict=True):
            for axes, (cost, (label, unit)) in zip(panels, labels.items(), strict=True):
                for place, arm in enumerate(each for each in content["arms"] if each["runs"]):
                    _curve(axes, arm, cost, unit, place)
                axes.set(
                    title=TASKS[content["task"]].task.title,
                    xlabel=f"{label} of rollout, scoring and update",
                    ylabel="held-out reward",
                )
            panels[0].legend(loc="best", fontsize=7)
        return save_figure(figure, folder / PLOT)


def _curve(axes: Any, arm: Mapping[str, Any], cost: str, unit: float, place: int) -> None:
    columns = list(zip(*(run["points"] for run in arm["runs"]), strict=False))
    x = [statistics.fmean(point[cost] / unit for point in column) for column in columns]
    found = [mean_interval([point["reward"] for point in column]) for column in columns]
    mean, half = [m for m, _ in found], [h or 0.0 for _, h in found]
    colour = COLOURS[place % len(COLOURS)]
    line = "-" if arm["optimizer"] == "adamw" else "--"
    k = "" if arm["k"] is None else f", K = {arm['k']}"
    lam = "" if arm["lam"] is None else f", λ = {arm['lam']:g}"
    label = f"{arm['method']}{k}{lam}, {arm['optimizer']}"
    axes.plot(x, mean, line, color=colour, marker="o", markersize=3, label=label)
    low, high = ([m + s * h for m, h in zip(mean, half, strict=True)] for s in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
