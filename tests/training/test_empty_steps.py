"""Steps without anything to learn from: said, counted, and not for ever."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from egspo.runs.checkpoint import list_checkpoints
from egspo.runs.metrics import read_metrics
from egspo.tasks import Reward
from egspo.training.empty_steps import EMPTY, EmptyRunError
from egspo.training.trainer import train
from tests.helpers import runs

pytestmark = pytest.mark.usefixtures("letters")

EGSPO = {**runs.LETTERS, "algorithm": {"stepwise": False}, "eval": {"every": 0}}


def nothing(completions: Sequence[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def same(completions: Sequence[str], **_: Any) -> list[float]:
    return [0.25] * len(completions)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (nothing, "none of the 8 completions has a reward"),
        (same, "in 2 groups all completions have the same reward, 0.25 on average"),
    ],
)
def test_a_run_that_cannot_learn_says_why_and_ends_with_an_error(
    tmp_path: Path, function: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    runs.rewards[:] = [Reward("some", function)]
    config = runs.config(tmp_path / "run", EGSPO, {"max_empty_steps": 3, "steps": 9})
    with caplog.at_level(logging.WARNING), pytest.raises(EmptyRunError, match=reason):
        train(config)
    assert caplog.text.count("step 1 made no update: " + reason) == 1
    assert caplog.text.count("made no update") == 1
    records = read_metrics(tmp_path / "run")
    assert [record[EMPTY] for record in records[1:]] == [1, 2, 3]
    assert not (tmp_path / "run" / "final").exists()
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")][-1:] == [
        "step-000003"
    ]


def test_the_count_goes_on_where_a_run_was_interrupted(tmp_path: Path) -> None:
    runs.rewards[:] = [Reward("some", same)]
    changes = (EGSPO, {"max_empty_steps": 4})
    train(runs.config(tmp_path / "run", *changes, {"steps": 3}))
    with pytest.raises(EmptyRunError, match="4 steps in a row, up to step 4"):
        train(runs.config(tmp_path / "run", *changes, {"steps": 9}), resume=tmp_path / "run")


def test_an_update_begins_the_count_again(tmp_path: Path) -> None:
    calls = 0

    def sometimes(completions: Sequence[str], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return runs.varied(completions) if calls % 5 == 0 else same(completions)

    runs.rewards[:] = [Reward("some", sometimes)]
    train(runs.config(tmp_path / "run", EGSPO, {"max_empty_steps": 99, "steps": 6}))
    counts = [record[EMPTY] for record in read_metrics(tmp_path / "run")[1:]]
    assert counts[0] == 1 and 0 in counts
    assert all(count in (0, before + 1) for before, count in itertools.pairwise(counts))
