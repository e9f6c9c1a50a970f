"""How much of the full-step gradient a selection of steps keeps, and at what cost.

    python -m benchmarks.gradients                       # three tasks, before and after training
    python -m benchmarks.gradients --tasks sudoku --stages early --batches 4
    python -m benchmarks.gradients --hours 0.5           # says what it leaves out

On the same trajectories the update of a training step is made with every selection of steps, by
an engine that keeps its gradient and leaves the weights alone. "early" is the warm start of the
recipe, "late" the end of a run of it, which is made first. What is finished is not made again, what
was interrupted goes on with the next batch.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.budget import Budget
from benchmarks.gradients import measure
from benchmarks.gradients.results import SUITE, stage_record, stages_so_far, write
from benchmarks.gradients.study import (
    DEFAULT,
    STAGES,
    STRATEGIES,
    TASKS,
    estimators,
    measured,
    trained,
)
from benchmarks.hardware import provenance
from benchmarks.study_files import add_study_arguments, exit_code
from egspo.config import TrainConfig
from egspo.config.recipe import config_to_dict
from egspo.runs.checkpoint import CHECKPOINTS, list_checkpoints
from egspo.training.trainer import Trainer


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    given = sys.argv[1:] if arguments is None else arguments
    made_by = provenance(shlex.join(["python", "-m", "benchmarks.gradients", *given]))

    def make() -> Budget:
        budget = Budget(args.hours)
        for stage in args.stages:
            for task in args.tasks:
                _stage(task, stage, args, budget, made_by)
        return budget

    return exit_code(make)


def _stage(
    task: str, stage: str, args: argparse.Namespace, budget: Budget, made_by: dict[str, Any]
) -> None:
    """Measure a stage of a task as far as the budget goes, and write it after every batch."""
    config = measured(task, stage, args.runs, args.overrides)
    compared = estimators(TASKS[task], config, args.strategies)
    names, key = [each.name for each in compared], json.dumps(config_to_dict(config), default=str)
    place = Path(config.output_dir) / "totals.pt"
    totals = measure.load(place, names, key)
    path = args.results / f"{SUITE}-{task}.json"
    stages = stages_so_far(path, config)
    for _ in _batches(task, stage, args, budget, totals, config, compared):
        measure.save(place, totals, names, key)
        stages[stage] = {**stage_record(totals, compared), "made_by": made_by}
        write(path, task, config, stages, made_by, _left_out(task, budget))
    if totals.batches:  # what was measured before is told by today's tables
        before = stages.get(stage, {}).get("made_by", made_by)
        stages[stage] = {**stage_record(totals, compared), "made_by": before}
        write(path, task, config, stages, made_by, _left_out(task, budget))


def _left_out(task: str, budget: Budget) -> list[str]:
    return [what for what in budget.left_out if what.startswith(f"{task}, ")]


def _batches(
    task: str,
    stage: str,
    args: argparse.Namespace,
    budget: Budget,
    totals: measure.Totals,
    config: TrainConfig,
    compared: list[Any],
) -> Iterator[int]:
    """The batches that are missing, one after the other."""
    name, wanted = f"{task}, {stage}", args.batches
    if totals.batches >= wanted or not _ready(task, stage, args, budget):
        return
    measurement: measure.Measurement | None = None
    while totals.batches < wanted:
        expected = statistics.median(totals.seconds) if totals.seconds else 0.0
        missing = f"{name}: {wanted - totals.batches} of {wanted} batches"
        if not budget.allows(missing, expected):
            return
        measurement = measurement or measure.Measurement(config, compared)
        measurement.batch(totals.batches + totals.empty + 1, totals)
        if totals.empty > 3 * wanted:
            budget.left_out.append(f"{missing}: {totals.empty} had equal rewards in every group")
            return
        if totals.batches:
            print(f"{name}: {totals.batches} of {wanted} batches", flush=True)
            yield totals.batches


def _ready(task: str, stage: str, args: argparse.Namespace, budget: Budget) -> bool:
    """Whether the weights of a stage are there; those of the late one are trained."""
    if stage == "early":
        return True
    config = trained(task, args.runs, args.overrides)
    folder = Path(config.output_dir)
    if (folder / "final").is_dir():
        return True
    if not budget.allows(f"{task}, {stage}: the training run and all batches"):
        return False
    started = bool(list_checkpoints(folder / CHECKPOINTS))
    Trainer(config, resume=folder if started else None).run()
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gradients",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="of the recipes, such as seed=1")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(DEFAULT))
    parser.add_argument("--batches", type=int, default=8, help="of each task and stage")
    add_study_arguments(parser, SUITE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
