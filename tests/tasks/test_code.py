"""Programs in completions, their rewards, and the coding tasks on files in the real formats."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from egspo.rewards.scoring import RewardError, score_completions
from egspo.sandbox import CaseResult, SandboxError, SandboxUnavailable, Verdict
from egspo.tasks import Example, Task, build_task
from egspo.tasks.code import MAX_PROGRAM, ProgramTests
from egspo.tasks.code_tests import unsupported
from egspo.tasks.programs import fenced
from egspo.tasks.references import verified
from egspo.training.evaluation import Reward
from tests.sandbox.conftest import require_bubblewrap

A, B = "def a(): return 1\n", "def b(): return 2\n"


class Echo:
    """A pool that says how long each program is."""

    def __init__(self) -> None:
        self.programs: list[tuple[str, str]] = []

    def run_many(self, programs: list[tuple[str, str]]) -> list[Verdict]:
        self.programs += programs
        if any("broken" in tests for _, tests in programs):
            raise SandboxError("no sandbox today")
        return [Verdict((), 0) for _ in programs]


def test_what_is_run() -> None:
    pool = Echo()
    runner = ProgramTests(pool)  # type: ignore[arg-type]
    huge = fenced("x" * (MAX_PROGRAM + 1))
    texts = [fenced(A), "no program", huge, "```python\n\n```", fenced(B)]
    columns: dict[str, Any] = {"tests": list("abcde"), "prelude": ["", "", "", "", "import os"]}
    scored = score_completions(runner.rewards(), ["?"] * 5, texts, columns)
    assert scored.per_function["tests"].tolist() == [0.0] * 5
    assert scored.per_function["code_format"].tolist() == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert pool.programs == [(f"\n{A}", "a"), (f"import os\n{B}", "e")]


def test_why_a_program_is_paid_so() -> None:
    cases = (CaseResult("test_1", True), CaseResult("test_2", False, "AssertionError"))

    class Pool:
        verdict = Verdict(cases, 2)

        def run_many(self, programs: list[tuple[str, str]]) -> list[Verdict]:
            return [self.verdict for _ in programs]

    pool = Pool()
    tests, form = ProgramTests(pool).rewards()  # type: ignore[arg-type]
    assert tests.explain is not None and form.explain is not None
    columns = {"tests": "t", "prelude": ""}
    assert tests.explain(fenced(A), **columns) == "1 of 2 tests pass; test_2: AssertionError"
    assert tests.explain("no program", **columns) == "no block with a program"
    pool.verdict = Verdict((), 0, "the program failed to load")
    assert tests.explain(fenced(A), **columns).endswith("; the program failed to load")
    assert form.explain(fenced(A), **columns) == "has a closed Python block"
    assert form.explain("```\nx\n```", **columns).startswith("none of 1 blocks is closed")


def test_a_sandbox_that_fails_is_no_reward_of_zero() -> None:
    runner = ProgramTests(Echo())  # type: ignore[arg-type]
    columns = {"tests": ["broken"], "prelude": [""]}
    with pytest.raises(RewardError, match="'tests' raised SandboxError: no sandbox today"):
        score_completions(runner.rewards(), ["?"], [fenced(A)], columns)


PASSED = Verdict((CaseResult("a", True),), 1)


# --- Test files


@pytest.mark.parametrize(
    ("tests", "program", "reason", "separate"),
    [
        ("from solution import f\ndef test_a(): assert f() == 1", "import math, re", None, None),
        ("import pytest\ndef test_a(): pass", "", None, "imports pytest"),
        ("class TestA:\n    def test_a(self): pass", "", None, "are no plain functions"),
        ("async def test_a(): pass", "from collections import abc", None, "no plain functions"),
        ("from unittest.mock import patch\ndef test_a(capsys): pass", "", None, "no plain"),
        ("def test_a(): pass", "import numpy as np", "imports numpy", "imports numpy"),
        ("import pandas.x\ndef test_a(): pass", "", "imports pandas.x", "imports pandas.x"),
        ("def test_a(mocker): pass", "", "uses the fixture mocker", "no plain functions"),
        ("from solution import f", "", "has no test function", "has no test function"),
        ("def test_a(:", "", "is no Python", "is no Python"),
        ("def test_a(): pass", "def f(:", "is no Python", "is no Python"),
    ],
)
def test_unsupported_test_files(
    tests: str, program: str, reason: str | None, separate: str | None
) -> None:
    assert unsupported(tests, program) == reason
    found = unsupported(tests, program, runner="separate")
    assert found is None if separate is None else separate in str(found)


# --- Tasks

KODCODE = [
    {
        "question_id": f"Filter_{i}",
        "question": f"Write a function that adds {i} to a number.",
        "solution": f"def add_{i}(x):\n    return x + {i}" + ("\n    import numpy" * (i == 3)),
        "test": f"from solution import add_{i}\n\n"
        f"def test_zero():\n    assert add_{i}(0) == {i}\n\n"
        f"def test_one():\n    assert add_{i}(1) == {i + (2 if i == 4 else 1)}\n",
        "test_info": [
            {
                "docstring": "Adds.",
                "function_declaration": f"def add_{i}(x):",
                "function_name": f"add_{i}",
                "parameter_list": "(x)",
            }
        ],
    }
    for i in range(12)
]
MBPP = [
    {
        "task_id": i,
        "text": f"Write a function to find the height of a tree, times {i}.",
        "code": f"class Node:\r\n  def __init__(self, left=None):\r\n    self.left = left\r\n"
        f"def height_{i}(n):\r\n  return 0 if n is None else {i} + height_{i}(n.left)",
        "test_list": [f"assert height_{i}(root) == {2 * i}", f"assert height_{i}(None) == 0"],
        "test_setup_code": "root = Node()\r\nroot.left = Node()",
        "challenge_test_list": [],
    }
    for i in range(1, 9)
]
HUMANEVAL = [
    {
        "task_id": "HumanEval/32",
        "prompt": "import math\n\n\ndef poly(xs: list, x: float):\n"
        "    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n\n"
        "def find_zero(xs: list):\n"
        '    """ Find x such that poly(x) = 0, for two coefficients."""\n',
        "canonical_solution": "    return -xs[0] / xs[1]\n",
        "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    import random\n"
        "    rng = random.Random(42)\n    for _ in range(5):\n"
        "        coeffs = [rng.randint(-10, 10), rng.randint(1, 10)]\n"
        "        solution = candidate(list(coeffs))\n"
        "        assert math.fabs(poly(coeffs, solution)) < 1e-4\n",
        "entry_point": "find_zero",
    },
    {
        "task_id": "HumanEval/53",
        "prompt": 'def add(x: int, y: int):\n    """Add two numbers x and y\n'
        '    >>> add(2, 3)\n    5\n    """\n',
        "canonical_solution": "    return x + y\n",
        "test": "\n\ndef check(candidate):\n    assert candidate(0, 1) == 1\n"
        "    assert candidate(2, 3) == 5\n",
        "entry_point": "add",
    },
]


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    require_bubblewrap()
    found = {}
    for name, rows in (("kodcode", KODCODE), ("mbpp", MBPP), ("humaneval", HUMANEVAL)):
        file = tmp_path / f"{name}.parquet"
        datasets.Dataset.from_list(rows).to_parquet(str(file))
        found[name] = str(file)
    return found


