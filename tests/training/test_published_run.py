"""A run in the published protocol: what is asked, what is updated, and both metrics."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from egspo.algorithm.phases.update import Update
from egspo.cli import main
from egspo.runs.metrics import read_metrics
from egspo.tasks.prompts import build_data
from egspo.tasks.published import PREFILL
from egspo.training.trainer import train
from tests.helpers import runs
from tests.helpers.chatml import write_tokenizer

PER_STEP = {
    "generation": {"max_new_tokens": 8, "steps": 8, "block_length": 8},
    "algorithm": {
        **{"group_size": 4, "selected_steps": 5, "stop_at_eos": False, "beta": 0.0},
        **{"schedule": "per_step", "ranks_per_update": 2, "first_rank": 1},
    },
    "max_empty_steps": None,
}


@pytest.mark.parametrize("strategy", ["high_entropy", "uniform_reference", "random_reference"])
def test_optimizer_steps_have_the_ranks_that_the_options_say(
    tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch, varied: None
) -> None:
    updates: list[dict[int, int]] = []
    weights: set[float] = set()
    original = Update._accumulate

    def recorded(
        self: Update, batch: Any, group: list[Tensor], advantage: Tensor, weight: float
    ) -> Any:
        updates.append(Counter(rank for i in group for rank in batch.states.rank[i].tolist()))
        weights.add(weight)
        return original(self, batch, group, advantage, weight)

    monkeypatch.setattr(Update, "_accumulate", recorded)
    changes = {"algorithm": {"strategy": strategy}, "steps": 1}
    train(runs.config(tmp_path / "run", {**runs.LETTERS, **PER_STEP}, changes))
    # Every rank of all 8 trajectories; the rank of highest entropy comes last.
    assert updates == [{1: 8, 2: 8}, {3: 8, 4: 8}, {0: 8}]
    assert weights == {1 / (8 * 2)}
    (record,) = read_metrics(tmp_path / "run")[1:]
    assert record["selected/states"] == 40
    if strategy == "uniform_reference":
        assert [step for step, count in enumerate(record["selected/histogram"]) if count] == [
            *(0, 2, 4, 6, 7)
        ]


@pytest.fixture
def countdown(tmp_path: Path) -> dict[str, Any]:
    """The tiny recipe on Countdown in English, with a tokenizer of bytes."""
    write_tokenizer(tmp_path / "tokenizer")
    options = {
        "protocol": "published",
        **{"train_examples": 4, "validation_examples": 2, "test_examples": 3},
        **{"prompt_style": None, "empty_cells": None},
    }
    return {
        "model": {
            "config": {**runs.MODEL, "max_sequence_length": 2048},
            "tokenizer": str(tmp_path / "tokenizer"),
        },
        "task": {"name": "countdown", "options": options},
        "generation": {"max_new_tokens": 8, "steps": 4, "block_length": 8},
        "steps": 1,
    }


def test_held_out_prompts_are_prefilled_and_training_prompts_cut_on_request(
    tmp_path: Path, countdown: dict[str, Any]
) -> None:
    data = build_data(runs.config(tmp_path / "run", countdown))

    def texts(tokens: Any) -> list[str]:
        return [data.tokenizer.decode(ids) for ids in tokens]

    assert all(text.endswith(f"assistant\n{PREFILL}") for text in texts(data.held_out.token_ids))
    assert all(text.endswith("assistant\n") for text in texts(data.train.token_ids))
    cut = build_data(runs.config(tmp_path / "run", countdown, {"task": {"max_prompt_tokens": 200}}))
    pairs = zip(cut.train.token_ids, data.train.token_ids, strict=True)
    assert all(len(short) == 200 and short == list(whole[-200:]) for short, whole in pairs)
    assert cut.held_out.token_ids == data.held_out.token_ids


def test_rewards_get_the_answer_with_its_prefill(tmp_path: Path, countdown: dict[str, Any]) -> None:
    data = build_data(runs.config(tmp_path / "run", countdown))
    assert data.held_out.answers([1, 0], ["a", "b"]) == [f"{PREFILL}a", f"{PREFILL}b"]
    assert data.train.answers([0], ["a"]) == ["a"]


def test_a_run_and_its_evaluation_by_both_metrics(
    tmp_path: Path, countdown: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    train(runs.config(output, countdown))
    assert main(["eval", str(output)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "with the prompts of that code: comparable with its numbers" in shown
    summary = json.loads((output / "eval" / "final" / "summary.json").read_text())
    (row,) = summary["results"]
    assert row["metrics"] == {"published": 0.0}
    assert "| published |" in (output / "eval" / "final" / "summary.md").read_text()
    strict = ["--task-option", "countdown.protocol=strict", "--output-dir", str(tmp_path / "own")]
    assert main(["eval", str(output), *strict]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "on other prompts than that code's, so not comparable with its numbers" in shown
