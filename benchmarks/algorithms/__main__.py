"""What reward costs in FLOPs, samples and gradient steps, by algorithm.

    python -m benchmarks.algorithms                        # both tasks, all methods, three seeds
    python -m benchmarks.algorithms steps=200              # longer: finished runs go on from there
    python -m benchmarks.algorithms --tasks countdown --methods EGSPO "one-step GRPO" --seeds 0

Every run starts from the same warm start and differs from the others of its task in the method and
the seed alone. A run that is finished is not made again, one that was interrupted is resumed. After
every run the result files in --results are written anew from what is finished.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path

import torch

from benchmarks.algorithms.results import SUITE, write
from benchmarks.algorithms.study import METHODS, TASKS, execute, plan
from benchmarks.hardware import provenance
from benchmarks.result_files import RESULTS


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    given = sys.argv[1:] if arguments is None else arguments
    made_by = provenance(shlex.join(["python", "-m", "benchmarks.algorithms", *given]))
    try:
        plans = {
            task: plan(task, args.methods, args.seeds, args.runs, args.overrides)
            for task in args.tasks
        }
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for task, runs in plans.items():
        done = []
        for run in execute(runs, made_by):
            done.append(run)
            print(f"{task}: {len(done)} of {len(runs)}: {run.method}, seed {run.seed}", flush=True)
            write(args.results / f"{SUITE}-{task}.json", task, done, made_by)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.algorithms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="of the recipes, such as steps=200")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--runs", type=Path, default=Path("runs/algorithms"), help="their folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    return parser


if __name__ == "__main__":
    sys.exit(main())
