"""Whether choosing steps by entropy helps, and which method is worth what it costs.

    python -m benchmarks.algorithms                      # everything; days on two cores
    python -m benchmarks.algorithms --hours 8            # the most telling first
    python -m benchmarks.algorithms --tasks sudoku --methods high_entropy uniform random \\
        --lams 0 --optimizers adamw --adamw-rates 1e-4

Every run of a task starts from the same warm start. Learning rates are chosen for each method, K,
lambda and optimizer by the area under the curve on seeds that the comparison does not use; with one
rate there is nothing to choose. A run that is finished is not made again, one that was interrupted
is resumed. After every run the result files in --results are written anew from what is finished.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.algorithms.methods import METHODS
from benchmarks.algorithms.results import SUITE, ArmRuns, best_rate, run_record, write
from benchmarks.algorithms.study import (
    OPTIMIZERS,
    TASKS,
    TUNING_SEEDS,
    Arm,
    Run,
    arms,
    tiers,
)
from benchmarks.budget import Budget
from benchmarks.hardware import provenance
from benchmarks.study_files import add_study_arguments, exit_code
from egspo.config.recipe import load_config


class Study:
    """The runs of a command, and what has been made of them.

    Args:
        args: of the command line.
        made_by: :func:`benchmarks.hardware.provenance` of it.
    """

    def __init__(self, args: argparse.Namespace, made_by: Mapping[str, Any]) -> None:
        self.args, self.made_by = args, made_by
        self.budget = Budget(args.hours)
        self.found: dict[Arm, ArmRuns] = {}
        self.seconds: dict[str, list[float]] = {}
        self.rates = {name: getattr(args, f"{name}_rates") for name in OPTIMIZERS}

    def make(self) -> None:
        """All runs, tier by tier over all tasks."""
        args = self.args
        every = [
            arm
            for task in args.tasks
            for arm in arms(task, args.methods, args.optimizers, args.ks, args.lams)
        ]
        for arm in every:  # a bad combination is found before the first run
            for rate in self.rates[arm.optimizer]:
                self._run(arm, rate, args.seeds[0])
        for tier in tiers(every, args.optimizers, args.lams):
            for task in args.tasks:
                self._tier([arm for arm in tier if arm.task == task])

    def _tier(self, tier: Sequence[Arm]) -> None:
        for arm in tier:
            self.found[arm] = ArmRuns(arm, tuning=[], runs=[])
        for seed in self.args.tuning_seeds:
            for arm in tier:
                rates = self.rates[arm.optimizer]
                for rate in rates if len(rates) > 1 else []:
                    self._perform(self._run(arm, rate, seed), self.found[arm].tuning)
        for arm in tier:
            self._choose(arm)
        for seed in self.args.seeds:
            for arm in tier:
                rate = self.found[arm].rate
                if rate is None:
                    self.budget.left_out.append(
                        f"{arm.task}: {arm.name}, {arm.optimizer}, "
                        f"seed {seed}: its learning rate is not chosen"
                    )
                else:
                    self._perform(self._run(arm, rate, seed), self.found[arm].runs)

    def _choose(self, arm: Arm) -> None:
        """The learning rate of an arm, where all of its tuning runs are there."""
        rates, of = self.rates[arm.optimizer], self.found[arm]
        if len(rates) == 1:
            of.rate = rates[0]
        elif len(of.tuning or []) == len(rates) * len(self.args.tuning_seeds):
            of.rate = best_rate(of.tuning or [])

    def _run(self, arm: Arm, rate: float, seed: int) -> Run:
        return Run.of(arm, rate, seed, self.args.runs, self.args.overrides)

    def _perform(self, run: Run, records: list[dict[str, Any]] | None) -> None:
        """Make a run where it is missing and there is time, and write what is there."""
        assert records is not None
        task = run.arm.task
        if not run.finished:
            known = self.seconds.get(task, [])
            expected = sum(known) / len(known) if known else 0.0
            if not self.budget.allows(run.name, expected):
                return
            self.seconds.setdefault(task, []).append(run.make(self.made_by))
            print(run.name, flush=True)
        records.append(run_record(run))
        self.write(task)

    def write(self, task: str) -> None:
        """The result file of a task, of what is finished."""
        found = [each for arm, each in self.found.items() if arm.task == task]
        if not any(each.tuning or each.runs for each in found):
            return
        of = TASKS[task].task
        config = load_config(of.path, [*of.overrides, *self.args.overrides])
        settings = {
            "steps": config.steps,
            "prompts_per_step": config.prompts_per_step,
            "group_size": config.algorithm.group_size,
            "denoising_steps": config.generation.steps,
            "temperature": config.generation.temperature,
            "held_out": config.eval.examples or "all",
            "rates": self.rates,
            "tuning_seeds": self.args.tuning_seeds,
        }
        left = [name for name in self.budget.left_out if name.startswith(f"{task}: ")]
        path = self.args.results / f"{SUITE}-{task}.json"
        write(path, task, found, settings, self.made_by, left)


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    given = sys.argv[1:] if arguments is None else arguments
    both = set(args.seeds) & set(args.tuning_seeds)
    if both:
        print(f"error: seeds {sorted(both)} are of the tuning too", file=sys.stderr)
        return 2

    def make() -> Budget:
        made_by = provenance(shlex.join(["python", "-m", "benchmarks.algorithms", *given]))
        study = Study(args, made_by)
        study.make()
        for task in args.tasks:
            study.write(task)
        return study.budget

    return exit_code(make)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.algorithms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="of the recipes, such as steps=200")
    for name, known in (("tasks", TASKS), ("methods", METHODS), ("optimizers", OPTIMIZERS)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--ks", nargs="+", type=int, help="selected steps; by default the task's")
    parser.add_argument("--lams", nargs="+", type=float, default=[0.0, 0.5], help="lambda")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--tuning-seeds", nargs="+", type=int, default=list(TUNING_SEEDS))
    for name, optimizer in OPTIMIZERS.items():
        parser.add_argument(
            *(f"--{name}-rates",), nargs="+", type=float, default=list(optimizer.rates)
        )
    add_study_arguments(parser, SUITE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
