"""Figures: the curves of a run, and methods compared over seeds."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from egspo.config.convert import ConfigError
from egspo.config.recipe import load_config
from egspo.files import replacing
from egspo.runs.metrics import read_metrics

Records = Sequence[Mapping[str, Any]]
PathLike = str | os.PathLike[str]
Spent = Literal["step", "flops", "seconds"]
"""RL steps; FLOPs of rollout, scoring and update; processor-seconds of training, without held-out
evaluation."""

_BLUE, _ORANGE, _GREEN, _PURPLE, _RED = "#2f6db3", "#d9772b", "#3a9267", "#7e61a8", "#c0504d"
_COLOURS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _RED, "#4f9db0", "#8c6d4f", "#6b7280")
_INK, _GREY = "#24292f", "#8b949e"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
}
_DPI = 120
_WIDTH = 10.0  # inches: 1200 pixels


@dataclass(frozen=True)
class ComparisonRow:
    """Held-out results of a method at its last step: means over seeds, 95% half-widths."""

    method: str
    seeds: int
    reward: float
    reward_interval: float | None
    """None with one seed."""
    solved: float | None
    """None where the task has no notion of solved."""
    solved_interval: float | None
    tflops: float | None
    """Of rollout, scoring and update together, mean over seeds; None where not counted."""
    seconds: float | None
    """Of processors, in training, mean over seeds; None where not measured."""


def plot_run(run: PathLike, png_path: PathLike) -> Path:
    """Draw the curves of a run; keys that the metrics lack are left out.

    Args:
        run: the metrics file, or the folder of the run.
        png_path: written atomically.

    Raises:
        FileNotFoundError: there are no metrics.
        ValueError: they are empty, or damaged other than by a torn last line.
    """
    run = Path(run)
    records = read_metrics(run)
    if not records:
        raise ValueError(f"the metrics of {run} have no complete record yet")
    with rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 5.8), dpi=_DPI, layout="constrained")
        _title(figure, run if run.is_dir() else run.parent)
        grid = figure.add_gridspec(2, 4, height_ratios=[1.25, 1])
        _held_out(figure.add_subplot(grid[0, :2]), records)
        _training_reward(figure.add_subplot(grid[0, 2:]), records)
        _selected_steps(figure.add_subplot(grid[1, 0]), records)
        entropy = {"entropy/mean": "all steps", "selected/entropy": "selected"}
        _curves(figure.add_subplot(grid[1, 1]), "Step entropy, nats", records, entropy)
        clipping = {"kl": "KL, nats", "clip/low": "clipped low", "clip/high": "clipped high"}
        title = "KL and clipping" if any(_series(records, "kl")[1]) else "Clipped share"
        _curves(figure.add_subplot(grid[1, 2]), title, records, clipping)
        _curves(figure.add_subplot(grid[1, 3]), "Gradient norm", records, {"grad_norm": "norm"})
        return save_figure(figure, Path(png_path))


def plot_comparison(
    groups: Mapping[str, Sequence[PathLike]],
    png_path: PathLike,
    *,
    title: str = "",
    x: Sequence[Spent] = ("step",),
) -> list[ComparisonRow]:
    """Draw held-out reward per method: the mean over seeds and its 95% t-interval.

    Args:
        groups: runs (folders or metrics files) by method, one for each seed.
        png_path: written atomically.
        title: of the figure.
        x: what rewards are drawn against, a panel each. Without ``step`` methods may end at
            different steps.

    Returns:
        The results at the last step, in the order of ``groups``.

    Raises:
        FileNotFoundError: a run has no metrics.
        ValueError: no runs, a run without held-out reward, or runs that ended at different steps.
    """
    if not groups or not all(groups.values()):
        raise ValueError(f"every method needs at least one run, got {dict(groups)}")
    loaded = {method: [read_metrics(run) for run in runs] for method, runs in groups.items()}
    together = [groups] if "step" in x else [{method: runs} for method, runs in groups.items()]
    for compared in together:
        _check_same_end(compared, loaded)
    with rc_context(STYLE):
        width = _WIDTH * (0.7 if len(x) == 1 else 0.55 * len(x))
        figure = Figure(figsize=(width, 4.4), dpi=_DPI, layout="constrained")
        panels = figure.subplots(1, len(x), squeeze=False, sharey=True)[0]
        for axes, spent in zip(panels, x, strict=True):
            _compared(axes, loaded, spent, title if axes is panels[0] else "")
        panels[0].set_ylabel("held-out reward, mean and 95% interval")
        panels[0].legend(loc="best")
        save_figure(figure, Path(png_path))
    return [_row(method, runs) for method, runs in loaded.items()]


def _compared(axes: Axes, loaded: Mapping[str, Sequence[Records]], x: Spent, title: str) -> None:
    """Held-out reward of every method against one kind of cost."""
    mean: list[float] = []
    for number, (method, runs) in enumerate(loaded.items()):
        steps, mean, low, high = _band([_series(records, "eval/reward") for records in runs])
        colour = _COLOURS[number % len(_COLOURS)]
        seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
        spent = [_spent(records, x) for records in runs]
        places = [statistics.fmean(run[step] for run in spent) for step in steps]
        axes.plot(places, mean, color=colour, **_marker(steps), label=f"{method} ({seeds})")
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    _finish(axes, title, mean, xlabel=_UNITS[x])
    if x != "step":
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto"))


def comparison_table(rows: Sequence[ComparisonRow]) -> str:
    """``rows`` as a Markdown table."""
    lines = [
        "| Method | Seeds | TFLOP | Processor-seconds | Held-out reward | Solved |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        spent = "-" if row.tflops is None else f"{row.tflops:.3g}"
        seconds = "-" if row.seconds is None else f"{row.seconds:.0f}"
        reward = _plus_minus(row.reward, row.reward_interval, 3)
        solved = "-"
        if row.solved is not None:
            half = None if row.solved_interval is None else 100 * row.solved_interval
            solved = f"{_plus_minus(100 * row.solved, half, 1)} %"
        lines.append(f"| {row.method} | {row.seeds} | {spent} | {seconds} | {reward} | {solved} |")
    return "\n".join(lines) + "\n"


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half-width of its 95% Student interval (None for a single value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, t_quantile(len(values) - 1) * error


# 97.5% quantile of Student's t for 1 to 10 degrees of freedom.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def t_quantile(degrees: int) -> float:
    """97.5% quantile; beyond the table by Cornish-Fisher expansion, right to 3e-4."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def _title(figure: Figure, folder: Path) -> None:
    """Name of the run, and what it is, where its config.yaml says so."""
    name = folder.resolve().name
    figure.suptitle(name, x=0.012, ha="left", fontsize=13, fontweight="bold")
    try:
        config = load_config(folder / "config.yaml")
    except (FileNotFoundError, ConfigError):  # metrics alone, or a run of another version
        return
    algorithm = config.algorithm
    method: str = algorithm.preset or ("egspo-sa" if algorithm.stepwise else "egspo")
    trained = f"{algorithm.selected_steps} of {config.generation.steps} steps trained"
    if algorithm.objective != "stepwise":
        method, trained = algorithm.objective, f"{algorithm.num_iterations} updates"
    parts = (
        f"{method} on {config.task.name}",
        f"{config.prompts_per_step} prompts of {algorithm.group_size} completions",
        trained,
        f"seed {config.seed}",
    )
    figure.text(0.988, 0.985, " · ".join(parts), ha="right", va="top", fontsize=9, color="#57606a")


