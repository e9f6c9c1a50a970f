"""One iteration of EGSPO and EGSPO-SA, phase by phase: egspo against plain research code.

    python -m benchmarks.iteration                              # small, on a CPU
    python -m benchmarks.iteration --size llada-8b              # needs a GPU with 40 GB
    python -m benchmarks.iteration --flops-only llada-8b        # counted, nothing is timed

Seconds are those of the fastest of --repeats iterations, FLOPs are counted by torch while it runs,
memory is the most that tensors took beyond weights and optimizer state.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware import provenance
from benchmarks.iteration.measure import (
    ALGORITHMS,
    IMPLEMENTATIONS,
    PHASES,
    Bench,
    flops_at,
    passes_of,
)
from benchmarks.iteration.problem import SIZES, Problem, changed
from benchmarks.meter import PhaseCost


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    changes = {f.name: getattr(args, f.name) for f in fields(Problem)}
    problem = changed(SIZES[args.flops_only or args.size], changes)
    if args.flops_only:
        rows = [row for algorithm in args.algorithms for row in counted_rows(problem, algorithm)]
    else:
        torch.set_num_threads(args.threads)
        bench = Bench(problem, args.device)
        rows = [
            row for algorithm in args.algorithms for row in rows_of(bench, algorithm, args.repeats)
        ]
    print(table(rows))
    if args.output is not None:
        given = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "-m", "benchmarks.iteration", *given])
        record = {**provenance(command), "problem": asdict(problem), "rows": rows}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def rows_of(bench: Bench, algorithm: Any, repeats: int) -> list[dict[str, Any]]:
    """Measured: a row for each implementation and phase, and one for the whole iteration."""
    agreement = bench.agreement(algorithm)  # also warms up
    rows = []
    for implementation in IMPLEMENTATIONS:
        phases = bench.measure(implementation, algorithm, repeats)
        for name, cost in {**phases, "iteration": total(phases)}.items():
            row = {"algorithm": algorithm, "implementation": implementation, "phase": name}
            rows.append({**row, **asdict(cost), "same_tokens": agreement.tokens})
    return rows


def counted_rows(problem: Problem, algorithm: Any) -> list[dict[str, Any]]:
    """FLOPs alone: the passes are made by a tiny model, their costs are those of ``problem``."""
    rows = []
    for implementation in IMPLEMENTATIONS:
        flops = flops_at(problem, implementation, passes_of(problem, implementation, algorithm))
        flops["iteration"] = sum(flops.values())
        row = {"algorithm": algorithm, "implementation": implementation}
        rows += [{**row, "phase": name, "flops": value} for name, value in flops.items()]
    return rows


def total(phases: dict[str, PhaseCost]) -> PhaseCost:
    return PhaseCost(
        sum(cost.seconds for cost in phases.values()),
        sum(cost.flops for cost in phases.values()),
        max(cost.peak_bytes for cost in phases.values()),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each algorithm and phase, egspo beside the baseline."""
    units = {"seconds": ("seconds", 1.0), "flops": ("TFLOP", 1e12), "peak_bytes": ("peak MB", 1e6)}
    if max(row["flops"] for row in rows) < 1e12:
        units["flops"] = ("GFLOP", 1e9)
    columns = [name for name in units if name in rows[0]]
    head = [f"{units[name][0]}, {who}" for name in columns for who in (*IMPLEMENTATIONS, "ratio")]
    lines = ["| | phase | " + " | ".join(head) + " |", "|---|---|" + "--:|" * len(head)]
    cells = {(r["algorithm"], r["phase"], r["implementation"]): r for r in rows}
    for algorithm in dict.fromkeys(row["algorithm"] for row in rows):
        for phase in (*PHASES, "iteration"):
            ours, theirs = (cells[algorithm, phase, who] for who in IMPLEMENTATIONS)
            values = []
            for name in columns:
                scale = units[name][1]
                pair = [ours[name] / scale, theirs[name] / scale]
                values += [f"{value:.4g}" for value in pair]
                values.append(f"{pair[1] / pair[0]:.2f}" if pair[0] else "")
            lines.append(f"| {algorithm} | {phase} | " + " | ".join(values) + " |")
    agreement = {row["same_tokens"] for row in rows if "same_tokens" in row}
    if agreement:
        lines += ["", f"Tokens that both rollouts agree on: {100 * min(agreement):.2f} %."]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.iteration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument(
        "--flops-only", choices=sorted(SIZES), help="count FLOPs at this size, run nothing of it"
    )
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--repeats", type=int, default=3, help="of the timing; the fastest counts")
    parser.add_argument("--output", type=Path, help="JSON file")
    sizes = parser.add_argument_group("sizes, over those of --size")
    for field in fields(Problem):
        default = field.default
        kind: Any = type(default)
        flag = "--" + field.name.replace("_", "-")
        if kind is bool:
            sizes.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        else:
            sizes.add_argument(flag, type=kind, metavar=kind.__name__.upper())
    return parser


if __name__ == "__main__":
    main()
