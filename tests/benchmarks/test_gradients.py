"""Gradients of selected steps: what is recorded, and what is made of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.gradients import section
from benchmarks.gradients.__main__ import main
from benchmarks.gradients.measure import Measurement, Totals
from benchmarks.gradients.recorder import Recorder
from benchmarks.gradients.results import bound_constant, read_all, stage_record, stages_so_far
from benchmarks.gradients.study import DEFAULT, STRATEGIES, TASKS, Estimator, estimators, measured
from benchmarks.gradients.tables import rank_correlation
from egspo.engines.processes import Processes
from tests.helpers.runs import MODEL

SMALL = [
    *("sft=null", "steps=1", "eval.examples=4", "generation.steps=4"),
    *("task.options.train_examples=12", "task.options.test_examples=8"),
    *(f"model.config.{name}={value}" for name, value in MODEL.items()),
]


def test_the_recorder_keeps_gradients_and_leaves_weights() -> None:
    model = nn.Linear(2, 1)
    before = [p.detach().clone() for p in model.parameters()]
    engine = Recorder(model, Processes(alone=True))
    inputs = torch.tensor([[3.0, 4.0]])
    for scale in (1.0, 100.0):
        engine.backward(scale * model(inputs).sum(), last=True)
        assert engine.reduce_gradients(True)
        assert engine.clip(0.1) == pytest.approx(scale * math.sqrt(9 + 16 + 1))
        engine.step()
    first, second = engine.taken()
    assert first.tolist() == [3.0, 4.0, 1.0]  # not clipped
    torch.testing.assert_close(second, 100 * first)
    assert engine.taken() == []
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old) and parameter.grad is None


def test_the_variance_is_the_trace_of_the_covariance() -> None:
    vectors = torch.tensor([[1.0, 2.0, 0.0], [3.0, -2.0, 1.0], [2.0, 3.0, 5.0]])
    totals = Totals(batches=3)
    totals.sums["x"] = vectors.sum(0)
    totals.rows["x"] = [{"norm": float(v.norm())} for v in vectors]
    plain = sum(float(column.var(correction=1)) for column in vectors.T)
    assert totals.variance("x") == pytest.approx(plain)
    assert Totals(batches=1).variance("x") is None


def test_the_bounds_constant_and_ranks() -> None:
    assert bound_constant({"distance": 3.0, "left_out": 2.0}) == 1.5
    assert bound_constant({"distance": 3.0, "left_out": 0.0}) is None
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)
    assert rank_correlation([1, 1, 2], [5, 5, 7]) == pytest.approx(1.0)


@pytest.mark.parametrize("task", TASKS)
def test_every_strategy_and_definition_is_compared_once(task: str, tmp_path: Path) -> None:
    settings, config = TASKS[task], measured(task, "early", tmp_path)
    made = estimators(settings, config, STRATEGIES)
    assert len({each.name for each in made}) == len(made)
    assert {each.changes["strategy"] for each in made} == set(STRATEGIES)
    assert set(DEFAULT) == {"high_entropy", "uniform", "random", "sign_aware"}
    assert {each.applied(config).algorithm.strategy for each in made} == set(STRATEGIES)
    algorithm = config.algorithm
    assert (algorithm.stepwise, algorithm.beta, algorithm.aggregation) == (False, 0.0, "exact")
    over = {each.entropy[0] for each in made}
    assert ("block" in over) == (config.generation.block_length < config.generation.max_new_tokens)
    assert ("masked" in over) == (config.generation.cache != "dual")


@pytest.fixture
def measurement(tmp_path: Path) -> Measurement:
    config = measured("sudoku", "early", tmp_path, SMALL)
    compared = [
        Estimator("everything", {"strategy": "high_entropy", "selected_steps": 4}),
        Estimator("two", {"strategy": "high_entropy", "selected_steps": 2}),
        Estimator("masked", {"strategy": "high_entropy", "entropy_over": "masked"}),
    ]
    compared[2].changes["selected_steps"] = 2
    return Measurement(config, compared)


def test_selecting_every_step_is_the_full_gradient(measurement: Measurement) -> None:
    before = [p.detach().clone() for p in measurement.recorder.model.parameters()]
    totals = Totals()
    for number in (1, 2):
        measurement.batch(number, totals)
    assert totals.batches == 2
    for row, whole in zip(totals.rows["everything"], totals.rows["all"], strict=True):
        assert row["cosine"] == pytest.approx(1.0, abs=1e-6)
        assert row["error"] < 1e-4  # float32, in batches of other shapes
        assert row["left_out"] == 0 and row["k"] == 4 == whole["k"]
        # A step at a time the weights could have moved: old log-probabilities are made first.
        assert row["flops"] < whole["flops"] < 1.5 * row["flops"]
    every = [row["flops"] for row in totals.rows["everything"]]
    assert [row["flops"] for row in totals.rows["two"]] == pytest.approx([f / 2 for f in every])
    for row, whole in zip(totals.rows["two"], totals.rows["all"], strict=True):
        assert row["k"] == 2
        assert 0 < row["left_out"] < whole["entropy"]
        assert row["error"] == pytest.approx(row["distance"] / whole["norm"])
        # Of the vectors themselves: |s - f|^2 = |s|^2 + |f|^2 - 2 s f.
        square = 1 + row["share"] ** 2 - 2 * row["share"] * row["cosine"]
        assert row["error"] == pytest.approx(math.sqrt(square), rel=1e-5)
    assert totals.rows["masked"][0]["entropy"] > totals.rows["two"][0]["entropy"] * 0.5
    assert all(len(step["norm"]) == len(step["entropy"]) == 4 for step in totals.steps)
    for parameter, old in zip(measurement.recorder.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    found = stage_record(totals, measurement.compared)
    assert found["estimators"]["everything"]["variance_of_all"] == pytest.approx(1.0, rel=1e-3)
    assert all(each["ahead"] is None for each in found["estimators"].values())
    for name, change in (("high_entropy, K = 2", 0.0), ("random, K = 2", -0.25)):
        rows = totals.rows["two"]
        totals.rows[name] = [
            {**row, "cosine": row["cosine"] + change * n} for n, row in enumerate(rows)
        ]
        totals.sums[name] = totals.sums["two"]
    again = [Estimator(name, {}) for name in ("high_entropy, K = 2", "random, K = 2")]
    ahead = stage_record(totals, again)["estimators"]["random, K = 2"]["ahead"]
    half = 12.7062 * 0.125  # differences 0 and -0.25: a standard error of 0.125
    assert ahead == pytest.approx([-0.125, half])
    assert found["batches"] == 2 and len(found["steps"]["norm"]) == 4


def run(folder: Path, *options: str, more: tuple[str, ...] = ()) -> int:
    places = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    return main(
        [*SMALL, *more, "--tasks", "sudoku", "--strategies", "high_entropy", *places, *options]
    )


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TASKS, "sudoku", replace(TASKS["sudoku"], ks=(1, 2)))
    file = tmp_path / "results" / "gradients-sudoku.json"
    assert run(tmp_path, "--batches", "1") == 0
    first = json.loads(file.read_text())
    assert set(first["stages"]) == {"early", "late"}
    assert first["stages"]["early"]["batches"] == 1
    assert run(tmp_path, "--batches", "3", "--stages", "early") == 0
    second = json.loads(file.read_text())
    assert second["stages"]["early"]["batches"] == 3
    assert second["stages"]["late"] == first["stages"]["late"]
    straight = tmp_path / "straight"
    assert run(straight, "--batches", "3", "--stages", "early") == 0
    found = json.loads((straight / "results" / "gradients-sudoku.json").read_text())
    assert _numbers(found) == _numbers(second)
    assert run(tmp_path, "--batches", "4", "--stages", "early", "--hours", "0") == 0
    assert "left out: sudoku, early: 1 of 4 batches" in capsys.readouterr().out
    assert json.loads(file.read_text())["left_out"] == ["sudoku, early: 1 of 4 batches"]
    assert run(tmp_path, "--batches", "3", more=("seed=1",)) == 2
    assert "is of other settings: give another --runs" in capsys.readouterr().err
    text = section(read_all(tmp_path / "results"))
    assert "| early, 3 batches | K | cosine |" in text and "holds in every batch with B =" in text


def _numbers(content: dict[str, Any]) -> Any:
    stage = content["stages"]["early"]
    return [stage["estimators"], stage["steps"]]


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    config = measured("sudoku", "early", tmp_path, SMALL)
    path = tmp_path / "gradients-sudoku.json"
    assert stages_so_far(path, config) == {}
    path.write_text(json.dumps({"suite": "gradients", "task": "sudoku", "settings": {"seed": 9}}))
    with pytest.raises(ValueError, match="is of other settings: give another --results"):
        stages_so_far(path, config)
    path.write_text(json.dumps({"suite": "gradients", "task": "chess"}))
    with pytest.raises(ValueError, match="is not a result file"):
        read_all(tmp_path)
