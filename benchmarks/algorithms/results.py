"""What runs cost and gained: from their metrics to result files, and from those to comparisons."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.algorithms.study import METHODS, PROVENANCE, TASKS, Run
from egspo.files import replacing
from egspo.inspection.plotting import mean_interval
from egspo.runs.metrics import read_metrics

SUITE = "algorithms"
PHASES = ("rollout", "score", "update")


def points(records: Sequence[Mapping[str, Any]], sequences: int) -> list[dict[str, Any]]:
    """A point for every evaluation of a run, with all that was spent up to there.

    Args:
        records: metrics of the run.
        sequences: completions sampled in a step.

    Returns:
        Of each: ``step``, held-out ``reward`` and ``solved``, ``samples`` (completions),
        ``gradient_steps``, FLOPs of each phase, and ``seconds`` of the phases together.
    """
    made = []
    spent = {"samples": 0, "gradient_steps": 0, "seconds": 0.0, **dict.fromkeys(PHASES, 0)}
    for record in records:
        if record["step"] > 0:
            spent["samples"] += sequences
            spent["gradient_steps"] += record["updates"]
            spent["seconds"] += sum(record[f"time/{phase}"] for phase in PHASES)
            for phase in PHASES:
                spent[phase] += record[f"flops/{phase}"]
        if record.get("eval/reward") is not None:
            made.append(
                {
                    "step": record["step"],
                    "reward": record["eval/reward"],
                    "solved": record.get("eval/solved"),
                    "samples": spent["samples"],
                    "gradient_steps": spent["gradient_steps"],
                    "flops": {phase: spent[phase] for phase in PHASES},
                    "seconds": round(spent["seconds"], 3),
                }
            )
    return made


def write(path: Path, task: str, runs: Sequence[Run], command: Mapping[str, Any]) -> None:
    """The result file of the finished runs of a task.

    Args:
        path: replaced as a whole.
        task: of the runs.
        runs: at least one.
        command: :func:`benchmarks.hardware.provenance` of the command that writes it; each run
            has the commit and command that made it.
    """
    config = runs[0].config
    content = {
        **command,
        "suite": SUITE,
        "task": task,
        "recipe": TASKS[task].recipe,
        "settings": {
            "prompts_per_step": config.prompts_per_step,
            "group_size": config.algorithm.group_size,
            "selected_steps": config.algorithm.selected_steps,
            "denoising_steps": config.generation.steps,
            "learning_rate": config.optimizer.learning_rate,
            "temperature": config.generation.temperature,
            "steps": config.steps,
        },
        "methods": {
            method: {
                "overrides": list(METHODS[method].overrides),
                "runs": [_run_record(run) for run in runs if run.method == method],
            }
            for method in dict.fromkeys(run.method for run in runs)
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _run_record(run: Run) -> dict[str, Any]:
    made = json.loads((run.folder / PROVENANCE).read_text("utf-8"))
    sequences = run.config.prompts_per_step * run.config.algorithm.group_size
    return {
        "seed": run.seed,
        "commit": made["commit"],
        "cpu_seconds": round(made["cpu_seconds"], 1),
        "points": points(read_metrics(run.folder), sequences),
    }


def read_all(folder: Path) -> list[dict[str, Any]]:
    """The result files of this suite in a folder, in the order of :data:`TASKS`.

    Raises:
        ValueError: one of a task that does not exist, or two of the same task.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{SUITE}-*.json")):
        content = json.loads(path.read_text("utf-8"))
        if content.get("suite") != SUITE or content.get("task") not in TASKS:
            raise ValueError(f"{path} is not a result file of python -m benchmarks.algorithms")
        if content["task"] in found:
            raise ValueError(f"{path} is a second result file of the task {content['task']!r}")
        found[content["task"]] = content
    return [found[task] for task in TASKS if task in found]


def total_flops(point: Mapping[str, Any]) -> int:
    return sum(point["flops"].values())


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the ends of its 95% interval; None where there is no such end."""

    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """One method on one task, over seeds."""

    method: str
    seeds: int
    reward: Estimate
    """Held-out, at the last step."""
    gain: Estimate
    """Since step 0."""
    solved: Estimate
    tflops: float
    """Of rollout, score and update, mean over seeds."""
    samples: float
    gradient_steps: float
    tflops_per_gain: Estimate
    """Per 0.1 of reward; likewise"""
    samples_per_gain: Estimate
    gradient_steps_per_gain: Estimate
    at_budget: Estimate
    """Reward at the FLOPs that every run has spent."""
    behind_first: Estimate
    """The same less the first method's, seed by seed."""


def compare(content: Mapping[str, Any]) -> tuple[float, list[Comparison]]:
    """The budget in FLOPs that every run has spent, and the methods of a result file."""
    runs = {name: method["runs"] for name, method in content["methods"].items()}
    budget = min(total_flops(run["points"][-1]) for each in runs.values() for run in each)
    at_budget = {
        name: {run["seed"]: reward_at(run["points"], budget) for run in each}
        for name, each in runs.items()
    }
    first = next(iter(at_budget.values()))
    rows = []
    for name, each in runs.items():
        last = [run["points"][-1] for run in each]
        gains = [run["points"][-1]["reward"] - run["points"][0]["reward"] for run in each]
        costs = {
            "tflops": [total_flops(point) / 1e12 for point in last],
            "samples": [point["samples"] for point in last],
            "gradient_steps": [point["gradient_steps"] for point in last],
        }
        paired = [at - first[seed] for seed, at in at_budget[name].items() if seed in first]
        rows.append(
            Comparison(
                method=name,
                seeds=len(each),
                reward=estimate([point["reward"] for point in last]),
                gain=estimate(gains),
                solved=estimate([point["solved"] for point in last]),
                **{quantity: sum(values) / len(values) for quantity, values in costs.items()},
                **{
                    f"{quantity}_per_gain": cost_per_gain(values, gains)
                    for quantity, values in costs.items()
                },
                at_budget=estimate(list(at_budget[name].values())),
                behind_first=estimate(paired),
            )
        )
    return budget, rows


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and Student interval."""
    mean, half = mean_interval(list(values))
    return Estimate(mean, None, None) if half is None else Estimate(mean, mean - half, mean + half)


def cost_per_gain(costs: Sequence[float], gains: Sequence[float], unit: float = 0.1) -> Estimate:
    """What ``unit`` of reward cost: the inverse of the mean gain per cost and of its interval.

    A gain that is not told from zero leaves the upper end open; one that is not positive has no
    cost at all.
    """
    rate = estimate([gain / cost for gain, cost in zip(gains, costs, strict=True)])
    ends = (rate.mean, rate.high, rate.low)
    inverse = [unit / end if end is not None and end > 0 else None for end in ends]
    return Estimate(*inverse)


def reward_at(run: Sequence[Mapping[str, Any]], flops: float) -> float:
    """Held-out reward after ``flops``, linear between evaluations.

    Raises:
        ValueError: the run did not spend as much.
    """
    spent = [total_flops(point) for point in run]
    for before, after, left, right in zip(run, run[1:], spent, spent[1:], strict=False):
        if left <= flops <= right:
            share = (flops - left) / (right - left)
            return float(before["reward"] + share * (after["reward"] - before["reward"]))
    raise ValueError(f"the run spent {spent[-1]:.4g} FLOPs, less than {flops:.4g}")
