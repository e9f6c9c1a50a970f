"""Rewards in the background: the same values, nothing scored twice, failures not lost."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from egspo.rewards.queue import RewardQueue
from egspo.rewards.scoring import RewardError, ScoredRewards, score_completions
from egspo.runs.metrics import deterministic, read_metrics
from egspo.tasks import Reward
from egspo.training.trainer import train
from tests.helpers import runs
from tests.training.test_trainer import LETTERS

LENGTH = Reward("length", lambda completions, **_: [float(len(text)) for text in completions])
FIRST = Reward("first", lambda completions, **_: [float(ord(text[0])) for text in completions], 0.5)


def score(rewards: Sequence[Reward], texts: Sequence[str], prompts: Sequence[int]) -> ScoredRewards:
    return score_completions(rewards, list(prompts), texts, {})


def test_parts_in_any_order_are_the_whole() -> None:
    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    with RewardQueue(score, [LENGTH, FIRST]) as queue:
        for places in ([3, 1], [4], [0, 2]):
            queue.add(places, [texts[i] for i in places], [0] * len(places))
        collected, scored = queue.collect(5)
    whole = score([LENGTH, FIRST], texts, [0] * 5)
    assert collected == texts
    assert torch.equal(scored.total, whole.total)
    for name, values in whole.per_function.items():
        assert torch.equal(scored.per_function[name], values)


def test_nothing_to_score() -> None:
    with RewardQueue(score, [LENGTH]) as queue:
        texts, scored = queue.collect(0)
    assert texts == [] and scored.total.shape == (0,) and list(scored.per_function) == ["length"]


def test_what_is_known_is_not_scored_again() -> None:
    calls: list[list[str]] = []

    def spy(completions: list[str], **_: Any) -> list[float | None]:
        calls.append(completions)
        return [None if text == "none" else float(len(text)) for text in completions]

    rewards = [Reward("spy", spy)]
    texts, prompts = ["a", "bb", "none", "bb"], [0, 0, 0, 1]
    finals = score([*rewards, LENGTH], texts, prompts)
    known = {
        (prompt, text): one
        for prompt, text, one in zip(prompts, texts, finals.only(rewards), strict=True)
        if one is not None
    }
    calls.clear()
    with RewardQueue(score, rewards, known) as queue:
        queue.add([0, 1, 2], ["bb", "a", "none"], [0, 1, 0])
        _, scored = queue.collect(3)
    assert calls == [["a"]]  # of prompt 1, which nobody answered so
    assert scored.total.tolist()[:2] == [2.0, 1.0]
    # Applies to none: skipped, though another function had given the final completion a reward.
    assert math.isnan(scored.total[2]) and scored.skipped == 1


def test_a_failure_is_raised_where_the_rewards_are_wanted() -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        raise KeyError("answer")

    with RewardQueue(score, [Reward("broken", broken)]) as queue:
        queue.add([0], ["a"], [0])
        with pytest.raises(RewardError, match="'broken' raised KeyError"):
            queue.collect(1)


def test_rewards_run_while_the_caller_goes_on() -> None:
    going_on = threading.Event()

    def waits(completions: list[str], **_: Any) -> list[float]:
        assert going_on.wait(10)
        return [1.0] * len(completions)

    with RewardQueue(score, [Reward("waits", waits)]) as queue:
        queue.add([0], ["a"], [0])
        going_on.set()  # never reached if `add` waited
        assert queue.collect(1)[1].total.tolist() == [1.0]


@pytest.mark.parametrize("size", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_training_does_not_depend_on_the_parts(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that retire one after the other, one-step completions by micro-batch."""
    monkeypatch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
    monkeypatch.setattr(runs, "rewards", [Reward("varied", runs.varied)])
    seen: list[int] = []
    only = ScoredRewards.only

    def spy(self: ScoredRewards, rewards: Sequence[Reward]) -> list[ScoredRewards | None]:
        seen.append(len(self.total))
        return only(self, rewards)

    monkeypatch.setattr(ScoredRewards, "only", spy)
    changes = {"micro_batch_size": size}
    train(runs.config(tmp_path / "parts", LETTERS, changes))
    monkeypatch.setattr(ScoredRewards, "only", lambda self, rewards: [None] * len(self.total))
    train(runs.config(tmp_path / "again", LETTERS, changes))
    assert seen
    reused, scored = (
        [deterministic(record) for record in read_metrics(tmp_path / name)]
        for name in ("parts", "again")
    )
    assert reused == scored
