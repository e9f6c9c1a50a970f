"""One iteration of EGSPO and EGSPO-SA, phase by phase: egspo against plain research code.

    python -m benchmarks.iteration                              # small, on a CPU
    python -m benchmarks.iteration --size llada-8b              # needs a GPU with 40 GB
    python -m benchmarks.iteration --flops-only llada-8b        # counted, nothing is timed
    python -m benchmarks.iteration --decoders                   # block-causal beside the others

Seconds are those of the fastest of --repeats iterations (with --decoders on a CPU, the processor's,
whatever else runs there), FLOPs are counted by torch while it runs,
memory is the most that tensors took beyond the weights, optimizer state included.
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
from benchmarks.iteration import decoders
from benchmarks.iteration.measure import ALGORITHMS, IMPLEMENTATIONS, Algorithm, Bench
from benchmarks.iteration.problem import SIZES, Problem, changed
from benchmarks.iteration.tables import cost_rows, counted_rows, table


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.decoders and args.flops_only:
        parser.error("--decoders is measured: leave --flops-only out")
    changes = {name: getattr(args, name) for name in _sizes()}
    problem = changed(SIZES[args.flops_only or args.size], changes)
    if args.flops_only:
        rows = [row for algorithm in args.algorithms for row in counted_rows(problem, algorithm)]
        made = table(rows)
    elif args.decoders:
        torch.set_num_threads(args.threads)
        rows = [
            row
            for algorithm in args.algorithms
            for row in decoders.measured_rows(problem, args.device, algorithm, args.repeats)
        ]
        made = decoders.table(rows)
    else:
        torch.set_num_threads(args.threads)
        bench = Bench(problem, args.device)
        rows = [
            row for algorithm in args.algorithms for row in rows_of(bench, algorithm, args.repeats)
        ]
        made = table(rows)
    print(made)
    if args.output is not None:
        given = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "-m", "benchmarks.iteration", *given])
        record = {**provenance(command), "problem": asdict(problem), "rows": rows}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def rows_of(bench: Bench, algorithm: Algorithm, repeats: int) -> list[dict[str, Any]]:
    """Measured costs of both implementations."""
    agreement = bench.agreement(algorithm)  # also warms up
    rows = []
    for implementation in IMPLEMENTATIONS:
        phases = bench.measure(implementation, algorithm, repeats)
        rows += cost_rows(algorithm, implementation, phases, agreement.tokens)
    return rows


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
    parser.add_argument(
        "--decoders", action="store_true", help="egspo by each way to decode, and no baseline"
    )
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--repeats", type=int, default=3, help="of the timing; the fastest counts")
    parser.add_argument("--output", type=Path, help="JSON file")
    sizes = parser.add_argument_group("sizes, over those of --size")
    for name, default in _sizes().items():
        kind: Any = type(default)
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            sizes.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        else:
            sizes.add_argument(flag, type=kind, metavar=kind.__name__.upper())
    return parser


def _sizes() -> dict[str, Any]:
    """Defaults of the fields of a problem that are sizes."""
    return {f.name: f.default for f in fields(Problem) if f.name != "decoder"}


if __name__ == "__main__":
    main()
