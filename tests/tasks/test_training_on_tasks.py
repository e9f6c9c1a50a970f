"""What tasks and their options change in a run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from egspo.config import SFTConfig
from egspo.rewards.scoring import RewardError
from egspo.runs.metrics import read_metrics
from egspo.tasks import Reward
from egspo.tasks.prompts import build_data, supervised_examples
from egspo.training.trainer import train
from tests.helpers import runs

COUNTDOWN = {
    "name": "countdown",
    "options": {
        "prompt_style": "digits",
        "largest": 9,
        "train_examples": 20,
        "validation_examples": 6,
        "test_examples": 4,
    },
}


@pytest.fixture
def hanging() -> Iterator[None]:
    """The task's first reward function hangs on its second call, and on all later ones."""
    over, calls = threading.Event(), []

    def slow(completions: list[str], **_: Any) -> list[float]:
        calls.append(completions)
        if len(calls) > 1:
            over.wait(60)
        return [0.5] * len(completions)

    runs.rewards[:] = [Reward("slow", slow), Reward("varied", runs.varied)]
    yield
    over.set()
    runs.rewards.clear()


def test_training_goes_on_without_a_reward_that_hangs(tmp_path: Path, hanging: None) -> None:
    task = {"on_reward_error": "skip", "reward_timeout": 0.1}
    train(runs.config(tmp_path, runs.LETTERS, {"task": task, "steps": 2}))
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [0, 1, 2]
    assert [record.get("skipped/rewards") for record in records[1:]] == [8, 8]
    assert records[1]["reward/varied"] is not None


def test_a_reward_that_hangs_stops_the_run(tmp_path: Path, hanging: None) -> None:
    with pytest.raises(RewardError, match=r"'slow' did not return within 0\.1 s"):
        train(runs.config(tmp_path, runs.LETTERS, {"task": {"reward_timeout": 0.1}}))


def test_time_limits_of_the_task_are_kept(tmp_path: Path) -> None:
    runs.rewards[:] = [Reward("a", runs.ones, timeout=7), Reward("b", runs.ones, timeout=None)]
    try:
        kept = build_data(runs.config(tmp_path, runs.LETTERS)).task.rewards
        changed = build_data(
            runs.config(tmp_path, runs.LETTERS, {"task": {"reward_timeout": 9}})
        ).task.rewards
    finally:
        runs.rewards.clear()
    assert [reward.timeout for reward in kept] == [7, None]
    assert [reward.timeout for reward in changed] == [9, 9]


def test_training_is_evaluated_on_validation_examples(tmp_path: Path) -> None:
    config = runs.config(tmp_path, {"task": None}, {"task": COUNTDOWN})
    data = build_data(config)
    assert data.held_out.examples == data.task.validation
    config.eval.examples = 5
    assert build_data(config).held_out.examples == data.task.validation[:5]
    none = {"task": {"options": {"validation_examples": 0}}}
    without = build_data(runs.config(tmp_path, {"task": None}, {"task": COUNTDOWN}, none))
    assert without.held_out.examples == without.task.test


def test_no_supervised_example_is_held_out(tmp_path: Path) -> None:
    config = runs.config(tmp_path, {"task": None}, {"task": COUNTDOWN})
    config.sft = SFTConfig(task_options={"careless": 1.0})
    data = build_data(config)
    assert len(supervised_examples(config, data)) == 20
    leaked = replace(data.task, validation=[data.task.train[3]])
    with pytest.raises(ValueError, match="makes a held-out prompt supervised example 3"):
        supervised_examples(config, replace(data, task=leaked))


@pytest.mark.slow
def test_a_small_model_trains_on_countdown(tmp_path: Path) -> None:
    length = {"generation": {"max_new_tokens": 10, "block_length": 10}}
    train(runs.config(tmp_path, {"task": None}, {"task": COUNTDOWN, "steps": 1}, length))
    record = read_metrics(tmp_path)[-1]
    assert 0 <= record["reward/expression"] <= 1
    assert 0 <= record["eval/solved"] <= 1
