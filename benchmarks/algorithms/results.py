"""What runs cost and gained: from their metrics to result files, and from those to comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.algorithms.statistics import Estimate, area, differences, estimate, seeds_needed
from benchmarks.algorithms.study import PROVENANCE, TASKS, Arm, Run
from benchmarks.study_files import read_studies, write_study
from egspo.runs.metrics import read_metrics

SUITE = "algorithms"
VERSION = 2
"""Of the format: files of another one are refused."""
PHASES = ("rollout", "score", "update")
COSTS = ("flops", "seconds")


def points(records: Sequence[Mapping[str, Any]], sequences: int) -> list[dict[str, Any]]:
    """A point for every evaluation of a run, with all that was spent up to there.

    Args:
        records: metrics of the run.
        sequences: completions sampled in a step.

    Returns:
        Of each: ``step``, held-out ``reward`` and ``solved``, ``samples`` (completions),
        ``gradient_steps``, and the ``flops`` and ``seconds`` of rollout, scoring and update.
    """
    made = []
    spent = {"samples": 0, "gradient_steps": 0, "flops": 0, "seconds": 0.0}
    for record in records:
        if record["step"] > 0:
            spent["samples"] += sequences
            spent["gradient_steps"] += record["updates"]
            spent["seconds"] += sum(record[f"time/{phase}"] for phase in PHASES)
            spent["flops"] += sum(record[f"flops/{phase}"] for phase in PHASES)
        if record.get("eval/reward") is not None:
            made.append(
                {
                    "step": record["step"],
                    "reward": record["eval/reward"],
                    "solved": record.get("eval/solved"),
                    **spent,
                    "seconds": round(spent["seconds"], 3),
                }
            )
    return made


def run_record(run: Run) -> dict[str, Any]:
    """What a result file has of a finished run."""
    made = json.loads((run.folder / PROVENANCE).read_text("utf-8"))
    sequences = run.config.prompts_per_step * run.config.algorithm.group_size
    return {
        "seed": run.seed,
        "rate": run.rate,
        "commit": made["commit"],
        "cpu_seconds": round(made["cpu_seconds"], 1),
        "points": points(read_metrics(run.folder), sequences),
    }


def best_rate(tuning: Sequence[Mapping[str, Any]]) -> float:
    """The learning rate of the largest mean area under the curve over the FLOPs that every tuning
    run of the arm has spent; of equal ones the smallest."""
    budget = min(run["points"][-1]["flops"] for run in tuning)
    by_rate: dict[float, list[float]] = {}
    for run in tuning:
        by_rate.setdefault(run["rate"], []).append(area_of(run, "flops", budget))
    return max(sorted(by_rate), key=lambda rate: sum(by_rate[rate]) / len(by_rate[rate]))


def area_of(run: Mapping[str, Any], cost: str, budget: float) -> float:
    """Mean held-out reward while ``budget`` of ``cost`` is spent."""
    found = run["points"]
    return area([point[cost] for point in found], [point["reward"] for point in found], budget)


@dataclass
class ArmRuns:
    """The runs of an arm so far."""

    arm: Arm
    rate: float | None = None
    """Chosen, or the only one."""
    tuning: list[dict[str, Any]] | None = None
    runs: list[dict[str, Any]] | None = None

    def record(self) -> dict[str, Any]:
        """What a result file has of it."""
        arm = self.arm
        return {
            **{"method": arm.method, "k": arm.k, "lam": arm.lam, "optimizer": arm.optimizer},
            "overrides": arm.overrides,
            "rate": self.rate,
            "tuning": self.tuning or [],
            "runs": self.runs or [],
        }


def write(
    path: Path,
    task: str,
    found: Sequence[ArmRuns],
    settings: Mapping[str, Any],
    command: Mapping[str, Any],
    left_out: Sequence[str],
) -> None:
    """The result file of the finished runs of a task.

    Args:
        path: replaced as a whole.
        task: of the runs.
        found: by arm.
        settings: sizes that all runs of the task share.
        command: :func:`benchmarks.hardware.provenance` of the command that writes it; each run
            has the commit that made it.
        left_out: runs there was no time for.
    """
    content = {
        **command,
        **{"suite": SUITE, "version": VERSION, "task": task},
        "recipe": TASKS[task].task.recipe,
        "settings": dict(settings),
        "left_out": list(left_out),
        "arms": [each.record() for each in found if each.tuning or each.runs],
    }
    write_study(path, content)


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ValueError: it is of another format or of a task that does not exist.
    """
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    kind = content.get("suite"), content.get("version")
    if kind != (SUITE, VERSION) or content.get("task") not in TASKS:
        raise ValueError(f"{path} is not a result file of python -m benchmarks.algorithms")
    return content


def read_all(folder: Path) -> list[dict[str, Any]]:
    """The result files of this suite in a folder, in the order of :data:`TASKS`.

    Raises:
        ValueError: one of another format or of a task that does not exist, or two of a task.
    """
    return read_studies(folder, SUITE, TASKS, read)


@dataclass(frozen=True)
class Comparison:
    """An arm over seeds, and against its reference seed by seed."""

    arm: Arm
    rate: float
    tuned: bool
    """Whether the learning rate was chosen among several."""
    seeds: int
    flops: float
    """Of a run, mean."""
    end: Estimate
    """Held-out reward at the last step."""
    area: Estimate
    """Mean reward over the budget of FLOPs."""
    paired: dict[str, Estimate | None]
    """By cost, the area less the reference's; None where no seed is common, or of the reference."""
    seeds_needed: int | None
    """To see half of the difference over FLOPs."""


def compare(
    content: Mapping[str, Any], optimizer: str
) -> tuple[dict[str, float], list[Comparison]]:
    """The budgets that every run of a task with an ``optimizer`` has spent, and its arms."""
    chosen = [arm for arm in content["arms"] if arm["optimizer"] == optimizer and arm["runs"]]
    every = [run for arm in chosen for run in arm["runs"]]
    if not every:
        return {}, []
    budgets = {cost: min(run["points"][-1][cost] for run in every) for cost in COSTS}
    areas = {
        _arm(content, arm): {
            cost: {run["seed"]: area_of(run, cost, budgets[cost]) for run in arm["runs"]}
            for cost in COSTS
        }
        for arm in chosen
    }
    rows = []
    for each in chosen:
        arm, last = _arm(content, each), [run["points"][-1] for run in each["runs"]]
        other = None if arm == arm.reference else areas.get(arm.reference)
        found = {
            cost: differences(areas[arm][cost], other[cost]) if other else [] for cost in COSTS
        }
        rows.append(
            Comparison(
                arm=arm,
                rate=each["rate"],
                tuned=bool(each["tuning"]),
                seeds=len(each["runs"]),
                flops=sum(point["flops"] for point in last) / len(last),
                end=estimate([point["reward"] for point in last]),
                area=estimate(areas[arm]["flops"].values()),
                paired={cost: estimate(d) if d else None for cost, d in found.items()},
                seeds_needed=seeds_needed(found["flops"]),
            )
        )
    return budgets, rows


def _arm(content: Mapping[str, Any], record: Mapping[str, Any]) -> Arm:
    return Arm(content["task"], *(record[key] for key in ("method", "k", "lam", "optimizer")))
