"""A resumed run goes on with the W&B run that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from egspo.training.trackers import WANDB_ID, tracker_options
from egspo.training.trainer import train
from tests.helpers import runs


def test_the_id_is_kept_where_the_run_goes_on(tmp_path: Path) -> None:
    first = tracker_options(tmp_path, None)["wandb"]
    assert first["resume"] == "allow" and (tmp_path / WANDB_ID).read_text("utf-8") == first["id"]
    assert tracker_options(tmp_path, tmp_path)["wandb"]["id"] == first["id"]


def test_another_run_has_another_id(tmp_path: Path) -> None:
    first = tracker_options(tmp_path, None)["wandb"]["id"]
    (tmp_path / "other").mkdir()
    assert tracker_options(tmp_path / "other", tmp_path)["wandb"]["id"] != first
    assert tracker_options(tmp_path, None)["wandb"]["id"] != first  # begun again


@pytest.mark.parametrize("text", ["", "a b", "x" * 65, "\ud800".encode("utf-8", "ignore").decode()])
def test_a_damaged_id_is_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / WANDB_ID).write_text(text, "utf-8")
    identity = tracker_options(tmp_path, tmp_path)["wandb"]["id"]
    assert identity != text and (tmp_path / WANDB_ID).read_text("utf-8") == identity


def test_training_gives_it_to_wandb(
    tmp_path: Path, varied: None, no_plots: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    def init(self: Any, name: str, config: Any = None, init_kwargs: Any = None) -> None:
        given.append(init_kwargs["wandb"]["id"])

    monkeypatch.setattr("egspo.training.setup.check_trackers", lambda config: None)
    monkeypatch.setattr("egspo.training.setup.Accelerator.init_trackers", init)
    changes = {"trackers": ["wandb"], "steps": 2}
    train(runs.config(tmp_path, runs.LETTERS, changes))
    train(runs.config(tmp_path, runs.LETTERS, {**changes, "steps": 3}), resume=tmp_path)
    assert len(given) == 2 and given[0] == given[1]
