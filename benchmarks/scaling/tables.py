"""The table of slopes: egspo beside the baseline, a line for each size and phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.iteration.measure import IMPLEMENTATIONS
from benchmarks.result_files import Row
from benchmarks.scaling.sweeps import AXES

QUANTITIES = {"flops": "FLOPs", "peak_bytes": "memory", "seconds": "seconds"}
PHASES = ("rollout", "score", "update", "iteration")


def section(results: Sequence[Row]) -> str:
    """The table of the scaling suite of a result file."""
    base = ", ".join(f"{name} {value}" for name, value in results[0].info["base"].items())
    rows = [row for result in results for row in result.info["slopes"]]
    return f"From {base}.\n\n{table(rows)}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each axis and phase."""
    timed = any(row["seconds"] is not None for row in rows)
    columns = [name for name in QUANTITIES if timed or name != "seconds"]
    head = [f"{QUANTITIES[name]}, {who}" for name in columns for who in IMPLEMENTATIONS]
    lines = ["| | grows | phase | " + " | ".join(head) + " |", "|---|---|---|" + "--:|" * len(head)]
    cells = {(row["axis"], row["implementation"], row["phase"]): row for row in rows}
    for axis in dict.fromkeys(row["axis"] for row in rows):
        for phase in PHASES:
            values = [cells[axis, who, phase][name] for name in columns for who in IMPLEMENTATIONS]
            text = " | ".join(described(value) for value in values)
            lines.append(f"| {axis} | {AXES[axis][0]} | {phase} | {text} |")
    return "\n".join(lines)


def described(slope: float | None) -> str:
    """``0.98 linear``, ``0.03 flat``, or the number alone."""
    if slope is None:
        return ""
    word = " flat" if abs(slope) < 0.1 else " linear" if abs(slope - 1) < 0.1 else ""
    return f"{slope + 0.0:.2f}{word}"
