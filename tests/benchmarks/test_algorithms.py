"""The study of algorithms: its runs, what they are said to have cost, and how they are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.algorithms import study
from benchmarks.algorithms.__main__ import main
from benchmarks.algorithms.results import (
    compare,
    cost_per_gain,
    points,
    read_all,
    reward_at,
    total_flops,
)
from benchmarks.algorithms.study import METHODS, TASKS, plan
from benchmarks.report import main as report
from egspo.config.recipe import load_config
from egspo.files import CheckpointError
from egspo.runs.metrics import read_metrics
from egspo.training.trainer import Trainer
from tests.helpers.runs import MODEL

SMALL = [
    "steps=2",
    "prompts_per_step=2",
    "eval.every=1",
    "eval.examples=4",
    "algorithm.group_size=3",
    "task.options.train_examples=12",
    "task.options.test_examples=8",
    "sft=null",
    *(f"model.config.{name}={value}" for name, value in MODEL.items()),
]


def run_study(folder: Path, *options: str) -> int:
    places = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    return main([*options, "--tasks", "sudoku", "--seeds", "0", *places])


@pytest.mark.parametrize("task", TASKS)
def test_methods_differ_in_the_algorithm_alone(task: str, tmp_path: Path) -> None:
    runs = plan(task, list(METHODS), [0, 1], tmp_path)
    assert [(run.method, run.seed) for run in runs] == [(m, s) for s in (0, 1) for m in METHODS]
    assert len({run.folder for run in runs}) == 2 * len(METHODS)
    for run in runs:
        reference = load_config(study.RECIPES / f"{TASKS[task].recipe}.yaml")
        for name in ("optimizer", "generation", "model", "sft", "task"):
            assert getattr(run.config, name) == getattr(reference, name)
    configs = {run.method: run.config for run in runs[: len(METHODS)]}
    algorithms = {name: config.algorithm for name, config in configs.items()}
    assert [a.strategy for a in algorithms.values()] == [
        *("high_entropy", "high_entropy", "uniform", "random", "all"),
        *("high_entropy", "high_entropy"),
    ]
    assert [name for name, a in algorithms.items() if a.stepwise] == ["EGSPO-SA"]
    assert [name for name, a in algorithms.items() if a.objective == "mean_field"] == [
        "one-step GRPO",
        "one-step GRPO, 1 update",
    ]
    assert algorithms["one-step GRPO"].num_iterations == algorithms["EGSPO"].selected_steps == 4
    assert algorithms["one-step GRPO, 1 update"].num_iterations == 1


@pytest.mark.slow
def test_a_study_is_made_once_goes_on_and_counts_what_was_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ["--methods", "EGSPO", "one-step GRPO"]
    assert run_study(tmp_path, *SMALL, *methods) == 0
    file = tmp_path / "results" / "algorithms-sudoku.json"
    first = json.loads(file.read_text())
    assert {"commit", "cpu", "threads", "versions"} <= first.keys()
    for name in ("EGSPO", "one-step GRPO"):
        runs = first["methods"][name]["runs"]
        assert [run["seed"] for run in runs] == [0]
        last = runs[0]["points"][-1]
        folder = tmp_path / "runs" / "sudoku" / name.replace(" ", "-") / "seed-0"
        records = read_metrics(folder)[1:]
        assert last["step"] == 2 and last["samples"] == 2 * 2 * 3
        assert last["gradient_steps"] == sum(r["updates"] for r in records)
        for phase, flops in last["flops"].items():
            assert flops == sum(r[f"flops/{phase}"] for r in records)

    made: list[str] = []
    original = Trainer.run

    def counted(self: Any) -> Path:
        made.append(self.config.output_dir)
        return original(self)

    monkeypatch.setattr(
        "egspo.training.trainer.Trainer.run", lambda self: pytest.fail("made again")
    )
    assert run_study(tmp_path, *SMALL, *methods) == 0
    assert json.loads(file.read_text())["methods"] == first["methods"]
    monkeypatch.setattr("egspo.training.trainer.Trainer.run", counted)
    assert run_study(tmp_path, *SMALL, "steps=3", *methods) == 0
    assert len(made) == 2
    longer = json.loads(file.read_text())["methods"]["EGSPO"]["runs"][0]["points"]
    assert [point["step"] for point in longer] == [0, 1, 2, 3]
    assert longer[:2] == first["methods"]["EGSPO"]["runs"][0]["points"][:2]


def test_runs_of_another_study_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_study(tmp_path, *SMALL, "--methods", "EGSPO") == 0
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate was 0\.0001"):
        plan("sudoku", ["EGSPO"], [0], tmp_path / "runs", [*SMALL, "optimizer.learning_rate=1"])
    assert run_study(tmp_path, *SMALL, "steps=1", "--methods", "EGSPO") == 2
    assert "has run for 2 steps, more than the 1 asked for" in capsys.readouterr().err


# --- From points to comparisons


def record(step: int, reward: float | None = None) -> dict[str, Any]:
    costs = {
        "updates": 4,
        **{f"flops/{phase}": 10 for phase in ("rollout", "score", "update")},
        **{f"time/{phase}": 0.5 for phase in ("rollout", "score", "update")},
    }
    made = {"step": step, **(costs if step else {})}
    return made if reward is None else {**made, "eval/reward": reward, "eval/solved": reward / 2}


def test_points_hold_what_was_spent_up_to_each_evaluation() -> None:
    made = points([record(0, 0.5), record(1), record(2, 0.6), record(3)], sequences=6)
    assert [point["step"] for point in made] == [0, 2]
    assert made[0]["samples"] == made[0]["gradient_steps"] == total_flops(made[0]) == 0
    assert made[1] == {
        "step": 2,
        "reward": 0.6,
        "solved": 0.3,
        "samples": 12,
        "gradient_steps": 8,
        "flops": {"rollout": 20, "score": 20, "update": 20},
        "seconds": 3.0,
    }
    assert reward_at(made, 15) == pytest.approx(0.525)
    with pytest.raises(ValueError, match="less than 61"):
        reward_at(made, 61)


def test_cost_of_a_gain() -> None:
    found = cost_per_gain([10.0, 10.0], [0.2, 0.2])
    assert found.mean == found.low == found.high == pytest.approx(5.0)
    spread = cost_per_gain([10.0, 10.0], [0.3, 0.1])  # not told from no gain
    assert spread.mean == pytest.approx(5.0) and spread.high is None
    assert spread.low is not None and 0 < spread.low < 5
    assert cost_per_gain([10.0, 10.0], [-0.1, -0.1]).mean is None


def content(task: str, rewards: dict[str, list[float]]) -> dict[str, Any]:
    """A result file of runs that all cost 1 TFLOP a step and end after two; nobody's numbers."""

    def run(seed: int, end: float) -> dict[str, Any]:
        steps = [(0, 0.4), (1, (0.4 + end) / 2), (2, end)]
        made = [
            {
                "step": step,
                "reward": reward,
                "solved": 0.1,
                "samples": 64 * step,
                "gradient_steps": step,
                "flops": {"rollout": step * 1e12, "score": 0, "update": 0},
                "seconds": 1.0,
            }
            for step, reward in steps
        ]
        return {"seed": seed, "commit": "0123456789ab", "cpu_seconds": 1.0, "points": made}

    return {
        "command": "python -m benchmarks.algorithms",
        "cpu": "A CPU",
        "threads": 1,
        "python": "3.11.7",
        "versions": {"torch": "2.13.0"},
        "suite": "algorithms",
        "task": task,
        "recipe": TASKS[task].recipe,
        "settings": {
            "prompts_per_step": 8,
            "group_size": 8,
            "selected_steps": 4,
            "denoising_steps": 8,
            "learning_rate": 1e-4,
            "temperature": 0.9,
            "steps": 2,
        },
        "methods": {
            name: {"overrides": [], "runs": [run(i, end) for i, end in enumerate(ends)]}
            for name, ends in rewards.items()
        },
    }


