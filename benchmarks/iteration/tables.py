"""Tables of the iteration benchmark: egspo beside the baseline, a line per phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.iteration.measure import (
    IMPLEMENTATIONS,
    PHASES,
    Algorithm,
    flops_at,
    passes_of,
)
from benchmarks.iteration.problem import Problem
from benchmarks.meter import PhaseCost
from benchmarks.result_files import Row


def section(results: Sequence[Row]) -> str:
    """The table of the iteration suite of a result file."""
    rows: list[dict[str, Any]] = []
    for result in results:
        info = result.info
        phases = {name: PhaseCost(**cost) for name, cost in info["phases"].items()}
        rows += cost_rows(info["algorithm"], result.implementation, phases, info["same_tokens"])
    problem = ", ".join(f"{name} {value}" for name, value in results[0].info["problem"].items())
    return f"Sizes `{results[0].info['size']}`: {problem}.\n\n{table(rows)}"


def cost_rows(
    algorithm: Algorithm,
    implementation: str,
    phases: Mapping[str, PhaseCost],
    same_tokens: float | None = None,
) -> list[dict[str, Any]]:
    """A row for each phase, and one for the whole iteration."""
    whole = {**phases, "iteration": total(phases)}
    row: dict[str, Any] = {"algorithm": algorithm, "implementation": implementation}
    if same_tokens is not None:
        row["same_tokens"] = same_tokens
    return [{**row, "phase": name, **asdict(cost)} for name, cost in whole.items()]


def counted_rows(problem: Problem, algorithm: Algorithm) -> list[dict[str, Any]]:
    """FLOPs alone: the passes are made by a tiny model, their costs are those of ``problem``."""
    rows = []
    for implementation in IMPLEMENTATIONS:
        flops = flops_at(problem, implementation, passes_of(problem, implementation, algorithm))
        flops["iteration"] = sum(flops.values())
        row = {"algorithm": algorithm, "implementation": implementation}
        rows += [{**row, "phase": name, "flops": value} for name, value in flops.items()]
    return rows


def total(phases: Mapping[str, PhaseCost]) -> PhaseCost:
    return PhaseCost(
        sum(cost.seconds for cost in phases.values()),
        sum(cost.flops for cost in phases.values()),
        max(cost.peak_bytes for cost in phases.values()),
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each algorithm and phase, egspo beside the baseline if there is one."""
    names = [who for who in IMPLEMENTATIONS if any(r["implementation"] == who for r in rows)]
    compared = [*names, "ratio"] if len(names) == 2 else names
    units = {"seconds": ("seconds", 1.0), "flops": ("TFLOP", 1e12), "peak_bytes": ("peak MB", 1e6)}
    if max(row["flops"] for row in rows) < 1e12:
        units["flops"] = ("GFLOP", 1e9)
    columns = [name for name in units if name in rows[0]]
    head = [f"{units[name][0]}, {who}" for name in columns for who in compared]
    lines = ["| | phase | " + " | ".join(head) + " |", "|---|---|" + "--:|" * len(head)]
    cells = {(r["algorithm"], r["phase"], r["implementation"]): r for r in rows}
    for algorithm in dict.fromkeys(row["algorithm"] for row in rows):
        for phase in (*PHASES, "iteration"):
            costs = [cells[algorithm, phase, who] for who in names]
            values = []
            for name in columns:
                scale = units[name][1]
                pair = [cost[name] / scale for cost in costs]
                values += [f"{value:.4g}" for value in pair]
                if len(pair) == 2:
                    values.append(f"{pair[1] / pair[0]:.2f}" if pair[0] else "")
            lines.append(f"| {algorithm} | {phase} | " + " | ".join(values) + " |")
    agreement = {row["same_tokens"] for row in rows if "same_tokens" in row}
    if agreement:
        lines += ["", f"Tokens that both rollouts agree on: {100 * min(agreement):.2f} %."]
    return "\n".join(lines)
