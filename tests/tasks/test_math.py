"""MATH: equality of LaTeX answers, in processes that may hang and die."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from egspo.rewards.scoring import score_completions
from egspo.tasks import Task, build_task, equivalence
from egspo.tasks.answers import in_format
from egspo.tasks.equivalence import _Worker, equivalent
from egspo.tasks.math500 import boxed_format, correctness
from tests.tasks.hostile import HUGE, SMALL

HANGS = ("5", "9^{9^{9^{9}}}")


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("\\frac{1}{2}", "0.5"),
        ("\\frac12", "1/2"),
        ("x^2+1", "1 + x^{2}"),
        ("\\left(3, \\frac{\\pi}{2}\\right)", "(3,\\pi/2)"),
        ("\\text{Evelyn}", "Evelyn"),
        ("10\\%", "10"),
        ("1,000", "1000"),
        ("2", "\\sqrt{4}"),
        ("[0,1)", "[0, 1)"),
    ],
)
def test_equal_answers(gold: str, answer: str) -> None:
    assert equivalent([(gold, answer)]) == [True]


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("\\frac{1}{2}", "2"),
        ("x^2", "x_2"),
        ("42", "42 or 43"),
        ("42", "答案是42"),
        ("[0,1)", "[0,1]"),
        ("3", "\\ud800"),
        ("1", ""),
        ("1", "}{"),
        ("1", "\\frac{1}{0}"),
        ("1", "1" * 2000),
    ],
)
def test_unequal_answers(gold: str, answer: str) -> None:
    assert equivalent([(gold, answer)]) == [False]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of this test's own that give up after half a second."""
    monkeypatch.setattr(equivalence, "_SECONDS", 0.5)
    equivalence._workers.cache_clear()
    yield
    equivalence._workers.cache_clear()


def test_a_comparison_that_hangs_is_ended(impatient: None) -> None:
    """In a thread, where signals would not come; and those after it are decided as ever."""
    outcome: list[bool] = []
    pairs = [HANGS, ("\\frac{1}{2}", "0.5"), HANGS, ("2", "3"), ("2", "\\sqrt{4}")]
    thread = threading.Thread(target=lambda: outcome.extend(equivalent(pairs)))
    start = time.monotonic()
    thread.start()
    thread.join(30)
    assert outcome == [False, True, False, False, True]
    assert time.monotonic() - start < 15


def test_a_worker_that_is_killed_is_replaced() -> None:
    worker = _Worker(5.0, 2 << 30)
    assert worker.decide(("1", "2/2"))
    assert worker.process is not None
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert worker.decide(("1", "2/2"))
    os.kill(worker.process.pid, signal.SIGSTOP)  # so that it dies with a question
    kill = threading.Timer(0.2, worker.process.kill)
    kill.start()
    assert not worker.decide(("1", "2/2"))
    assert worker.decide(("1", "2/2"))


def test_a_worker_has_so_much_memory() -> None:
    worker = _Worker(5.0, 600 << 20)
    assert worker.decide(("1", "2/2"))
    assert worker.process is not None
    limits = Path(f"/proc/{worker.process.pid}/limits").read_text()
    assert re.search(rf"Max address space +{600 << 20} +{600 << 20} ", limits)


def test_a_worker_ends_with_its_parent() -> None:
    worker = _Worker(5.0, 2 << 30)
    worker.decide(("1", "2/2"))
    process = worker.process
    assert process is not None and process.stdin is not None
    process.stdin.close()
    assert process.wait(10) == 0


def test_a_worker_that_cannot_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('it is broken')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"math-verify cannot be started: [^\0]*it is broken"):
        _Worker(5.0, 2 << 30).decide(("1", "2"))


def test_math_verify_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs math-verify.*pip install 'egspo\[math\]'"):
        build_task("math500")


# --- the task


def row(i: int) -> dict[str, Any]:
    return {
        "problem": f"What is half of {i}?",
        "solution": f"Halve it: the answer is $\\boxed{{\\frac{{{i}}}{{2}}}}$.",
        "subject": "Prealgebra",
        "level": 1,
        "unique_id": f"{i}.json",
    }


def build(folder: Path, rows: list[dict[str, Any]]) -> Task:
    for name, part in (("train", rows[2:]), ("test", rows[:2])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines)
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    return build_task("math500", **files, validation_examples=2)


def test_examples(tmp_path: Path) -> None:
    task = build(tmp_path, [row(i) for i in range(9)])
    assert (len(task.train), len(task.validation), len(task.test)) == (5, 2, 2)
    example = task.test[1]
    assert example.columns == {"answer": "\\frac{1}{2}"}
    assert example.target == in_format(row(1)["solution"], "\\boxed{\\frac{1}{2}}")
    assert example.prompt[0]["content"].endswith("\n\nWhat is half of 1?")
    assert "\\boxed{}" in example.prompt[0]["content"]


def test_a_solution_without_an_answer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"solution of 'q' has no \\boxed\{\} answer: 'It is 7.'"):
        build(tmp_path, [*map(row, range(8)), {"problem": "q", "solution": "It is 7."}])


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (in_format("so", "\\boxed{0.5}"), 2.0 + 1.0),
        (in_format("so", "\\boxed{1}"), 1.0),
        (in_format("so", "1/2"), 2.0 + 0.75),
        ("It is \\boxed{\\frac12}", 2.0 + 0.5),
        ("<answer>\\boxed{0.5}", 2.0 + 0.5),
        ("\\boxed{0.5} <answer>no</answer>", 0.75),
        ("\\boxed{0.5} \\boxed{2}", 0.5),
        ("0.5", 0.25),
        ("", 0.25),
    ],
)
def test_the_published_values(tmp_path: Path, completion: str, reward: float) -> None:
    task = build(tmp_path, [row(i) for i in range(9)])
    scored = score_completions(task.rewards, ["?"], [completion], {"answer": ["\\frac{1}{2}"]})
    assert float(scored.total) == reward
    assert task.solved is not None
    solved = task.solved(prompts=["?"], completions=[completion], answer=["\\frac{1}{2}"])
    assert solved == [float(reward >= 2)]


def test_hostile_completions_are_paid_nothing(impatient: None) -> None:
    texts = {**SMALL, **HUGE}
    start = time.monotonic()
    values = correctness(["?"] * len(texts), list(texts.values()), ["42"] * len(texts))
    paid = dict(zip(texts, values, strict=True))
    assert [name for name, value in paid.items() if value] == []
    assert set(boxed_format(list(texts.values()))) <= {0.25, 0.5, 0.75, 1.0}
    assert time.monotonic() - start < 30
