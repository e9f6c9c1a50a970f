"""From measured batches to result files, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gradients.measure import Totals
from benchmarks.gradients.study import STAGES, TASKS, Estimator, full
from benchmarks.study_files import read_studies, write_study
from egspo.config import TrainConfig
from egspo.inspection.plotting import mean_interval

SUITE = "gradients"


def stage_record(totals: Totals, compared: Sequence[Estimator]) -> dict[str, Any]:
    """What a result file has of a stage: means over batches, half-widths of their 95 % intervals,
    and the variance over batches."""
    whole = totals.variance(full().name)
    found: dict[str, Any] = {}
    for name in (full().name, *(each.name for each in compared)):
        rows, variance = totals.rows[name], totals.variance(name)
        squares = sum(row["norm"] ** 2 for row in rows) / len(rows)
        found[name] = {
            **{key: _interval([row[key] for row in rows]) for key in rows[0]},
            "variance": variance,
            "variance_of_all": variance / whole if variance is not None and whole else None,
            "noise": variance / squares if variance is not None else None,
            "bound": [bound_constant(row) for row in rows],
            "ahead": _ahead(totals, name),
        }
    columns = {key: [step[key] for step in totals.steps] for key in ("norm", "entropy")}
    return {
        "batches": totals.batches,
        "empty_batches": totals.empty,
        "seconds": round(sum(totals.seconds), 1),
        "estimators": found,
        "steps": {
            key: [sum(column) / len(column) for column in zip(*values, strict=True)]
            for key, values in columns.items()
        },
    }


def _ahead(totals: Totals, name: str) -> list[float | None] | None:
    """Cosine less that of the steps of largest entropy with the same K, batch by batch; None where
    there is no such selection."""
    other = f"high_entropy, {name.rpartition(', ')[2]}"
    if name == other or other not in totals.rows:
        return None
    pairs = zip(totals.rows[name], totals.rows[other], strict=True)
    return _interval([mine["cosine"] - theirs["cosine"] for mine, theirs in pairs])


def bound_constant(row: Mapping[str, float]) -> float | None:
    """The least B of ``distance <= B x entropy left out``; None where nothing was left out."""
    if "distance" not in row or row["left_out"] <= 0:
        return None
    return row["distance"] / row["left_out"]


def _interval(values: Sequence[float]) -> list[float | None]:
    """Mean and half-width."""
    return list(mean_interval(values))


def write(
    path: Path,
    task: str,
    config: TrainConfig,
    stages: Mapping[str, Any],
    made_by: Mapping[str, Any],
    left_out: Sequence[str],
) -> None:
    """The result file of a task.

    Args:
        path: replaced as a whole.
        task: of the file.
        config: of the batches.
        stages: :func:`stage_record` by stage, each with the provenance of its command.
        made_by: :func:`benchmarks.hardware.provenance` of the command that writes the file.
        left_out: what it had no time for.
    """
    content = {
        **made_by,
        "suite": SUITE,
        "task": task,
        "recipe": TASKS[task].task.recipe,
        "settings": _settings(config),
        "left_out": list(left_out),
        "stages": dict(stages),
    }
    write_study(path, content)


def _settings(config: TrainConfig) -> dict[str, Any]:
    return {
        "prompts": config.prompts_per_step,
        "group_size": config.algorithm.group_size,
        "denoising_steps": config.generation.steps,
        "new_tokens": config.generation.max_new_tokens,
        "block_length": config.generation.block_length,
        "temperature": config.generation.temperature,
        "policy": config.generation.policy,
        "seed": config.seed,
    }


def stages_so_far(path: Path, config: TrainConfig) -> dict[str, Any]:
    """The stages in the result file at ``path``; empty where there is none.

    Raises:
        ValueError: it is of other settings, with which these must not be mixed.
    """
    if not path.exists():
        return {}
    content = read(path)
    if content["settings"] != _settings(config):
        raise ValueError(f"{path} is of other settings: give another --results, or the same")
    stages: dict[str, Any] = content["stages"]
    return stages


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ValueError: it is not one of this suite.
    """
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    known = content.get("suite") == SUITE and content.get("task") in TASKS
    if not known or not set(content.get("stages", {})) <= set(STAGES):
        raise ValueError(f"{path} is not a result file of python -m benchmarks.gradients")
    return content


def read_all(folder: Path) -> list[dict[str, Any]]:
    """The result files of a folder, in the order of :data:`TASKS`.

    Raises:
        ValueError: one is not of this suite, or there are two of a task.
    """
    return read_studies(folder, SUITE, TASKS, read)
