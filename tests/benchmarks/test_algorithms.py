"""The study of algorithms: its runs, what they are said to have cost, and how they are compared."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.algorithms.__main__ import main
from benchmarks.algorithms.methods import METHODS
from benchmarks.algorithms.results import (
    VERSION,
    best_rate,
    compare,
    points,
    read_all,
)
from benchmarks.algorithms.statistics import (
    area,
    differences,
    estimate,
    seeds_needed,
)
from benchmarks.algorithms.study import OPTIMIZERS, TASKS, Arm, Run, arms, tiers
from benchmarks.algorithms.tables import section, verdict
from benchmarks.budget import Budget
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


# --- The arms


@pytest.mark.parametrize("task", TASKS)
def test_arms_differ_in_method_and_optimizer_alone(task: str, tmp_path: Path) -> None:
    of = TASKS[task].task
    reference = load_config(of.path, of.overrides)
    found = arms(task, list(METHODS), list(OPTIMIZERS))
    assert len({arm.folder for arm in found}) == len(found)
    # Every method with one optimizer, and the other optimizer with one of them.
    fewer = [arm for arm in found if arm.optimizer == "adamw" or arm.method == "all"]
    for arm in fewer:
        rate = OPTIMIZERS[arm.optimizer].rates[0]
        run = Run.of(arm, rate, 3, tmp_path)
        for name in ("model", "sft", "task", "steps", "prompts_per_step"):
            assert getattr(run.config, name) == getattr(reference, name)
        # Of JustGRPO the order of decoding is the method.
        policy = "left_to_right" if arm.method == "just-grpo" else reference.generation.policy
        algorithm, optimizer = run.config.algorithm, run.config.optimizer
        # Who masks again is refused with a block cache.
        cache = reference.generation.cache if algorithm.objective == "stepwise" else "none"
        assert run.config.generation == replace(reference.generation, policy=policy, cache=cache)
        assert (optimizer.name, optimizer.learning_rate) == (arm.optimizer, rate)
        assert optimizer.max_grad_norm == reference.optimizer.max_grad_norm
        assert algorithm.beta == 0 and algorithm.group_size == reference.algorithm.group_size
        assert run.config.seed == 3
        if arm.k is not None:
            assert algorithm.selected_steps == arm.k
        if arm.method == "adaptive":
            assert algorithm.selected_steps == reference.generation.steps
        if arm.lam is not None:
            assert algorithm.objective == "stepwise"
            assert (algorithm.stepwise, algorithm.lam) == (arm.lam > 0, arm.lam)
        elif arm.method not in ("value-head", "just-grpo"):
            assert algorithm.objective != "stepwise"


def test_the_most_telling_arms_come_first() -> None:
    found = arms("sudoku", list(METHODS), list(OPTIMIZERS))
    first = next(tiers(found, list(OPTIMIZERS), [0.0, 0.5]))
    assert {arm.method for arm in first} == {"high_entropy", "uniform", "random"}
    assert {(arm.optimizer, arm.lam) for arm in first} == {("adamw", 0.0)}
    assert {arm.k for arm in first} == {1, 2}
    assert [arm for tier in tiers(found, list(OPTIMIZERS), [0.0, 0.5]) for arm in tier] == found


def test_an_arm_is_compared_with_the_largest_entropy() -> None:
    assert Arm("sudoku", "random", 2, 0.0, "sgd").reference == (
        Arm("sudoku", "high_entropy", 2, 0.0, "sgd")
    )
    assert Arm("sudoku", "wd1", None, None, "adamw").reference == (
        Arm("sudoku", "high_entropy", 1, 0.5, "adamw")
    )


# --- Statistics, against plain formulas


def test_the_area_is_the_integral_of_the_curve() -> None:
    costs, rewards = [0.0, 1.0, 3.0, 4.0], [0.2, 0.4, 0.6, 0.0]
    whole = ((0.2 + 0.4) / 2 + 2 * (0.4 + 0.6) / 2 + (0.6 + 0.0) / 2) / 4
    assert area(costs, rewards, 4.0) == pytest.approx(whole)
    # Up to 2, half way between the second and the third evaluation, the reward is 0.5 there.
    assert area(costs, rewards, 2.0) == pytest.approx(((0.2 + 0.4) / 2 + (0.4 + 0.5) / 2) / 2)
    assert area(costs, rewards, 0.5) == pytest.approx((0.2 + 0.3) / 2)
    fine = [4.0 * i / 4000 for i in range(4001)]
    between = [_interpolated(x, costs, rewards) for x in fine]
    assert area(fine, between, 4.0) == pytest.approx(whole, abs=1e-6)
    for budget in (4.1, 0.0):
        with pytest.raises(ValueError, match="must begin at 0 and reach the budget"):
            area(costs, rewards, budget)
    with pytest.raises(ValueError, match="must begin at 0"):
        area([1.0, 2.0], [0.0, 1.0], 2.0)


def _interpolated(x: float, costs: list[float], rewards: list[float]) -> float:
    for i in range(len(costs) - 1):
        if x <= costs[i + 1]:
            share = (x - costs[i]) / (costs[i + 1] - costs[i])
            return rewards[i] * (1 - share) + rewards[i + 1] * share
    raise AssertionError(x)


def test_differences_are_of_the_same_seed_and_their_interval_is_students() -> None:
    one, other = {0: 0.5, 1: 0.7, 2: 0.9, 7: 9.0}, {2: 0.6, 0: 0.4, 1: 0.5, 8: -9.0}
    found = differences(one, other)
    assert found == pytest.approx([0.1, 0.2, 0.3])
    made = estimate(found)
    # Standard deviation 0.1, so a standard error of 0.1 / sqrt(3); t(2) at 97.5 % is 4.3027.
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert (made.mean, made.low, made.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert made.sign == 0 and estimate([0.2, 0.21, 0.2]).sign == 1
    assert estimate([-0.2, -0.21, -0.2]).sign == -1
    single = estimate([0.3])
    assert (single.low, single.high, single.sign) == (None, None, 0)


def test_how_many_seeds_would_see_half_of_a_difference() -> None:
    # Mean 0.2 and deviation 0.1: half of it is one deviation; sqrt(n) must reach t(n - 1) + 0.8416.
    # n = 10: 3.162 >= 2.262 + 0.842 = 3.104; n = 9: 3 < 2.306 + 0.842 = 3.148.
    assert seeds_needed([0.1, 0.2, 0.3]) == 10
    assert seeds_needed([-0.1, -0.2, -0.3]) == 10
    # A tenth of the difference: 100 times as many by the normal formula, (1.96 + 0.8416)^2 x 100.
    assert seeds_needed([-0.08, 0.02, 0.12]) == pytest.approx(7.849 * 100, rel=0.01)
    assert seeds_needed([0.1]) is None and seeds_needed([-0.1, 0.1]) is None
    assert seeds_needed([1e-6 - 0.1, 1e-6 + 0.1]) is None  # more than anybody has
    assert seeds_needed([0.2, 0.2, 0.2]) == 2


def test_a_budget_begins_what_would_end_in_time_and_remembers_the_rest() -> None:
    now = [0.0]
    budget = Budget(1.0, clock=lambda: now[0])
    assert budget.allows("first", expected=3000)
    now[0] = 2000.0
    assert budget.allows("short", expected=1500) and not budget.allows("long", expected=1700)
    now[0] = 3601.0
    assert not budget.allows("late")
    assert budget.left_out == ["long", "late"]
    assert Budget(None).allows("anything", expected=1e9)
    with pytest.raises(ValueError, match="hours must be >= 0, got -1"):
        Budget(-1)


# --- From metrics to comparisons


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
    assert made[0]["samples"] == made[0]["gradient_steps"] == made[0]["flops"] == 0
    assert made[1] == {
        **{"step": 2, "reward": 0.6, "solved": 0.3, "samples": 12},
        **{"gradient_steps": 8, "flops": 60, "seconds": 3.0},
    }


def run(seed: int, end: float, rate: float = 1e-4, cost: float = 1.0) -> dict[str, Any]:
    """Nobody's numbers: from 0.4 to ``end`` in two steps of ``cost`` TFLOP."""
    steps = [(0, 0.4), (1, (0.4 + end) / 2), (2, end)]
    made = [
        {
            **{"step": step, "reward": reward, "solved": 0.1, "samples": 64 * step},
            **{"gradient_steps": step, "flops": step * cost * 1e12, "seconds": 1.0 * step},
        }
        for step, reward in steps
    ]
    return {"seed": seed, "rate": rate, "commit": "0123456789ab", "cpu_seconds": 1, "points": made}


