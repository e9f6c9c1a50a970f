"""A run goes on with the data that it began with, or says what is not the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from egspo.files import CheckpointError
from egspo.tasks import Reward
from egspo.tasks.sudoku import make_puzzles, split_grids, write_csv
from egspo.training.data_identity import DATA_FILE
from egspo.training.trainer import train
from egspo.training.warm_start import run_sft
from tests.helpers import runs

SFT = {"sft": {"steps": 2, "batch_size": 2}, "checkpoint": {"every": 1}}


@pytest.fixture
def puzzles(tmp_path: Path) -> Path:
    """A file of puzzles for training and testing, in the recipe's task."""
    file = tmp_path / "puzzles.csv"
    for grids, name in zip(split_grids(48, 0), ("train", "test"), strict=True):
        made = make_puzzles(grids, 8, (6, 10), 0, name)
        write_csv(tmp_path / f"{name}.csv", made)
    lines = (tmp_path / "train.csv").read_text().splitlines()
    file.write_text("\n".join([*lines, *(tmp_path / "test.csv").read_text().splitlines()[1:]]))
    return file


def other_order(lines: list[str]) -> list[str]:
    return [lines[0], *reversed(lines[1:9]), *lines[9:]]


def fewer(lines: list[str]) -> list[str]:
    return [*lines[:1], *lines[3:]]


def swapped(lines: list[str]) -> list[str]:
    """Another training puzzle."""
    puzzle, solution = lines[1].split(",")
    return [lines[0], f"{solution[:6]}{puzzle[6:]},{solution}", *lines[2:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(other_order, "the training examples in another order", marks=pytest.mark.slow),
        pytest.param(fewer, "8 training examples, now 6", marks=pytest.mark.slow),
        (swapped, "other training prompts"),
        pytest.param(
            lambda lines: lines[:-1], "8 held-out examples, now 7", marks=pytest.mark.slow
        ),
    ],
)
def test_changed_data_is_refused_by_what_differs_and_allowed_on_request(
    puzzles: Path,
    tmp_path: Path,
    change: Callable[[list[str]], list[str]],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"path": str(puzzles), "empty_cells": None, "train_examples": 8, "test_examples": 8}
    task: dict[str, Any] = {"task": {"options": options}, "steps": 1}
    run = tmp_path / "run"
    train(runs.config(run, task))
    puzzles.write_text("\n".join(change(puzzles.read_text().splitlines())))
    longer = {**task, "steps": 2}
    with pytest.raises(CheckpointError, match=message):
        train(runs.config(run, longer), resume=run)
    with caplog.at_level(logging.WARNING):
        train(runs.config(run, longer, {"allow_changed_data": True}), resume=run)
    assert message in caplog.text
    train(runs.config(run, {**task, "steps": 3}), resume=run)  # which is now the run's own


def test_targets_count_and_so_do_those_of_supervised_training(
    tmp_path: Path, letters: list[Reward]
) -> None:
    letters.append(Reward("ones", runs.ones))
    recipe = {**runs.LETTERS, **SFT}
    run = tmp_path / "run"
    run_sft(runs.config(run, recipe))
    changed = {"task": {"options": {"target": "222222"}}, "sft": {"steps": 3}}
    saved = json.loads((run / DATA_FILE).read_text())
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("options: {}", "options: {target: '222222'}", 1)
    )
    with pytest.raises(CheckpointError, match="other targets of training examples; other targets"):
        run_sft(runs.config(run, recipe, changed), resume=run)
    assert json.loads((run / DATA_FILE).read_text()) == saved


def test_runs_without_a_fingerprint_go_on_with_a_warning_and_damage_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    train(runs.config(run, {"steps": 1}))
    (run / DATA_FILE).unlink()
    with caplog.at_level(logging.WARNING):
        train(runs.config(run, {"steps": 2}), resume=run)
    assert "whether its data was the same is not known" in caplog.text
    for damage in ("", "{}", "[1]"):
        (run / DATA_FILE).write_text(damage)
        with pytest.raises(CheckpointError, match=r"data\.json is damaged"):
            train(runs.config(run, {"steps": 3}), resume=run)
