"""The metrics of others beside the score."""

from __future__ import annotations

import pytest

from egspo.evaluations.metrics import metric_means
from egspo.tasks import build_task
from egspo.tasks.prompts import PromptSet
from egspo.tasks.sudoku import Puzzle


def test_sudoku_by_cells_of_all_puzzles_and_by_puzzles_solved() -> None:
    task = build_task("sudoku", empty_cells=[4, 12], train_examples=1, test_examples=30)
    easy, hard = sorted(task.test, key=lambda example: example.columns["puzzle"].count("0"))[::29]
    prompts = PromptSet([easy, hard], [[], []])
    right = hard.columns["solution"]
    records = [
        {"index": 0, "completion": "<answer>0000000000000000</answer>"},
        {"index": 1, "completion": f"<answer>{right}</answer>"},
    ]
    texts = [record["completion"] for record in records]
    assert task.solved is not None
    assert task.solved(prompts=[], completions=texts, **prompts.columns([0, 1])) == [0.0, 1.0]
    empty = [
        len(Puzzle(e.columns["puzzle"], e.columns["solution"]).empty) for e in prompts.examples
    ]
    assert empty[0] < empty[1]
    # Not the mean of the two shares, 0.5.
    assert metric_means(task, prompts, records) == {
        "published": pytest.approx(empty[1] / sum(empty))
    }
    assert metric_means(task, prompts, []) == {}
