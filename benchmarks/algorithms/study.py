"""The arms of the study and their runs: which there are, in which order, and how one is made."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.algorithms.methods import METHODS
from benchmarks.small_tasks import ARITHMETIC, COUNTDOWN, SUDOKU, SmallTask
from egspo.config import TrainConfig
from egspo.config.recipe import load_config
from egspo.runs.checkpoint import CHECKPOINTS, list_checkpoints
from egspo.runs.metrics import read_metrics
from egspo.training.continuation import check_continuation
from egspo.training.trainer import Trainer

PROVENANCE = "provenance.json"
TUNING_SEEDS = (100, 101)
"""Of the learning rates; the comparison must not use them."""


@dataclass(frozen=True)
class TaskSettings:
    """A task, and the K that its methods are compared at."""

    task: SmallTask
    ks: tuple[int, ...]


TASKS = {
    "sudoku": TaskSettings(SUDOKU, ks=(1, 2)),
    "countdown": TaskSettings(COUNTDOWN, ks=(1, 2)),
    "arithmetic": TaskSettings(ARITHMETIC, ks=(4,)),
}


@dataclass(frozen=True)
class Optimizer:
    """An optimizer and the learning rates that are tried."""

    overrides: tuple[str, ...]
    rates: tuple[float, ...]


OPTIMIZERS = {
    "adamw": Optimizer(("optimizer.name=adamw",), (3e-5, 1e-4, 3e-4)),
    "sgd": Optimizer(("optimizer.name=sgd", "optimizer.weight_decay=0"), (0.03, 0.1, 0.3)),
}


@dataclass(frozen=True)
class Arm:
    """What is compared: a method with its K, lambda and optimizer on a task."""

    task: str
    method: str
    k: int | None
    lam: float | None
    optimizer: str

    @property
    def name(self) -> str:
        k = "" if self.k is None else f", K = {self.k}"
        lam = "" if self.lam is None else f", λ = {self.lam:g}"
        return f"{self.method}{k}{lam}"

    @property
    def folder(self) -> Path:
        k = "" if self.k is None else f"-k{self.k}"
        lam = "" if self.lam is None else f"-lam{self.lam:g}"
        return Path(self.task) / self.optimizer / f"{self.method}{k}{lam}"

    @property
    def reference(self) -> Arm:
        """What it is compared with: the steps of largest entropy, with the same K, lambda and
        optimizer; where it has none, with the task's smallest K, and lambda 0.5."""
        k = TASKS[self.task].ks[0] if self.k is None else self.k
        lam = 0.5 if self.lam is None else self.lam
        return Arm(self.task, "high_entropy", k, lam, self.optimizer)

    @property
    def overrides(self) -> list[str]:
        """Of the recipe, but for the steps of an adaptive K."""
        made = list(METHODS[self.method].overrides)
        if self.k is not None:
            made.append(f"algorithm.selected_steps={self.k}")
        if self.lam is not None:
            made += [f"algorithm.stepwise={str(self.lam > 0).lower()}", f"algorithm.lam={self.lam}"]
        return made + list(OPTIMIZERS[self.optimizer].overrides)


def arms(
    task: str,
    methods: Sequence[str],
    optimizers: Sequence[str],
    ks: Sequence[int] | None = None,
    lams: Sequence[float] = (0.0, 0.5),
) -> list[Arm]:
    """The arms of a task, the most telling first: by the tier of the method, then by optimizer,
    lambda and K."""
    found = []
    for method in methods:
        of = METHODS[method]
        for k in (ks or TASKS[task].ks) if of.by_k else (None,):
            for lam in lams if of.by_lam else (None,):
                found += [Arm(task, method, k, lam, optimizer) for optimizer in optimizers]
    return sorted(found, key=lambda arm: tier_of(arm, optimizers, lams))


def tier_of(arm: Arm, optimizers: Sequence[str], lams: Sequence[float]) -> tuple[int, int, int]:
    """Arms of one tier are made together, seed by seed, so that they can be compared early."""
    lam = 0 if arm.lam is None else list(lams).index(arm.lam)
    return METHODS[arm.method].tier, optimizers.index(arm.optimizer), lam


@dataclass(frozen=True)
class Run:
    """An arm with a learning rate and a seed."""

    arm: Arm
    rate: float
    seed: int
    config: TrainConfig

    @classmethod
    def of(
        cls, arm: Arm, rate: float, seed: int, folder: Path, overrides: Sequence[str] = ()
    ) -> Run:
        """As it is to be made in ``folder``.

        Raises:
            CheckpointError: a run in its place has another configuration.
            ConfigError: the arm's configuration is invalid.
            ValueError: a run in its place is longer than asked for.
        """
        task = TASKS[arm.task].task
        place = folder / arm.folder / f"rate-{rate:g}" / f"seed-{seed}"
        changes = [
            *task.overrides,
            *("checkpoint.every=0", "checkpoint.keep_best=false", "eval.every=10"),
            *overrides,
            *arm.overrides,
            f"optimizer.learning_rate={rate}",
            f"seed={seed}",
            f"output_dir={place}",
        ]
        steps = load_config(task.path, [*task.overrides, *overrides]).generation.steps
        changes = [change.replace("{steps}", str(steps)) for change in changes]
        run = cls(arm, rate, seed, load_config(task.path, changes))
        if list_checkpoints(place / CHECKPOINTS):
            check_continuation(run.config, place, "train")
        if run.completed > run.config.steps:
            raise ValueError(
                f"{place} has run for {run.completed} steps, more than the {run.config.steps} "
                "asked for: give another folder, or as many steps"
            )
        return run

    @property
    def name(self) -> str:
        return f"{self.arm.task}: {self.arm.name}, {self.arm.optimizer} at {self.rate:g}, seed " + (
            str(self.seed)
        )

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def completed(self) -> int:
        """RL steps that its metrics hold."""
        try:
            records = read_metrics(self.folder)
        except FileNotFoundError:
            return 0
        return int(records[-1]["step"]) if records else 0

    @property
    def finished(self) -> bool:
        return self.completed >= self.config.steps and (self.folder / "final").is_dir()

    def make(self, made_by: Mapping[str, Any]) -> float:
        """Train, from the newest checkpoint where it was interrupted; returns the seconds.

        Args:
            made_by: :func:`benchmarks.hardware.provenance`, kept beside the run.
        """
        resume = self.folder if list_checkpoints(self.folder / CHECKPOINTS) else None
        self.folder.mkdir(parents=True, exist_ok=True)
        start, processor = time.monotonic(), time.process_time()
        Trainer(self.config, resume=resume).run()
        record = {**made_by, "cpu_seconds": time.process_time() - processor}
        (self.folder / PROVENANCE).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        return time.monotonic() - start


def tiers(
    found: Sequence[Arm], optimizers: Sequence[str], lams: Sequence[float]
) -> Iterator[list[Arm]]:
    """``found`` in groups of one tier, in their order."""
    order = sorted({tier_of(arm, optimizers, lams) for arm in found})
    for tier in order:
        yield [arm for arm in found if tier_of(arm, optimizers, lams) == tier]
