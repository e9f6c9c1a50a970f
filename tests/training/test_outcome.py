"""What a run says at its end."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from egspo.runs.checkpoint import MANIFEST
from egspo.training.outcome import outcome
from egspo.training.progress import RunProgress

OUTPUT, FINAL = Path("run"), Path("run/final")


def records(rewards: Sequence[float], every: int = 10) -> list[dict[str, Any]]:
    """Steps of 3 s, but for the first; each evaluation takes 5 s on top."""
    made: list[dict[str, Any]] = [{"step": 0, "eval/reward": rewards[0], "time/eval": 5.0}]
    for step in range(1, every * (len(rewards) - 1) + 1):
        record: dict[str, Any] = {"step": step, "time/step": 60.0 if step == 1 else 3.0}
        if step % every == 0:
            record |= {"eval/reward": rewards[step // every], "time/eval": 5.0}
            record["time/step"] += 5.0
        made.append(record)
    return made


@pytest.mark.parametrize(
    ("rewards", "best", "trend"),
    [
        ([0.1, 0.2, 0.31, 0.4, 0.5, 0.61], "0.610 at step 50 (run/final)", "still rises"),
        ([0.1, 0.9, 0.8, 0.71, 0.6, 0.5], "0.900 at step 10 (not kept", "falls"),
        ([0.5, 0.6, 0.5, 0.61, 0.5, 0.6], "0.610 at step 30 (not kept", "neither rises nor falls"),
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "0.500 at step 0 (before", "neither rises nor falls"),
        ([0.5, 0.6, 0.7], "0.700 at step 20 (run/final)", "3 evaluations do not tell"),
    ],
)
def test_best_step_and_trend(rewards: list[float], best: str, trend: str) -> None:
    text = "\n".join(outcome(OUTPUT, FINAL, records(rewards), 0))
    assert f"held-out reward: {rewards[0]:.3f} -> {rewards[-1]:.3f}" in text
    assert f"best held-out reward: {best}" in text
    assert trend in text
    assert "model: run/final" in text and "GPU" not in text


def test_the_best_steps_checkpoint_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-000010"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")
    lines = outcome(tmp_path, tmp_path / "final", records([0.1, 0.9, 0.2, 0.2]), 0)
    assert f"best held-out reward: 0.900 at step 10 ({folder})" in lines


def test_what_as_many_steps_again_would_cost() -> None:
    text = "\n".join(outcome(OUTPUT, FINAL, records([0.1, 0.2, 0.3]), 8))
    # 19 steps but the first have 2 evaluations of 5 s.
    each = 3.0 + 10.0 / 19
    assert "20 further step(s) would take about 1:11, 0.157 GPU-hours on 8 GPU(s)" in text
    assert f"measured {each:.3g} s a step (--resume steps=40)" in text
    assert outcome(OUTPUT, FINAL, [], 0) == ["model: run/final"]


def test_progress_lines_forecast_gpu_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("egspo.training.progress.time.monotonic", lambda: now)
    for gpus, left in ((8, "left 2:00:00 (16 GPU-hours)"), (0, "left 2:00:00")):
        stream, now = io.StringIO(), 0.0
        with RunProgress(30, "EGSPO", gpus=gpus, console=Console(file=stream, width=200)) as bar:
            now = 3600.0
            bar.update(10, {"eval/reward": 0.5})
        assert stream.getvalue().rstrip().endswith(left)
