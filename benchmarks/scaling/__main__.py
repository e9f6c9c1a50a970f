"""Cost of an iteration of EGSPO-SA as each size grows: slopes of log cost against log size.

    python -m benchmarks.scaling                       # small, on a CPU
    python -m benchmarks.scaling --size llada-8b       # on a GPU

1 is linear, 0 is flat. FLOPs are counted from the passes made, memory is the most that tensors took
beyond the weights, seconds are those of the fastest of --repeats iterations.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.hardware import provenance
from benchmarks.iteration.measure import IMPLEMENTATIONS
from benchmarks.iteration.problem import SIZES
from benchmarks.scaling.sweeps import AXES, BASE, MULTIPLES, Point, measure, slopes
from benchmarks.scaling.tables import table


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    base = BASE if args.size == "base" else SIZES[args.size]
    torch.set_num_threads(args.threads)
    points: list[Point] = []
    for axis in args.axes:
        for implementation in IMPLEMENTATIONS:
            points += measure(
                base, axis, args.multiples, implementation, "egspo-sa", args.device, args.repeats
            )
    print(table(slopes(points)))
    if args.output is not None:
        given = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "-m", "benchmarks.scaling", *given])
        record = {
            **provenance(command),
            "base": asdict(base),
            "points": [asdict(point) for point in points],
            "slopes": slopes(points),
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=["base", *sorted(SIZES)], default="base")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--multiples", nargs="+", type=int, default=list(MULTIPLES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--repeats", type=int, default=3, help="of the timing; 0 leaves it out")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser


if __name__ == "__main__":
    main()
