"""Tables and the plot of the gradient study, from its result files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gradients.results import read_all
from benchmarks.gradients.study import STAGES, STRATEGIES, TASKS
from benchmarks.markdown import made_on, table
from egspo.inspection.plotting import STYLE, save_figure

__all__ = ["draw", "read_all", "section"]

PLOT = "studies-gradients.png"
COLOURS = ("#d9772b", "#2f6db3", "#3a9267", "#7e61a8", "#6b7280", "#c0504d")


def section(contents: Sequence[Mapping[str, Any]]) -> str:
    """Everything of the study in Markdown."""
    plot = f"![Cosine to the full gradient by K, and error against entropy left out]({PLOT})"
    return "\n\n".join([plot, *map(_task, contents)])


def _task(content: Mapping[str, Any]) -> str:
    settings = content["settings"]
    parts = [
        f"### {TASKS[content['task']].task.title}",
        f"`recipes/{content['recipe']}.yaml`: batches of {settings['prompts']} prompts x "
        f"{settings['group_size']} completions of {settings['new_tokens']} tokens in "
        f"{settings['denoising_steps']} steps.",
    ]
    for stage in (name for name in STAGES if name in content["stages"]):
        measured = content["stages"][stage]
        parts += [_stage(stage, measured), _verdict(measured), _bound(measured)]
    if content["left_out"]:
        parts.append("Left out for want of time: " + "; ".join(content["left_out"]) + ".")
    stages = content["stages"].values()
    commands = dict.fromkeys(stage["made_by"]["command"] for stage in stages)
    commits = [stage["made_by"]["commit"] for stage in stages]
    parts.append(made_on({**content, "command": "\n".join(commands)}, commits))
    return "\n\n".join(parts)


def _stage(stage: str, measured: Mapping[str, Any]) -> str:
    """One line for each selection; all steps first."""
    head = [
        f"{stage}, {measured['batches']} batches",
        *("K", "cosine", "less that of high_entropy", "relative error", "share of norm"),
        *("variance, of all steps'", "noise", "GFLOP"),
    ]
    lines = []
    for name, each in measured["estimators"].items():
        whole = name == "all"
        lines.append(
            [
                name,
                f"{each['k'][0]:.3g}",
                "1" if whole else _plus_minus(each["cosine"]),
                "" if each["ahead"] is None else _plus_minus(each["ahead"], "+"),
                "0" if whole else _plus_minus(each["error"]),
                "1" if whole else _plus_minus(each["share"]),
                *(_optional(each[key]) for key in ("variance_of_all", "noise")),
                f"{each['flops'][0] / 1e9:.3g}",
            ]
        )
    return table(head, lines)


def _verdict(measured: Mapping[str, Any]) -> str:
    """Which cosines differ from that of the largest entropy by more than batches explain."""
    named: dict[str, list[str]] = {"below": [], "above": [], "not separated from": []}
    for name, each in measured["estimators"].items():
        mean, half = each["ahead"] or (None, None)
        if half is not None:
            apart = abs(mean) > half
            named[("below" if mean < 0 else "above") if apart else "not separated from"].append(
                name
            )
    parts = [f"{where} it: {'; '.join(names)}" for where, names in named.items() if names]
    count = sum(map(len, named.values()))
    return (
        "Cosine against that of `high_entropy` with the same K, by the 95 % interval of the "
        f"difference, batch by batch, not corrected for there being {count}: {'. '.join(parts)}."
        if parts
        else "One batch compares nothing."
    )


def _bound(measured: Mapping[str, Any]) -> str:
    """The constant that the bound would need, selection by selection."""
    constants = {
        name: sum(found) / len(found)
        for name, each in _default_entropy(measured)
        if (found := [value for value in each["bound"] if value is not None])
    }
    if not constants:
        return "No selection left entropy out: there is nothing to bound."
    least, most = (
        min(constants, key=constants.__getitem__),
        max(constants, key=constants.__getitem__),
    )
    largest = max(
        value
        for _, each in _default_entropy(measured)
        for value in each["bound"]
        if value is not None
    )
    left = [each["left_out"][0] for _, each in _default_entropy(measured)]
    distance = [each["distance"][0] for _, each in _default_entropy(measured)]
    return (
        f"The bound, ‖error‖ ≤ B · entropy left out, holds in every batch with B = {largest:.3g}. "
        f"By selection the mean constant lies between {constants[least]:.3g} ({least}) and "
        f"{constants[most]:.3g} ({most}). Rank correlation of entropy left out and error over "
        f"these {len(left)} selections: {rank_correlation(left, distance):.2f}."
    )


def _default_entropy(measured: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The selections that leave steps out, by the default definition of the entropy."""
    for name, each in measured["estimators"].items():
        if name != "all" and " over " not in name:
            yield name, each


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, equal values having their mean rank."""
    import numpy as np

    def ranks(values: Sequence[float]) -> Any:
        array = np.asarray(values)
        below = (array[None, :] < array[:, None]).sum(1)
        equal = (array[None, :] == array[:, None]).sum(1)
        return below + (equal - 1) / 2

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def _plus_minus(value: Sequence[float | None], sign: str = "") -> str:
    mean, half = value
    return f"{mean:{sign}.3f}" if half is None else f"{mean:{sign}.3f} ± {half:.3f}"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def draw(contents: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """A row for each task: cosine by K, early and late, and error against entropy left out."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(14, 4.0 * len(contents)), dpi=110, layout="constrained")
        grid = figure.subplots(len(contents), 3, squeeze=False)
        for axes, content in zip(grid, contents, strict=True):
            title = TASKS[content["task"]].task.title
            for place, stage in enumerate(STAGES):
                measured = content["stages"].get(stage)
                axes[place].set(title=f"{title}: {stage}", xlabel="K", ylabel="cosine")
                if measured is None:
                    axes[place].set_axis_off()
                    continue
                for colour, strategy in zip(COLOURS, STRATEGIES, strict=False):
                    _curve(axes[place], strategy, colour, measured["estimators"])
                axes[place].set_xscale("log", base=2)
                _scatter(axes[2], stage, measured)
            axes[2].set(
                title=f"{title}: the bound",
                xlabel="entropy left out, nats per trajectory",
                ylabel="distance to the full gradient",
            )
            axes[2].legend(loc="best")
        grid[0][0].legend(loc="best")
        return save_figure(figure, folder / PLOT)


def _curve(axes: Any, strategy: str, colour: str, found: Mapping[str, Any]) -> None:
    points = {
        int(name.rpartition(" ")[2]): each["cosine"]
        for name, each in found.items()
        if name.startswith(f"{strategy}, K = ")
    }
    if points:
        half = [value[1] or 0.0 for value in points.values()]
        mean = [value[0] for value in points.values()]
        axes.errorbar(
            list(points), mean, half, color=colour, marker="o", markersize=4, label=strategy
        )


def _scatter(axes: Any, stage: str, measured: Mapping[str, Any]) -> None:
    pairs = [(e["left_out"][0], e["distance"][0]) for _, e in _default_entropy(measured)]
    marker = "o" if stage == "early" else "^"
    axes.plot(*zip(*pairs, strict=True), marker, alpha=0.7, label=stage, linestyle="none")
