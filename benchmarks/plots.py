"""Plots of a result file: times, and for a GPU its roofline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.result_files import ResultFile, Row


def names(file: ResultFile) -> list[str]:
    """File names of the plots that :func:`draw` makes."""
    stem = re.sub(r"[^a-z0-9]+", "-", file.path.stem.lower())
    kinds = ["floor", "roofline"] if file.machine["gpu"] else ["times"]
    return [f"benchmarks-{stem}-{kind}.png" for kind in kinds]


def draw(file: ResultFile, folder: Path) -> list[Path]:
    """Draw the plots into ``folder``: on a GPU time over its floor by rows, and the roofline of
    this project's kernels; on a CPU the times."""
    made = [folder / name for name in names(file)]
    if file.machine["gpu"]:
        _floors(file, made[0])
        _roofline(file, made[1])
    else:
        _times(file, made[0])
    return made


def _subplots(*arguments: Any, **options: Any) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*arguments, layout="constrained", **options)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _colours(file: ResultFile) -> dict[str, str]:
    implementations = dict.fromkeys(row.implementation for row in file.rows)
    return {name: f"C{place % 10}" for place, name in enumerate(implementations)}


def _times(file: ResultFile, path: Path) -> None:
    """A row of dots for each workload."""
    workloads, colours = file.workloads(), _colours(file)
    figure, axes = _subplots(figsize=(13, 1 + 0.36 * len(workloads)))
    for place, rows in enumerate(workloads.values()):
        for row in rows:
            axes.plot(row.median, place, "o", color=colours[row.implementation], alpha=0.85)
    axes.set_yticks(range(len(workloads)), list(workloads))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("median seconds of one call")
    axes.set_title(f"{file.device}, torch threads: {file.machine['threads']}; CPU backends")
    axes.grid(axis="x", alpha=0.3)
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=name)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def _floors(file: ResultFile, path: Path) -> None:
    """A panel for each function and pass: share of the floor against rows."""
    panels: dict[str, list[Row]] = {}
    for row in file.rows:
        kl = f"[{row.info['kl']}]" if row.info["kl"] else ""
        panels.setdefault(f"{row.info['function']}{kl} {row.info['pass']}", []).append(row)
    colours = _colours(file)
    figure, grid = _subplots(
        -(-len(panels) // 3), 3, figsize=(14, 3.2 * -(-len(panels) // 3)), squeeze=False
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, rows) in zip(grid.flat, panels.items(), strict=False):
        for name in dict.fromkeys(row.implementation for row in rows):
            points = [row for row in rows if row.implementation == name]
            x = [row.info["rows"] for row in points]
            y = [100 * row.info["share_of_floor"] for row in points]
            axes.plot(x, y, "o-", color=colours[name], label=name, markersize=4)
        axes.axhline(100, color="grey", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=6)
    figure.supxlabel("rows")
    figure.supylabel("floor over time, %")
    figure.suptitle(file.device)
    _save(figure, path)


def _roofline(file: ResultFile, path: Path) -> None:
    """Rate against intensity, under the bandwidth and matrix rate of the same run."""
    bandwidth = file.ceilings["bytes_per_second"]
    rate = file.ceilings["flops_per_second"]["bfloat16"]
    figure, axes = _subplots(figsize=(8, 5.5))
    ridge = rate / bandwidth
    intensities = [0.1, ridge, 20 * ridge]
    axes.plot(intensities, [min(rate, bandwidth * each) for each in intensities], "k-")
    axes.annotate(f"copy {bandwidth / 1e12:.2f} TB/s", (0.5, bandwidth * 0.3), fontsize=8)
    axes.annotate(f"bfloat16 GEMM {rate / 1e12:.0f} TFLOP/s", (ridge, rate * 1.08), fontsize=8)
    # Selection compares and moves: it has no floating-point rate.
    ours = [row for row in file.rows if row.ours and row.info["flops"]]
    for place, function in enumerate(dict.fromkeys(row.info["function"] for row in ours)):
        rows = [row for row in ours if row.info["function"] == function]
        x = [row.info["flops"] / row.info["bytes_moved"] for row in rows]
        y = [row.info["flops_per_second"] for row in rows]
        axes.plot(x, y, "o", color=f"C{place}", label=function, alpha=0.7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("FLOP/s")
    axes.set_title(file.device)
    axes.legend()
    _save(figure, path)
