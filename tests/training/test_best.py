"""The best step by held-out reward: kept, chosen, and the end of patience."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from egspo.evaluations import best_checkpoint
from egspo.runs.checkpoint import list_checkpoints
from egspo.runs.metrics import read_metrics
from egspo.training.best import BestSoFar
from egspo.training.trainer import Trainer, train
from tests.helpers import runs

REWARDS = [0.2, 0.5, 0.9, 0.4, 0.9, 0.3, 0.1]
"""Held-out rewards of the steps 0 to 6."""
EVERY_STEP: dict[str, Any] = {
    "steps": 6,
    "eval": {"every": 1},
    "checkpoint": {"every": 2, "keep_last": 1},
}


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Evaluations give :data:`REWARDS`."""
    monkeypatch.setattr("egspo.training.trainer.plot_run", lambda run, png: png)
    evaluate = Trainer._evaluate

    def scripted(self: Trainer) -> Any:
        step = self.completed + 1 if hasattr(self, "started") else 0
        self.started = True  # type: ignore[attr-defined]
        step = step if self.origin.run is None else self.completed + 1
        return {**evaluate(self), "eval/reward": REWARDS[step]}

    monkeypatch.setattr(Trainer, "_evaluate", scripted)
    yield


def kept(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run / "checkpoints")]


def test_of_equal_rewards_the_first_is_best() -> None:
    records = [{"step": i, "eval/reward": reward} for i, reward in enumerate(REWARDS)]
    best = BestSoFar.of([*records[:3], {"step": 2.5}, *records[3:]])
    assert (best.step, best.reward, best.stale) == (2, 0.9, 4)
    assert BestSoFar.of([{"step": 1, "eval/reward": None}]) == BestSoFar()


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    train(runs.config(tmp_path / "best", EVERY_STEP))
    assert kept(tmp_path / "best") == ["step-000002", "step-000006"]
    assert best_checkpoint(tmp_path / "best").name == "step-000002"
    train(runs.config(tmp_path / "plain", EVERY_STEP, {"checkpoint": {"keep_best": False}}))
    assert kept(tmp_path / "plain") == ["step-000006"]


def test_it_is_saved_when_it_comes_and_outlives_a_resumed_run(tmp_path: Path) -> None:
    rare = {"checkpoint": {"every": 5}}
    train(runs.config(tmp_path, EVERY_STEP, rare, {"steps": 3}))
    assert kept(tmp_path) == ["step-000002", "step-000003"]
    train(runs.config(tmp_path, EVERY_STEP, rare), resume=tmp_path)
    assert kept(tmp_path) == ["step-000002", "step-000006"]


def test_patience(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    patient = {"eval": {"patience": 2}}
    with caplog.at_level(logging.INFO, "egspo"):
        train(runs.config(tmp_path, EVERY_STEP, patient))
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    assert kept(tmp_path) == ["step-000002", "step-000004"]
    (message,) = [m for m in caplog.messages if "patience" in m]
    assert "stopping after step 4: no better held-out reward than 0.9000 of step 2" in message
    assert (tmp_path / "final").is_dir()
    # A resumed run has no more patience than it had.
    train(runs.config(tmp_path, EVERY_STEP, patient), resume=tmp_path)
    assert len(read_metrics(tmp_path)) == 5
    train(runs.config(tmp_path, EVERY_STEP, {"eval": {"patience": 3}}), resume=tmp_path)
    assert len(read_metrics(tmp_path)) == 6