def test_the_rate_is_the_best_over_what_all_have_spent() -> None:
    tuning = [run(100, 0.6, 1e-4), run(101, 0.6, 1e-4), run(100, 0.9, 3e-4), run(101, 0.5, 3e-4)]
    assert best_rate(tuning) == 3e-4
    assert best_rate([*tuning[:2], run(100, 0.6, 3e-4), run(101, 0.6, 3e-4)]) == 1e-4


def content(task: str, ends: dict[str, list[float]]) -> dict[str, Any]:
    """A result file; nobody's numbers."""
    return {
        **{"command": "python -m benchmarks.algorithms", "cpu": "A CPU", "threads": 1},
        **{"python": "3.11.7", "versions": {"torch": "2.13.0"}},
        **{"suite": "algorithms", "version": VERSION, "task": task},
        "recipe": TASKS[task].task.recipe,
        "settings": {
            **{"steps": 2, "prompts_per_step": 8, "group_size": 8, "denoising_steps": 16},
            "held_out": 128,
        },
        "left_out": [f"{task}: something"],
        "arms": [
            {
                **{"method": method, "k": 1, "lam": 0.0, "optimizer": "adamw", "rate": 1e-4},
                **{"overrides": [], "tuning": []},
                "runs": [run(seed, end) for seed, end in enumerate(found)],
            }
            for method, found in ends.items()
        ],
    }


