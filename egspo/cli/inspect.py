"""``egspo inspect``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from egspo.cli.common import AddCommand
from egspo.files import replacing
from egspo.runs.lock import alone

if TYPE_CHECKING:
    from egspo.inspection.console import PlainConsole
    from egspo.runs.samples import TrajectoryRecord

_EPILOG = """\
A run keeps the trajectories of one group in samples/ at every evaluation (eval.every). Without
--step it is the newest that is shown. A file may also be the output of

  egspo generate --step-map --output FILE.jsonl ...

which has no selected steps, rewards and advantages.

examples:
  egspo inspect runs/sudoku_tiny
  egspo inspect runs/sudoku_tiny --list
  egspo inspect runs/sudoku_tiny --step 40 --index 3 --html trajectory.html
  egspo inspect answers.jsonl --index 7 --png trajectory.png
"""


def add_commands(add: AddCommand) -> None:
    command = add("inspect", "show how a completion came about", _inspect, _EPILOG)
    add_argument = command.add_argument
    add_argument("source", metavar="RUN_OR_TRAJECTORY", type=Path, help="a run, or a JSONL file")
    add_argument("--step", type=int, metavar="N", help="training step of a run (default: newest)")
    add_argument("--index", type=int, metavar="I", help="which of the file (default: the first)")
    add_argument("--list", action="store_true", help="only list what there is")
    add_argument("--all-steps", action="store_true", help="not only those that matter")
    add_argument("--html", type=Path, metavar="FILE", help="write a page instead; it needs no net")
    add_argument("--png", type=Path, metavar="FILE", help="write a figure instead")


def _inspect(args: argparse.Namespace) -> None:
    from egspo.inspection.console import PlainConsole
    from egspo.runs.samples import read_trajectories

    console = PlainConsole(highlight=False)
    if args.list and args.step is None and args.source.is_dir():
        _list_steps(args.source, console)
        return
    file, source = _file(args.source, args.step)
    group = read_trajectories(file)
    if args.list:
        from egspo.inspection.terminal import group_table

        console.print(group_table(group))
        return
    record = _chosen(group, args.index, file)
    for kind, path in (("html", args.html), ("png", args.png)):
        if path is not None:
            with alone(path, name=f"--{kind}"):
                print(_write(kind, path, record, group, source))
    if args.html is None and args.png is None:
        from egspo.inspection.terminal import trajectory_view

        view = trajectory_view(record, group=group, source=source, every_step=args.all_steps)
        console.print(view)


def _file(source: Path, step: int | None) -> tuple[Path, str]:
    """The file of trajectories, and what to call it."""
    from egspo.runs.samples import list_samples

    if source.is_file():
        if step is not None:
            raise ValueError(f"--step chooses a training step of a run: {source} is a file")
        return source, source.name
    if not source.is_dir():
        raise FileNotFoundError(f"there is no run and no file {source}")
    samples = list_samples(source)
    if not samples:
        raise FileNotFoundError(
            f"{source} has no trajectories (samples/step-*.jsonl): a run keeps them from its "
            "first evaluation on"
        )
    chosen = max(samples) if step is None else step
    if chosen not in samples:
        known = ", ".join(map(str, samples))
        raise ValueError(f"{source} has no trajectories of step {step}; it has those of {known}")
    return samples[chosen], f"{source.resolve().name}, step {chosen}"


def _chosen(group: Sequence[TrajectoryRecord], index: int | None, file: Path) -> TrajectoryRecord:
    if index is None:
        return group[0]
    for record in group:
        if record.index == index:
            return record
    known = sorted(record.index for record in group)
    listed = ", ".join(map(str, known[:20])) + (", ..." if len(known) > 20 else "")
    raise ValueError(f"{file} has no trajectory {index}; it has {listed}")


def _list_steps(run: Path, console: PlainConsole) -> None:
    from egspo.inspection.terminal import samples_table
    from egspo.runs.samples import list_samples, read_trajectories

    _file(run, None)
    console.print(
        samples_table({step: read_trajectories(f) for step, f in list_samples(run).items()})
    )


def _write(
    kind: str, path: Path, record: TrajectoryRecord, group: Sequence[TrajectoryRecord], source: str
) -> Path:
    if kind == "png":
        from egspo.inspection.figure import plot_trajectory

        return plot_trajectory(record, path, group=group, source=source)
    from egspo.inspection.page import trajectory_page

    page = trajectory_page(record, group=group, source=source)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