def score(task: Task, part: str, completions: list[str]) -> dict[str, list[float]]:
    examples = getattr(task, part)
    columns = {name: [e.columns[name] for e in examples] for name in examples[0].columns}
    assert task.solved is not None
    rewards = [*task.rewards, Reward("solved", task.solved)]
    scored = score_completions(rewards, ["?"] * len(examples), completions, columns)
    return {name: values.tolist() for name, values in scored.per_function.items()}


def test_kodcode(sources: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {
        "train": sources["kodcode"],
        "validation_examples": 2,
        "test_examples": 3,
        "verify_solutions": "none",
    }
    with caplog.at_level(logging.WARNING, "egspo"):
        task = build_task("kodcode", **options)
    assert "1 rows are left out: 1 imports numpy" in caplog.text
    sizes = {name: len(getattr(task, name)) for name in ("train", "validation", "test")}
    assert sizes == {"train": 6, "validation": 2, "test": 3}
    (example,) = [e for e in (*task.train, *task.validation, *task.test) if "adds 5" in str(e)]
    content = example.prompt[0]["content"]
    assert "Write a function that adds 5 to a number.\n\nThe tests use:\ndef add_5(x):" in content
    assert "assert" not in content
    assert example.question == KODCODE[5]["question"]
    assert task.extract is not None
    assert task.answer_in(str(example.target), example.columns) == f"{KODCODE[5]['solution']}\n"

    everything = [e for part in sizes for e in getattr(task, part)]
    task = Task("all", everything, everything, task.rewards, task.solved)
    scored = score(task, "train", [str(e.target) for e in everything])
    wrong = [0.5 if "adds 4 " in str(e.question) else 1.0 for e in everything]
    assert scored["tests"] == wrong
    assert scored["solved"] == [float(value == 1.0) for value in wrong]
    assert scored["code_format"] == [1.0] * 11
    assert score(task, "train", ["def add_5(x): return x + 5"] * 11)["tests"] == [0.0] * 11


@pytest.mark.parametrize("runner", ["pytest", "separate"])
def test_rows_whose_reference_solution_fails_are_named(
    sources: dict[str, str], caplog: pytest.LogCaptureFixture, runner: str
) -> None:
    options = {"train": sources["kodcode"], "validation_examples": 0, "test_examples": 1}
    with caplog.at_level(logging.WARNING, "egspo"):
        task = build_task("kodcode", runner=runner, **options)
    assert len(task.train) + len(task.test) == 10
    assert "the reference solutions of 1 of 11 rows fail their tests, 1 rows are left out: " in (
        caplog.text
    )
    assert "Write a function that adds 4 to a number." in caplog.text
    assert "assert add_4(1) == 6" in caplog.text


def test_a_sample_of_the_reference_solutions_is_run_where_there_are_many(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Judge(ProgramTests):
        def verdicts(self, completions: Any, tests: Any, prelude: Any) -> list[Verdict]:
            return [Verdict((), 1, "no") if "bad" in c else PASSED for c in completions]

    judge = Judge(Echo())  # type: ignore[arg-type]
    columns = {"tests": "", "prelude": ""}
    train = [Example([], columns, "bad" if n % 2 else "good", f"row {n}") for n in range(100)]
    test = [Example([], columns, "bad", f"test {n}") for n in range(10)]
    with caplog.at_level(logging.WARNING, "egspo"):
        kept, benchmark = verified([train, test], judge, "sample", 0, complete=1)
    assert 60 < len(kept) < 80
    assert len(benchmark) == 10
    assert "of 64 rows fail their tests" in caplog.text
    assert "verify_solutions: all runs those of all rows" in caplog.text
    assert len(verified([train, test], judge, "all", 0, complete=1)[0]) == 50
    assert len(verified([train, test], judge, "none", 0)[0]) == 100


def test_tampering_is_counted(sources: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    options = {"train": sources["kodcode"], "validation_examples": 0, "test_examples": 1}
    task = build_task("kodcode", verify_solutions="none", **options)
    (place,) = [n for n, e in enumerate(task.train) if "adds 5 " in str(e.question)] or [0]
    example = task.train[place]
    name = str(example.question).split()[5]
    forged = "class Same:\n    def __eq__(self, other): return True\n"
    forged += f"def add_{name}(x): return Same()\n"
    columns = {column: [value] for column, value in example.columns.items()}
    with caplog.at_level(logging.WARNING, "egspo"):
        scored = score_completions(task.rewards, ["?"], [fenced(forged)], columns)
    assert scored.per_function["tests"].tolist() == [0.0]
    assert "1 of 1 programs tampered with their tests, and score 0" in caplog.text


def test_mbpp(sources: dict[str, str]) -> None:
    options = {"train": sources["mbpp"], "test": None, "test_examples": 2}
    task = build_task("mbpp", validation_examples=1, **options)
    assert (len(task.train), len(task.validation), len(task.test)) == (5, 1, 2)
    example = task.test[0]
    assert "assert height_" in example.prompt[0]["content"]
    assert str(example.prompt).count("assert") == 2
    one = build_task("mbpp", shown_tests=1, validation_examples=0, **options)
    assert str(one.test[0].prompt).count("assert") == 1
    references = [str(e.target) for e in task.train]
    assert score(task, "train", references)["solved"] == [1.0] * 5
    broken = [text.replace("return 0 if", "return 7 if") for text in references]
    assert set(score(task, "train", broken)["tests"]) == {0.0}
    half = [text.replace("n.left)", "n.left) + 1") for text in references]
    assert score(task, "train", half)["tests"] == [0.5] * 5


def test_humaneval(sources: dict[str, str]) -> None:
    options = {"train": sources["mbpp"], "test": sources["humaneval"], "validation_examples": 1}
    task = build_task("humaneval", **options)
    assert (len(task.train), len(task.validation), len(task.test)) == (7, 1, 2)
    assert score(task, "test", [str(e.target) for e in task.test])["solved"] == [1.0, 1.0]
    # Helpers and imports of the prompt need not be repeated.
    alone = ["def find_zero(xs): return -xs[0] / xs[1]", "def add(x, y): return x + y"]
    assert score(task, "test", list(map(fenced, alone)))["solved"] == [1.0, 1.0]
    # The tests use those of the prompt, whatever the program defines under their names.
    forged = "def poly(xs, x): return 0.0\nmath = None\ndef find_zero(xs): return 1.0"
    scored = score(task, "test", [fenced(forged), fenced("def add(x, y): return x - y")])
    assert scored["tests"] == [0.0, 0.0]
    assert len(build_task("humaneval", test_examples=1, **options).test) == 1
    assert "Complete the function find_zero:\n```python\nimport math" in str(
        task.test[0].prompt[0]["content"]
    )


@pytest.mark.parametrize("name", ["kodcode", "mbpp", "humaneval"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sandbox": "docker"}, ValueError, "sandbox must be one of"),
        ({"sandbox": "http"}, ValueError, "url goes with sandbox: http"),
        ({"runner": "nose"}, ValueError, "runner must be one of"),
        ({"verify_solutions": True}, ValueError, "verify_solutions must be one of"),
        ({"limits": {"memory": 1}}, ValueError, "limits has no 'memory'"),
        ({"limits": [1]}, ValueError, "limits must be a mapping"),
        ({"workers": 0}, ValueError, "workers must be >= 1"),
        ({"workers": "4"}, ValueError, "workers must be a whole number"),
        ({"sandbx": "http"}, ValueError, "did you mean 'sandbox'"),
        ({"sandbox": "http", "url": "http://127.0.0.1:9/"}, SandboxUnavailable, "127.0.0.1:9"),
    ],
)
def test_options_are_checked_before_data_is_loaded(
    name: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(error, match=message):
        build_task(name, **options)


def test_without_bubblewrap_the_task_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxUnavailable, match="apt-get install bubblewrap"):
        build_task("mbpp", limits={"wall_seconds": 19.0})  # options that no other test has cached


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("mbpp", "test_list", [], "test_list of .* is empty"),
        ("mbpp", "test_list", ["assert f( =="], "are no Python"),
        ("kodcode", "test_info", "text", "test_info of .* must be a list"),
        ("humaneval", "entry_point", "a b", "is no name: 'a b'"),
        ("humaneval", "test", "def check(", "test of add is no Python"),
    ],
)
def test_rows_that_are_wrong_are_named(
    sources: dict[str, str], tmp_path: Path, name: str, column: str, value: Any, message: str
) -> None:
    rows = {"mbpp": MBPP, "kodcode": KODCODE, "humaneval": HUMANEVAL[1:]}[name]
    file = str(tmp_path / "wrong.parquet")
    datasets.Dataset.from_list([{**row, column: value} for row in rows]).to_parquet(file)
    options: dict[str, Any] = {"validation_examples": 1}
    if name == "humaneval":
        options |= {"train": sources["mbpp"], "test": file}
    else:
        options |= {"train": file, "test": None, "test_examples": 1}
    with pytest.raises(ValueError, match=message):
        build_task(name, **options)


@pytest.mark.slow
def test_hostile_completions_score_nothing(sources: dict[str, str]) -> None:
    options = {"train": sources["mbpp"], "test": None, "test_examples": 1, "sandbox": "bubblewrap"}
    task = build_task("mbpp", validation_examples=0, limits={"test_seconds": 1.0}, **options)
    hostile = [
        "",
        "```python\n" + "(" * 10**6,
        fenced("x = '" + "a" * 10**6 + "'"),
        fenced("人工知能"),
        fenced("import os\nos._exit(0)"),
        fenced("while True: pass"),
        "```python\n\ud800\n```",
    ]
    tests = [task.train[0].columns["tests"]] * len(hostile)
    columns = {"tests": tests, "prelude": [""] * len(hostile)}
    scored = score_completions(task.rewards, ["?"] * len(hostile), hostile, columns)
    assert scored.per_function["tests"].tolist() == [0.0] * len(hostile)
