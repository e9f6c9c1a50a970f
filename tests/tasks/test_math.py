"""MATH: equality of LaTeX answers, in processes that may hang and die."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from egspo.rewards.scoring import score_completions
from egspo.tasks import Task, build_task, equivalence
from egspo.tasks.answers import in_format
from egspo.tasks.equivalence import _Worker, equivalent, unreadable, verdicts
from egspo.tasks.math500 import boxed_format, correctness
from egspo.tasks.math_forms import EQUAL, UNEQUAL, decide, normalised, plain_number
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
        ("0.5", "50\\%"),
        ("1,000", "1000"),
        ("[0,1)", "[0, 1)"),
        ("1, 2, 3", "3, 2, 1"),
        ("3+2i", "2i+3"),
        ("5", "x=5"),
        ("90^\\circ", "90"),
        ("5 \\text{ dollars}", "5"),
        ("-5", "\u22125"),
        # A full stop at the end is none of the number's.
        ("5", "5."),
        ("5.", "5"),
        ("x+1", "x+1."),
        # A number with a base: the same digits in the same base.
        ("2516_8", "2516_{8}"),
        ("2516_8", "(02516)_{8}"),
        ("1A_{16}", "1a_{16}"),
        ("1010_2, 11_2", "11_2, 1010_2"),
        ("x_1", "x_{1}"),
        # Ways to write a number are no arithmetic.
        ("300000", "3 \\times 10^5"),
        ("10^{-7}", "0.0000001"),
        ("6.02 \\times 10^{23}", "6.02\\cdot 10^{23}"),
        ("\\frac{5}{3}", "1\\frac{2}{3}"),
        ("\\frac{5}{3}", "1 2/3"),
        ("3\\frac12", "3.5"),
        # Nor are sums and products with what is irrational.
        ("3\\sqrt{2}", "\\sqrt{18}"),
        ("\\frac{3\\sqrt{2}}{2}", "\\frac{3}{2}\\sqrt{2}"),
        ("5-2\\sqrt{3}", "-2\\sqrt{3}+5"),
        ("\\frac{-1+\\sqrt{5}}{2}", "\\frac{\\sqrt{5}-1}{2}"),
        ("\\pi", "3.14159265358979"),
        # What the reference answer leaves, the answer may leave.
        ("2^{10}", "2^9 \\cdot 2"),
        ("2^{10}", "1024"),
        ("\\frac{2}{4}", "\\frac{2}{4}"),
        ("\\frac{2}{4}", "\\frac{1}{2}"),
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
        ("1", "1 2/3"),
        # Bases.
        ("2516_8", "2516_7"),
        ("2516_8", "2516"),
        ("1010_2", "1010"),
        ("1010", "1010_2"),
        ("10", "1010_2"),
        # Small differences.
        ("0.0000001", "0.0000002"),
        ("10^{-7}", "2 \\times 10^{-7}"),
        ("e^{-20}", "e^{-21}"),
        ("\\frac{1}{3}", "0.333333"),
        ("\\pi", "3.141593"),
        # Arithmetic that is not carried out, at any place.
        ("5", "2+3"),
        ("10080", "7! \\times 2!"),
        ("1024", "2^{10}"),
        ("2", "\\sqrt{4}"),
        ("20", "2 \\cdot 10"),
        ("5", "\\frac{10}{2}"),
        ("\\frac{2}{3}", "\\frac{24}{36}"),
        ("\\frac{2}{3}", "24/36"),
        ("10", "\\binom{5}{2}"),
        ("\\frac{5}{7}", "\\frac{2+3}{7}"),
        ("6\\pi", "2 \\cdot 3\\pi"),
        ("(1,5)", "(1, 2+3)"),
        ("5", "x=2+3"),
        ("5", "|-5|"),
        ("2", "\\log_{10} 100"),
        ("x^2+2x+4", "x^2+2x+1+3"),
    ],
)
def test_unequal_answers(gold: str, answer: str) -> None:
    assert equivalent([(gold, answer)]) == [False]


def test_reasons() -> None:
    pairs = [("5", "2+3"), ("5", "10/2"), ("5", "6"), ("x", "y"), ("5", "5"), ("1", "1" * 2000)]
    assert verdicts(pairs) == [
        *("arithmetic that is not carried out", "10/2 is not in lowest terms", UNEQUAL, UNEQUAL),
        *(EQUAL, "too long"),
    ]


def test_answers_that_cannot_be_read() -> None:
    golds = ["5", "\\text{Evelyn}", "}{", "x^2", "\\frac{1}{", "(1,2)"]
    assert unreadable(golds) == [2, 4]


@st.composite
def numbers(draw: st.DrawFn) -> tuple[str, Fraction]:
    """A number in one of its spellings."""
    value = Fraction(draw(st.integers(-(10**6), 10**6)), draw(st.sampled_from([1, 1, 8, 7, 100])))
    sign, size = ("-" if value < 0 else ""), abs(value)
    whole, above, below = size.numerator // size.denominator, size.numerator, size.denominator
    spellings = [f"{sign}\\frac{{{above}}}{{{below}}}", f"{sign}{above}/{below}"]
    if whole and below > 1:
        spellings += [f"{sign}{whole}\\frac{{{above - whole * below}}}{{{below}}}"]
        spellings += [f"{sign}{whole} {above - whole * below}/{below}"]
    if below == 1:
        spellings = [f"{sign}{above}", f"{sign}{above:,}", f"{sign}{above}.", f"{sign}{above}.0"]
    elif below != 7 and 200 % below == 0:
        spellings += [f"{sign}{float(size)}"] if float(size) >= 0.001 else []
    text = draw(st.sampled_from(spellings))
    return draw(st.sampled_from(["{}", " {} ", "${}$"])).format(text), value


@given(numbers(), numbers())
def test_plain_numbers_are_compared_exactly(
    a: tuple[str, Fraction], b: tuple[str, Fraction]
) -> None:
    assert plain_number(normalised(a[0])) == a[1]
    expected = EQUAL if a[1] == b[1] else UNEQUAL
    assert decide(normalised(a[0]), normalised(b[0])) == expected


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of this test's own that give up after half a second."""
    monkeypatch.setattr(equivalence, "_SECONDS", 0.5)
    equivalence._workers.cache_clear()
    yield
    equivalence._workers.cache_clear()


