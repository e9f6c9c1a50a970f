"""Tables and the plot of the algorithm study, from its result files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.algorithms.results import Comparison, Estimate, compare, total_flops
from benchmarks.algorithms.study import TASKS
from egspo.inspection.plotting import STYLE, mean_interval, save_figure

PLOT = "benchmarks-algorithms.png"
COLOURS = ("#d9772b", "#2f6db3", "#3a9267", "#7e61a8", "#6b7280", "#c0504d", "#8c6d4f")


def section(contents: Sequence[Mapping[str, Any]]) -> str:
    """Everything of the study in Markdown."""
    parts = [f"![Held-out reward against FLOPs]({PLOT})", *map(_task, contents)]
    return "\n\n".join(parts)


def _task(content: Mapping[str, Any]) -> str:
    settings = content["settings"]
    budget, rows = compare(content)
    commits = sorted({run["commit"] for m in content["methods"].values() for run in m["runs"]})
    versions = content["versions"]
    start = next(iter(content["methods"].values()))["runs"][0]["points"][0]
    return "\n\n".join(
        [
            f"### {TASKS[content['task']].title}",
            f"`recipes/{content['recipe']}.yaml`, {settings['steps']} steps of "
            f"{settings['prompts_per_step']} prompts x {settings['group_size']} completions of "
            f"{settings['denoising_steps']} denoising steps, of which {settings['selected_steps']} "
            f"are trained (all steps: {settings['denoising_steps']}; one-step GRPO: none, but 4 "
            f"inner updates, or 1); learning rate "
            f"{settings['learning_rate']:g} for all. From the same warm start, held-out reward "
            f"{start['reward']:.3f}, solved {100 * start['solved']:.1f} %.",
            summary_table(rows, budget),
            cost_table(rows),
            verdict(rows, budget),
            f"{content['cpu']}, threads {content['threads']}; Python {content['python']}, torch "
            f"{versions['torch']}; commit {', '.join(f'`{c}`' for c in commits)}.\n"
            f"\n```bash\n{content['command']}\n```",
        ]
    )


def summary_table(rows: Sequence[Comparison], budget: float) -> str:
    """Held-out results: at the end, and at equal FLOPs."""
    first = rows[0].method
    head = (
        "method",
        "seeds",
        "TFLOP",
        "reward at the end",
        "solved, %",
        f"reward at {budget / 1e12:.3g} TFLOP",
        f"less that of {first}",
    )
    lines = [
        (
            row.method,
            str(row.seeds),
            f"{row.tflops:.3g}",
            plus_minus(row.reward),
            plus_minus(row.solved, 100, 1),
            plus_minus(row.at_budget),
            "" if row is rows[0] else plus_minus(row.behind_first, sign=True),
        )
        for row in rows
    ]
    return _table(head, lines)


def cost_table(rows: Sequence[Comparison]) -> str:
    """What 0.1 of held-out reward cost."""
    head = (
        "per 0.1 of reward",
        "gain, start to end",
        "TFLOP",
        "samples",
        "gradient steps",
    )
    lines = [
        (
            row.method,
            plus_minus(row.gain, sign=True),
            between(row.tflops_per_gain),
            between(row.samples_per_gain),
            between(row.gradient_steps_per_gain),
        )
        for row in rows
    ]
    return _table(head, lines)


def verdict(rows: Sequence[Comparison], budget: float) -> str:
    """Which differences from the first method are larger than seeds explain."""
    first, others = rows[0].method, rows[1:]
    named: dict[str, list[str]] = {"below": [], "above": [], "not told from": []}
    for row in others:
        low, high = row.behind_first.low, row.behind_first.high
        if low is None or high is None or low <= 0 <= high:
            named["not told from"].append(row.method)
        else:
            named["below" if high < 0 else "above"].append(row.method)
    parts = [
        f"{where} {first}: {', '.join(f'*{name}*' for name in names)}"
        for where, names in named.items()
        if names
    ]
    return (
        f"At {budget / 1e12:.3g} TFLOP, by the 95 % interval of the difference seed by seed, not "
        f"corrected for there being {len(others)}: " + "; ".join(parts) + "."
    )


def plus_minus(value: Estimate, scale: float = 1.0, digits: int = 3, sign: bool = False) -> str:
    """``0.713 ± 0.021``."""
    assert value.mean is not None
    text = f"{scale * value.mean:{'+' if sign else ''}.{digits}f}"
    if value.high is None:
        return text
    return f"{text} ± {scale * (value.high - value.mean):.{digits}f}"


def between(value: Estimate) -> str:
    """``3.1 (2.4 to 4.4)``; an end that is open is infinite."""
    if value.mean is None:
        return "no gain"
    high = "∞" if value.high is None else _number(value.high)
    interval = "" if value.low is None else f" ({_number(value.low)} to {high})"
    return _number(value.mean) + interval


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [list(head), ["---", *["--:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(contents: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Held-out reward against FLOPs, a panel for each task: means and 95% intervals over seeds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(5.4 * len(contents), 4.4), dpi=120, layout="constrained")
        panels = figure.subplots(1, len(contents), squeeze=False)[0]
        for axes, content in zip(panels, contents, strict=True):
            for colour, (name, method) in zip(COLOURS, content["methods"].items(), strict=False):
                runs = [run["points"] for run in method["runs"]]
                columns = list(zip(*runs, strict=True))
                x = [statistics.fmean(total_flops(p) / 1e12 for p in column) for column in columns]
                stats = [mean_interval([p["reward"] for p in column]) for column in columns]
                mean = [m for m, _ in stats]
                half = [h or 0.0 for _, h in stats]
                axes.plot(x, mean, color=colour, marker="o", markersize=3.5, label=name)
                axes.fill_between(
                    x,
                    [m - h for m, h in zip(mean, half, strict=True)],
                    [m + h for m, h in zip(mean, half, strict=True)],
                    color=colour,
                    alpha=0.12,
                    linewidth=0,
                )
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, 0.0), min(high, 1.0))
            seeds = min(len(m["runs"]) for m in content["methods"].values())
            axes.set(
                title=f"{TASKS[content['task']].title} ({seeds} seeds)",
                xlabel="TFLOP of rollout, scoring and update",
                ylabel="held-out reward, mean and 95% interval",
            )
        panels[0].legend(loc="best")
        return save_figure(figure, folder / PLOT)
