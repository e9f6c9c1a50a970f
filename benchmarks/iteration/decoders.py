"""One iteration of egspo by each way to decode, at equal sizes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.iteration.measure import PHASES, Algorithm, Bench, seconds
from benchmarks.iteration.problem import Problem
from benchmarks.iteration.tables import total
from benchmarks.meter import PhaseCost, merged

DECODERS: dict[str, dict[str, Any]] = {
    "full attention": {"family": "llada", "cache": "none"},
    "dual cache": {"family": "llada", "cache": "dual"},
    "block-causal": {"family": "sdar", "cache": "none", "queries_per_key": 1},
}
"""What each changes in a problem; the sizes are the same."""


def measured_rows(
    problem: Problem, device: torch.device | str, algorithm: Algorithm, repeats: int
) -> list[dict[str, Any]]:
    """A row for each decoder and phase: seconds of the fastest of ``repeats`` iterations.

    On a CPU they are the processor's, and the decoders take turns: what else the machine does
    hardly counts.
    """
    clock = time.process_time if torch.device(device).type == "cpu" else time.perf_counter
    benches = {
        name: Bench(replace(problem, **changes), device, clock)
        for name, changes in DECODERS.items()
    }
    counted = {name: bench.run("egspo", algorithm, "count") for name, bench in benches.items()}
    runs: dict[str, list[dict[str, PhaseCost]]] = {name: [] for name in benches}
    for _ in range(repeats):
        for name, bench in benches.items():
            runs[name].append(bench.run("egspo", algorithm, "time"))
    rows = []
    for name, timed in runs.items():
        phases = merged(min(timed, key=seconds), counted[name])
        row = {"algorithm": algorithm, "decoder": name}
        whole = {**phases, "iteration": total(phases)}
        rows += [{**row, "phase": phase, **asdict(cost)} for phase, cost in whole.items()]
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each algorithm and phase; how many times the cost of the last decoder
    each of the others has."""
    *others, last = DECODERS
    head = ["", "phase"]
    for unit in ("seconds", "GFLOP"):
        head += [f"{unit}, {name}" for name in DECODERS]
        head += [f"{name} / {last}" for name in others]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
    cells = {(row["algorithm"], row["phase"], row["decoder"]): row for row in rows}
    for algorithm in dict.fromkeys(row["algorithm"] for row in rows):
        for phase in (*PHASES, "iteration"):
            found = [cells[algorithm, phase, name] for name in DECODERS]
            values = [algorithm, phase]
            for key, scale in (("seconds", 1.0), ("flops", 1e9)):
                costs = [row[key] / scale for row in found]
                values += [f"{cost:.3g}" for cost in costs]
                values += [f"{cost / costs[-1]:.2f}" if costs[-1] else "" for cost in costs[:-1]]
            lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)