def _held_out(axes: Axes, records: Records) -> None:
    """Reward and solve rate, each with the value it started from."""
    plotted = []
    for key, label, colour in (
        ("eval/reward", "reward", _BLUE),
        ("eval/solved", "solved", _GREEN),
    ):
        steps, values = _series(records, key)
        if not values:
            continue
        plotted += values
        axes.axhline(values[0], color=colour, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6)
        change = f"{values[0]:.3f} → {values[-1]:.3f}" if len(values) > 1 else f"{values[0]:.3f}"
        axes.plot(steps, values, color=colour, **_marker(steps), label=f"{label}  {change}")
    _finish(axes, "Held-out (dashed: first value)", plotted)
    if plotted and min(plotted) >= 0 and max(plotted) <= 1:
        axes.set_ylim(-0.02, 1.02)
    if plotted:
        axes.legend(loc="best")


def _training_reward(axes: Axes, records: Records) -> None:
    steps, values = _series(records, "reward/mean")
    window = _smoothed(axes, steps, values, _BLUE, "reward")
    title = "Training reward" + (f" (mean of {window} steps)" if window > 1 else "")
    _finish(axes, title, values)


def _selected_steps(axes: Axes, records: Records) -> None:
    counts = [record["selected/histogram"] for record in records if "selected/histogram" in record]
    totals = [sum(column) for column in zip(*counts, strict=True)] if counts else []
    share = [count / sum(totals) for count in totals] if sum(totals) else []
    axes.bar(range(len(share)), share, width=0.85 if len(share) < 40 else 1.0, color=_PURPLE)
    _finish(axes, "Selected steps", share, xlabel="denoising step")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.grid(axis="x", visible=False)