ENDS = {
    "high_entropy": [0.80, 0.81, 0.79, 0.80, 0.82],
    "uniform": [0.50, 0.51, 0.49, 0.52, 0.50],
    "random": [0.85, 0.78, 0.80, 0.76, 0.83],
    "sign_aware": [0.9, 0.9],
}


def test_arms_are_compared_seed_by_seed() -> None:
    budgets, rows = compare(content("sudoku", ENDS), "adamw")
    assert budgets == {"flops": 2e12, "seconds": 2.0}
    first, uniform, random, few = rows
    assert first.paired == {"flops": None, "seconds": None} and first.seeds_needed is None
    # The curve is straight from 0.4, so the mean over all of it lies half way.
    assert first.area.mean == pytest.approx(0.4 + (0.804 - 0.4) / 2)
    found = uniform.paired["flops"]
    assert found is not None and found.mean == pytest.approx((0.504 - 0.804) / 2)
    assert found.sign == -1 and random.paired["flops"].sign == 0  # type: ignore[union-attr]
    assert few.seeds == 2
    assert compare(content("sudoku", ENDS), "sgd") == ({}, [])
    text = verdict(rows)
    assert "below it: *uniform, K = 1, λ = 0*" in text
    assert "not separated from it: *random, K = 1, λ = 0*" in text
    assert "With fewer than 5 seeds, not judged: sign_aware, K = 1, λ = 0." in text