@pytest.mark.slow
def test_a_comparison_that_hangs_is_ended(impatient: None) -> None:
    """In a thread, where signals would not come; and those after it are decided as ever."""
    outcome: list[bool] = []
    pairs = [HANGS, ("x+1", "1+x"), HANGS, ("x", "y"), ("2\\pi", "\\pi 2")]
    thread = threading.Thread(target=lambda: outcome.extend(equivalent(pairs)))
    start = time.monotonic()
    thread.start()
    thread.join(30)
    assert outcome == [False, True, False, False, True]
    assert time.monotonic() - start < 15
    assert "took too long" in verdicts([HANGS])[0]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced() -> None:
    worker = _Worker(5.0, 2 << 30)
    assert worker.decide(("x+1", "1+x")) == EQUAL
    assert worker.process is not None
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert worker.decide(("x+1", "1+x")) == EQUAL
    os.kill(worker.process.pid, signal.SIGSTOP)  # so that it dies with a question
    kill = threading.Timer(0.2, worker.process.kill)
    kill.start()
    assert worker.decide(("x+1", "1+x")) != EQUAL
    assert worker.decide(("x+1", "1+x")) == EQUAL


def test_a_worker_has_so_much_memory() -> None:
    worker = _Worker(5.0, 600 << 20)
    assert worker.decide(("x+1", "1+x")) == EQUAL
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


def test_golds_that_cannot_be_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = {"problem": "q", "solution": "It is \\boxed{\\frac{1}{}}."}
    with caplog.at_level(logging.WARNING, "egspo"):
        build(tmp_path, [strange, *(row(i) for i in range(9))])
    assert "1 of 2 test answers looked at cannot be read as mathematics" in caplog.text
    assert repr("\\frac{1}{}") in caplog.text


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


@pytest.mark.slow
def test_hostile_completions_are_paid_nothing(impatient: None) -> None:
    texts = {**SMALL, **HUGE}
    start = time.monotonic()
    values = correctness(["?"] * len(texts), list(texts.values()), ["42"] * len(texts))
    paid = dict(zip(texts, values, strict=True))
    assert [name for name, value in paid.items() if value] == []
    assert set(boxed_format(list(texts.values()))) <= {0.25, 0.5, 0.75, 1.0}
    assert time.monotonic() - start < 30