def _curves(axes: Axes, title: str, records: Records, keys: Mapping[str, str]) -> None:
    plotted: list[float] = []
    for colour, (key, label) in zip((_PURPLE, _ORANGE, _GREEN), keys.items(), strict=False):
        steps, values = _series(records, key)
        if any(values) or (values and key != "kl"):  # the KL is zero where it is not asked for
            _smoothed(axes, steps, values, colour, label)
            plotted += values
    _finish(axes, title, plotted)
    if plotted and min(plotted) >= 0:
        axes.set_ylim(0, 1.08 * max(plotted) or 1.0)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="best", handlelength=1.2)


def _smoothed(
    axes: Axes, steps: Sequence[int], values: Sequence[float], colour: str, label: str
) -> int:
    """Every value, light, under the trailing mean over a twentieth of them; returns its length."""
    window = max(1, len(values) // 20)
    if window > 1:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(
        steps,
        [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))],
        color=colour,
        label=label,
        **_marker(steps),
    )
    return window


def _marker(steps: Sequence[int]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.5} if len(steps) < 30 else {}


def _finish(axes: Axes, title: str, plotted: Sequence[float], xlabel: str = "RL step") -> None:
    axes.set(title=title, xlabel=xlabel)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, steps=[1, 2, 5, 10]))
    left, right = axes.get_xlim()
    if right - left < 1:  # a single step
        axes.set_xlim(left - 1, right + 1)
    if not plotted:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=_GREY)
        axes.set(xticks=[], yticks=[])


def _series(records: Records, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have a value of ``key``."""
    points = [(r["step"], float(r[key])) for r in records if r.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _band(
    series: Sequence[tuple[list[int], list[float]]],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Mean and interval at the steps that all seeds have."""
    curves = [dict(zip(*each, strict=True)) for each in series]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    stats = [mean_interval([curve[step] for curve in curves]) for step in steps]
    mean = [m for m, _ in stats]
    return steps, mean, [m - (h or 0.0) for m, h in stats], [m + (h or 0.0) for m, h in stats]


def _row(method: str, runs: Sequence[Records]) -> ComparisonRow:
    reward, reward_interval = mean_interval([_series(r, "eval/reward")[1][-1] for r in runs])
    last = [values[-1] for _, values in (_series(r, "eval/solved") for r in runs) if values]
    solved, solved_interval = mean_interval(last) if len(last) == len(runs) else (None, None)
    tflops, seconds = (
        statistics.fmean(max(_spent(records, x).values()) for records in runs)
        if all(key in records[-1] for records in runs)
        else None
        for x, key in _LOGGED
    )
    return ComparisonRow(
        *(method, len(runs), reward, reward_interval, solved, solved_interval, tflops, seconds)
    )


_UNITS: dict[Spent, str] = {
    "step": "RL step",
    "flops": "TFLOP of rollout, scoring and update",
    "seconds": "processor-seconds of training",
}
_LOGGED: tuple[tuple[Spent, str], ...] = (("flops", "flops/rollout"), ("seconds", "time/processor"))


def _spent(records: Records, x: Spent) -> dict[int, float]:
    """Steps, TFLOP or processor-seconds up to each step."""
    if x == "step":
        return {int(record["step"]): float(record["step"]) for record in records}
    names = ["time/processor"]
    if x == "flops":
        names = [f"flops/{phase}" for phase in ("rollout", "score", "update")]
    total, spent = 0.0, {}
    for record in records:
        total += sum(record.get(name) or 0.0 for name in names) / (1e12 if x == "flops" else 1.0)
        spent[int(record["step"])] = total
    return spent


def _check_same_end(
    groups: Mapping[str, Sequence[PathLike]], loaded: Mapping[str, Sequence[Records]]
) -> None:
    """An unfinished run beside finished ones would make its method look worse than it is."""
    ends: dict[int, str] = {}
    for method, runs in groups.items():
        for run, records in zip(runs, loaded[method], strict=True):
            steps, _ = _series(records, "eval/reward")
            if not steps:
                raise ValueError(f"{run} has no held-out reward (eval/reward)")
            ends.setdefault(steps[-1], os.fspath(run))
    if len(ends) > 1:
        listed = ", ".join(f"{run} at step {step}" for step, run in ends.items())
        raise ValueError(f"runs with different last evaluations cannot be compared: {listed}")


def _plus_minus(value: float, half: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def save_figure(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