def test_the_document_has_every_task(tmp_path: Path) -> None:
    for task in TASKS:
        file = tmp_path / f"algorithms-{task}.json"
        file.write_text(json.dumps(content(task, ENDS)))
    text = section(read_all(tmp_path))
    assert all(f"### {each.task.title}" in text for each in TASKS.values())
    assert "| high_entropy, K = 1, λ = 0 | 5 | 0.0001, not tuned | 2 | 0.804 ± 0.014 |" in text
    assert "Left out for want of time: 1 runs" in text


def test_only_result_files_of_the_study_are_read(tmp_path: Path) -> None:
    assert read_all(tmp_path) == []
    for wrong in ({"suite": "algorithms", "task": "sudoku"}, {"task": "chess"}):
        (tmp_path / "algorithms-x.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="is not a result file"):
            read_all(tmp_path)
    for name in ("x", "y"):
        (tmp_path / f"algorithms-{name}.json").write_text(json.dumps(content("sudoku", ENDS)))
    with pytest.raises(ValueError, match="second result file of the task 'sudoku'"):
        read_all(tmp_path)


# --- Whole studies


def run_study(folder: Path, *options: str) -> int:
    places = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    few = ["--tasks", "sudoku", "--ks", "1", "--lams", "0", "--optimizers", "sgd"]
    return main([*options, *few, *places])


def test_seeds_of_the_tuning_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "1", "2", "--tuning-seeds", "2", "3"]) == 2
    assert "seeds [2] are of the tuning too" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_is_made_once_goes_on_and_counts_what_was_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--methods", "high_entropy", "random", "--seeds", "0", "--tuning-seeds", "5"]
    rates = ["--sgd-rates", "0.1", "0.2"]
    assert run_study(tmp_path, *SMALL, *options, *rates) == 0
    file = tmp_path / "results" / "algorithms-sudoku.json"
    first = json.loads(file.read_text())
    assert {"commit", "cpu", "threads", "versions"} <= first.keys()
    assert [arm["method"] for arm in first["arms"]] == ["high_entropy", "random"]
    for arm in first["arms"]:
        assert [each["rate"] for each in arm["tuning"]] == [0.1, 0.2]
        assert arm["rate"] == best_rate(arm["tuning"])
        (made,) = arm["runs"]
        folder = tmp_path / "runs" / "sudoku" / "sgd" / f"{arm['method']}-k1-lam0"
        records = read_metrics(folder / f"rate-{arm['rate']:g}" / "seed-0")[1:]
        last = made["points"][-1]
        assert last["step"] == 2 and last["samples"] == 2 * 2 * 3
        phases = ("rollout", "score", "update")
        assert last["flops"] == sum(r[f"flops/{phase}"] for r in records for phase in phases)

    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("made again"))
    assert run_study(tmp_path, *SMALL, *options, *rates) == 0
    assert json.loads(file.read_text())["arms"] == first["arms"]
    more = [*options[:-4], "--seeds", "0", "1", "--tuning-seeds", "5"]
    capsys.readouterr()
    assert run_study(tmp_path, *SMALL, *more, *rates, "--hours", "0") == 0
    assert "left out: sudoku: random, K = 1, λ = 0, sgd at" in capsys.readouterr().out
    again = json.loads(file.read_text())
    assert again["arms"] == first["arms"] and len(again["left_out"]) == 2


@pytest.mark.slow
def test_runs_of_another_study_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--methods", "random", "--seeds", "0", "--sgd-rates", "0.1"]
    assert run_study(tmp_path, *SMALL, *options) == 0
    arm = Arm("sudoku", "random", 1, 0.0, "sgd")
    with pytest.raises(CheckpointError, match=r"generation\.temperature was 0\.9"):
        Run.of(arm, 0.1, 0, tmp_path / "runs", [*SMALL, "generation.temperature=1"])
    assert run_study(tmp_path, *SMALL, "steps=1", *options) == 2
    assert "has run for 2 steps, more than the 1 asked for" in capsys.readouterr().err