REWARDS = {"EGSPO-SA": [0.8, 0.81, 0.79], "worse": [0.5, 0.51, 0.49], "like it": [0.85, 0.78, 0.8]}


def test_methods_are_compared_seed_by_seed() -> None:
    budget, rows = compare(content("sudoku", REWARDS))
    assert budget == 2e12
    first, worse, like = rows
    assert first.gain.mean == pytest.approx(0.4) and first.behind_first.mean == 0.0
    assert worse.behind_first.mean == pytest.approx(-0.3)
    assert worse.behind_first.high is not None and worse.behind_first.high < 0
    assert like.behind_first.low is not None and like.behind_first.low < 0 < like.behind_first.high  # type: ignore[operator]
    assert first.tflops_per_gain.mean == pytest.approx(0.5)
    assert first.samples_per_gain.mean == pytest.approx(32)
    assert first.gradient_steps_per_gain.mean == pytest.approx(0.5)


def test_the_report_shows_every_task(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    marks = [f"<!-- {n}:begin -->\n<!-- {n}:end -->\n" for n in ("kernels", "algorithms")]
    document.write_text("".join(marks))
    for task in TASKS:
        file = tmp_path / f"algorithms-{task}.json"
        file.write_text(json.dumps(content(task, REWARDS)))
    arguments = ["--results", str(tmp_path), "--document", str(document)]
    assert report(arguments) == 0 and report([*arguments, "--check"]) == 0
    text = document.read_text()
    assert "| EGSPO-SA | 3 | 2 | 0.800 ± 0.025 |" in text
    assert "below EGSPO-SA: *worse*; not told from EGSPO-SA: *like it*." in text
    assert all(f"### {task.title}" in text for task in TASKS.values())
    assert (tmp_path / "benchmarks-algorithms.png").stat().st_size > 5000


def test_only_result_files_of_the_study_are_read(tmp_path: Path) -> None:
    assert read_all(tmp_path) == []
    (tmp_path / "algorithms-x.json").write_text('{"suite": "algorithms", "task": "chess"}')
    with pytest.raises(ValueError, match="is not a result file"):
        read_all(tmp_path)
    for name in ("x", "y"):
        (tmp_path / f"algorithms-{name}.json").write_text(json.dumps(content("sudoku", REWARDS)))
    with pytest.raises(ValueError, match="second result file of the task 'sudoku'"):
        read_all(tmp_path)
