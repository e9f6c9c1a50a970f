"""One iteration of EGSPO and EGSPO-SA, phase by phase: egspo against plain research code.

With a cache, or a block-causal model, egspo alone: research code has neither.

    python -m benchmarks.iteration                              # small, on a CPU
    python -m benchmarks.iteration --size llada-8b              # needs a GPU with 40 GB
    python -m benchmarks.iteration --size sdar-8b               # block-causal
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
from egspo.planning.memory import estimate_memory
from egspo.planning.memory_items import peak_bytes


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.decoders and args.flops_only:
        parser.error("--decoders is measured: leave --flops-only out")
    changes = {f.name: getattr(args, f.name) for f in fields(Problem)}
    problem = changed(SIZES[args.flops_only or args.size], changes)
    memory: Any = None
    if args.flops_only and not problem.has_baseline:
        raise SystemExit("--flops-only compares with the baseline, which lacks cache and family")
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
        memory = memory_of(bench, rows)
        if memory is not None:
            estimated, measured = memory["estimated"] / 1e6, memory["measured"] / 1e6
            made += (
                f"\n\nMemory of egspo: estimated {estimated:.4g} MB, measured {measured:.4g} MB."
            )
    print(made)
    if args.output is not None:
        given = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "-m", "benchmarks.iteration", *given])
        record = {**provenance(command), "problem": asdict(problem), "rows": rows}
        record |= {} if memory is None else {"memory": memory}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def rows_of(bench: Bench, algorithm: Algorithm, repeats: int) -> list[dict[str, Any]]:
    """Measured costs of both implementations."""
    if not bench.problem.has_baseline:
        bench.run("egspo", algorithm, "time")  # warms up
        return cost_rows(algorithm, "egspo", bench.measure("egspo", algorithm, repeats))
    agreement = bench.agreement(algorithm)  # also warms up
    rows = []
    for implementation in IMPLEMENTATIONS:
        phases = bench.measure(implementation, algorithm, repeats)
        rows += cost_rows(algorithm, implementation, phases, agreement.tokens)
    return rows


def memory_of(bench: Bench, rows: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes: what is estimated before a run, and the most that egspo's tensors took."""
    problem = bench.problem
    algorithm = rows[-1]["algorithm"]
    config = problem.config(stepwise=algorithm == "egspo-sa")
    items = estimate_memory(config, problem.meta_model(), problem.prompt_tokens)
    weights = sum(p.untyped_storage().nbytes() for p in bench.denoiser.model.parameters())
    measured = max(
        row["peak_bytes"]
        for row in rows
        if (row["implementation"], row["algorithm"]) == ("egspo", algorithm)
    )
    return {"estimated": peak_bytes(items), "measured": weights + measured}


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
