"""``egspo doctor`` and ``plot``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from egspo.cli.common import AddCommand


def add_commands(add: AddCommand) -> None:
    doctor = add("doctor", "show what this installation can use, and why not the rest", _doctor)
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    plot = add("plot", "redraw curves.png of runs from their metrics", _plot)
    plot.add_argument("run_dir", nargs="+", type=Path, help="output_dir of a run")


def _doctor(args: argparse.Namespace) -> None:
    from egspo.cli.doctor import diagnose, print_report

    report = diagnose()
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        from egspo.inspection.console import PlainConsole

        print_report(report, PlainConsole())


def _plot(args: argparse.Namespace) -> None:
    from egspo.inspection.plotting import plot_run

    for run_dir in args.run_dir:
        print(plot_run(run_dir, run_dir / "curves.png"))
