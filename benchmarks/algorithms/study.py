"""The runs of the study: which there are, and how each is made or continued."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egspo.config import TrainConfig
from egspo.config.recipe import load_config
from egspo.runs.checkpoint import CHECKPOINTS, list_checkpoints
from egspo.runs.metrics import read_metrics
from egspo.training.continuation import check_continuation
from egspo.training.trainer import Trainer

RECIPES = Path(__file__).parents[2] / "recipes"
PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Method:
    """An algorithm: what it changes in the recipe."""

    overrides: tuple[str, ...]


def _one_step(updates: int) -> Method:
    """One-step mean-field GRPO with d1's own clip range."""
    return Method(
        (
            *("algorithm.preset=egspo", "algorithm.objective=mean_field"),
            *("algorithm.ratio_temperature=one", f"algorithm.num_iterations={updates}"),
            *("algorithm.clip_low=0.5", "algorithm.clip_high=0.5"),
        )
    )


METHODS = {
    "EGSPO-SA": Method(("algorithm.preset=egspo-sa",)),
    "EGSPO": Method(("algorithm.preset=egspo",)),
    "uniform": Method(("algorithm.preset=uniform",)),
    "random": Method(("algorithm.preset=random",)),
    "all steps": Method(("algorithm.preset=egspo", "algorithm.strategy=all")),
    # As many inner updates as the others train steps: an iteration then costs what EGSPO's does.
    "one-step GRPO": _one_step(4),
    # As many optimizer steps as the others, for half the FLOPs.
    "one-step GRPO, 1 update": _one_step(1),
}


@dataclass(frozen=True)
class TaskSettings:
    """A task, and how long it is trained by default."""

    recipe: str
    title: str
    steps: int
    prompts: int
    """Per step."""


TASKS = {
    "sudoku": TaskSettings("sudoku_tiny", "4x4 Sudoku", steps=60, prompts=8),
    "countdown": TaskSettings("countdown_tiny", "Countdown, two numbers", steps=30, prompts=8),
}


@dataclass(frozen=True)
class Run:
    """One method with one seed on one task."""

    task: str
    method: str
    seed: int
    config: TrainConfig

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


def plan(
    task: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    overrides: Sequence[str] = (),
) -> list[Run]:
    """All runs of a task, seed by seed, so that an interrupted study has compared what it has.

    Raises:
        CheckpointError: a run in its place has another configuration.
        ConfigError: a method's configuration is invalid.
        ValueError: a run in its place is longer than asked for.
    """
    settings, runs = TASKS[task], []
    common = [
        f"steps={settings.steps}",
        f"prompts_per_step={settings.prompts}",
        "eval.every=10",
        "checkpoint.every=0",
        "checkpoint.keep_best=false",
        *overrides,
    ]
    for seed in seeds:
        for method in methods:
            place = folder / task / method.replace(",", "").replace(" ", "-") / f"seed-{seed}"
            changes = [*METHODS[method].overrides, *common, f"seed={seed}", f"output_dir={place}"]
            run = Run(task, method, seed, load_config(RECIPES / f"{settings.recipe}.yaml", changes))
            if list_checkpoints(place / CHECKPOINTS):
                check_continuation(run.config, place, "train")
            if run.completed > run.config.steps:
                raise ValueError(
                    f"{place} has run for {run.completed} steps, more than the "
                    f"{run.config.steps} asked for: give another folder, or as many steps"
                )
            runs.append(run)
    return runs


def execute(runs: Sequence[Run], made_by: Mapping[str, Any]) -> Iterator[Run]:
    """Make every run that is not finished; yields each as it is done.

    An interrupted run goes on from its newest checkpoint, and so does one that is to be longer.

    Args:
        runs: in their order.
        made_by: :func:`benchmarks.hardware.provenance`, kept beside each run that is made.
    """
    for run in runs:
        if run.finished:
            yield run
            continue
        resume = run.folder if list_checkpoints(run.folder / CHECKPOINTS) else None
        run.folder.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        Trainer(run.config, resume=resume).run()
        record = {**made_by, "cpu_seconds": time.process_time() - start}
        (run.folder / PROVENANCE).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        yield run
