"""What is measured: tasks, stages of training, and the selections that are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from benchmarks.small_tasks import ARITHMETIC, COUNTDOWN, SUDOKU, SmallTask
from egspo.config import AlgorithmConfig, TrainConfig
from egspo.config.options.algorithm import EntropyOver, EntropyReduce, Strategy
from egspo.config.recipe import load_config
from egspo.training.state import WEIGHTS

STRATEGIES = tuple(name for name in get_args(Strategy) if name != "all")
DEFAULT = tuple(name for name in STRATEGIES if not name.endswith("_reference"))
SHARES = (0.5, 0.7, 0.9)
"""Of adaptive K."""
STAGES = ("early", "late")


@dataclass(frozen=True)
class TaskSettings:
    """A task, and the sizes at which it is looked at."""

    task: SmallTask
    prompts: int
    """Of a batch."""
    ks: tuple[int, ...]
    definitions_k: int
    """K at which definitions of the entropy are compared."""


TASKS = {
    "sudoku": TaskSettings(SUDOKU, prompts=4, ks=(1, 2, 4, 8), definitions_k=2),
    "countdown": TaskSettings(COUNTDOWN, prompts=8, ks=(1, 2, 4), definitions_k=2),
    "arithmetic": TaskSettings(ARITHMETIC, prompts=2, ks=(1, 2, 4, 8), definitions_k=4),
}


@dataclass(frozen=True)
class Estimator:
    """A selection of steps, whose gradient stands for that of all of them."""

    name: str
    changes: dict[str, Any]
    """Of the algorithm."""

    def applied(self, config: TrainConfig) -> TrainConfig:
        return replace(config, algorithm=replace(config.algorithm, **self.changes))

    @property
    def entropy(self) -> tuple[str, str, str]:
        """Its definition, as the rollout needs it."""
        default = AlgorithmConfig()
        names = ("entropy_over", "entropy_reduce", "entropy_at")
        over, reduce, at = (self.changes.get(name, getattr(default, name)) for name in names)
        return over, reduce, at


def full() -> Estimator:
    """All steps, one optimizer step each: the gradients of single steps, which add up."""
    return Estimator("all", {"strategy": "all", "schedule": "per_step", "ranks_per_update": 1})


def estimators(
    settings: TaskSettings, config: TrainConfig, strategies: Sequence[str] = DEFAULT
) -> list[Estimator]:
    """Every selection that a task's gradients are measured of."""
    steps, made = config.generation.steps, []
    for strategy in strategies:
        for k in settings.ks:
            changes = {"strategy": strategy, "selected_steps": k}
            made.append(Estimator(f"{strategy}, K = {k}", changes))
    for share in SHARES:
        changes = {"strategy": "high_entropy", "entropy_share": share, "selected_steps": steps}
        made.append(Estimator(f"adaptive, {share:g} of the entropy", changes))
    for over, reduce, at in _definitions(config):
        name = f"high_entropy over {over}, {reduce}, temperature of {at}"
        values = {"entropy_over": over, "entropy_reduce": reduce, "entropy_at": at}
        k = settings.definitions_k
        made.append(
            Estimator(
                f"{name}, K = {k}", {"strategy": "high_entropy", "selected_steps": k, **values}
            )
        )
    return made


def _definitions(config: TrainConfig) -> Iterator[tuple[str, str, str]]:
    """All but the default one, and without those that mean the same as another here."""
    generation = config.generation
    for over in get_args(EntropyOver):
        if over == "block" and generation.block_length == generation.max_new_tokens:
            continue  # all masked positions are in the block
        if over == "masked" and generation.cache == "dual":
            continue  # its steps compute no hidden states of later blocks
        for reduce in get_args(EntropyReduce):
            if (over, reduce) == ("revealed", "sum") and generation.steps == (
                generation.max_new_tokens
            ):
                continue  # a token a step: its sum is its mean
            if (over, reduce) != ("revealed", "mean"):
                yield over, reduce, "one"
    yield "revealed", "mean", "sampling"


def trained(task: str, folder: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The run that the late gradients are taken at the end of."""
    of = TASKS[task].task
    changes = [*of.overrides, *overrides, f"output_dir={folder / task / 'training'}"]
    return load_config(of.path, changes)


def measured(task: str, stage: str, folder: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """How batches are rolled out and scored: EGSPO's advantages, each step's own log-probability,
    nothing clipped and no KL, so that gradients of steps add up."""
    changes = [
        *TASKS[task].task.overrides,
        *overrides,
        f"prompts_per_step={TASKS[task].prompts}",
        f"output_dir={folder / task / stage}",
        *("algorithm.preset=egspo", "algorithm.stepwise=false", "algorithm.aggregation=exact"),
        *("algorithm.beta=0", "algorithm.schedule=joint", "algorithm.num_iterations=1"),
    ]
    config = load_config(TASKS[task].task.path, changes)
    if stage == "early":
        return config
    final = Path(trained(task, folder, overrides).output_dir) / "final" / WEIGHTS
    return replace(config, model=replace(config.model, path=str(final), config=None), sft=None)
