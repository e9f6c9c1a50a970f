"""Tests in the forms of pytest and unittest, run by pytest beside the program: honest and not."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

import egspo.sandbox.processes as processes
from egspo.sandbox import Bubblewrap
from egspo.sandbox.exam import set_exam
from tests.helpers.marks import slow_but
from tests.sandbox.attacks import FORGERIES as SEPARATE_FORGERIES
from tests.sandbox.attacks import PROBES
from tests.sandbox.conftest import LIMITS, require_bubblewrap
from tests.sandbox.forgeries import COMMON, FORGERIES, HONEST, SLOW_FORGERIES, TESTS
from tests.sandbox.test_escapes import PROBE_TESTS
from tests.sandbox.test_escapes import TESTS as ONE_TEST


@pytest.fixture(scope="module")
def runner() -> Iterator[Bubblewrap]:
    require_bubblewrap()
    backend = Bubblewrap(LIMITS, runner="pytest")
    yield backend
    backend.close()


@pytest.fixture(autouse=True)
def one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same candidates in every run of this suite: no guess is right by luck now and then."""
    draw = functools.partial(set_exam, rng=random.Random(0))
    monkeypatch.setattr(processes, "set_exam", draw)


def test_whoever_has_the_answers_passes(runner: Bubblewrap) -> None:
    verdict = runner.run(HONEST, TESTS)
    assert [case for case in verdict.cases if not case.passed] == []
    assert (verdict.total, verdict.score, verdict.tampered) == (15, 1.0, False)


QUICK = {"swallowed assertions", "equal to everything", "import hooks", "exit in the test"}


@pytest.mark.parametrize("name", slow_but(QUICK, FORGERIES))
def test_a_forgery_gains_nothing(runner: Bubblewrap, name: str) -> None:
    verdict = runner.run(COMMON + FORGERIES[name], TESTS)
    assert (verdict.passed, verdict.score) == (0, 0.0), verdict
    assert verdict.total == 15 or verdict.tampered


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_FORGERIES)
def test_a_slow_forgery_gains_nothing(runner: Bubblewrap, name: str) -> None:
    verdict = runner.run(COMMON + SLOW_FORGERIES[name], TESTS)
    assert (verdict.passed, verdict.score) == (0, 0.0), verdict


TAMPERING = (
    *("every report says passed", "tests that are not run", "a plugin", "checks of everything"),
    *("equal to everything", "equality patched", "an exception of every kind", "nonsense"),
    "outcomes in every descriptor",
)


@pytest.mark.parametrize("name", slow_but({"a plugin", "equality patched"}, TAMPERING))
def test_tampering_is_told_from_failing(runner: Bubblewrap, name: str) -> None:
    verdict = runner.run(COMMON + FORGERIES[name], TESTS)
    assert verdict.tampered
    assert "tampering" in str(verdict.error)


# These know how the answer begins, and so which of the candidates are none.
KNOWING = {"frames", "gc", "memory", "files and other processes"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SEPARATE_FORGERIES if name not in KNOWING])
def test_forgeries_for_separate_processes_gain_nothing_here(runner: Bubblewrap, name: str) -> None:
    verdict = runner.run(SEPARATE_FORGERIES[name], ONE_TEST)
    assert (verdict.passed, verdict.score) == (0, 0.0), verdict


@pytest.fixture(scope="module")
def patient() -> Iterator[Bubblewrap]:
    require_bubblewrap()
    backend = Bubblewrap(replace(LIMITS, test_seconds=10.0), runner="pytest")
    yield backend
    backend.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_a_probe_reaches_nothing(patient: Bubblewrap, name: str) -> None:
    # That there are variables and files of pytest's is no leak.
    program = PROBES[name].replace('"PYTHONHASHSEED"}', '"PYTHONHASHSEED", *OWN}')
    program = program.replace('os.listdir("/tmp")', 'sorted(set(os.listdir("/tmp")) - OWN)')
    own = ("PYTEST_VERSION", "PYTEST_CURRENT_TEST", "PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    own += ("solution.py", "test_solution.py", "__pycache__")
    verdict = patient.run(f"OWN = set({own!r})\n{program}", PROBE_TESTS)
    assert (verdict.passed, verdict.total) == (1, 1), verdict


FORMS = """
import asyncio, contextlib, io, os, pathlib, sys, unittest
import pytest
import solution
from solution import Base, Stack, add, echo, fail, greet, later, square

events = []

@pytest.fixture(autouse=True)
def around():
    events.append("before")
    yield
    events.append("after")

@pytest.fixture(name="two")
def a_fixture_of_another_name(): return 2

@pytest.fixture(scope="module", params=[3, 4])
def several(request): return request.param

def setup_module(module): events.append("module")
def setup_function(function): events.append("function")

def test_order(): assert events == ["module", "before", "function"] or events[0] == "module"
def test_name(two): assert add(two, 1) == 3
def test_params(several): assert add(several, 0) in (3, 4)
def test_builtin_fixtures(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").write_text("x")
    monkeypatch.setattr(solution, "WORD", "Bye")
    greet()
    assert capsys.readouterr().out == "Bye\\n"
    assert echo(tmp_path / "a").read_text() == "x"

async def test_await(): assert await later(3) == 3
@pytest.mark.asyncio
async def test_marked():
    async with contextlib.AsyncExitStack(): assert await later(4) == 4
def test_run(): assert asyncio.run(later(5)) == 5

class TestAsync(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self): self.value = await later(1)
    async def test_value(self): self.assertEqual(self.value, 1)

class TestUnit(unittest.TestCase):
    @classmethod
    def setUpClass(cls): cls.shared = Stack()
    def setUp(self): self.own = Stack()
    def test_class(self):
        self.shared.append(1)
        self.assertIn(1, self.shared)
        self.assertIsInstance(self.own, list)
    def test_context(self):
        with self.assertRaises(ValueError) as context: fail("bad")
        self.assertEqual(str(context.exception), "bad")
    def test_regex(self):
        with self.assertRaisesRegex(ValueError, "ba."): fail("bad")
    def test_sub(self):
        for n in range(3):
            with self.subTest(n=n): self.assertEqual(add(n, 1), n + 1)
    @unittest.expectedFailure
    def test_expected(self): self.assertEqual(add(1, 1), 3)
    @unittest.skip("not now")
    def test_skipped(self): self.fail()

class Common:
    def test_inherited(self): assert add(self.n, 1) == self.n + 1
class TestOne(Common): n = 1
class TestTwo(Common): n = 2

@pytest.mark.xfail
def test_xfail(): assert add(1, 1) == 3
@pytest.mark.skipif(sys.version_info > (3,), reason="new")
def test_skip(): assert add(1, 1) == 3

def test_excinfo():
    with pytest.raises(ValueError, match="ba.") as info: fail("bad")
    assert info.type is ValueError and str(info.value) == "bad" and "bad" in repr(info)
    with pytest.raises((ValueError, KeyError)): fail("x")
    with pytest.raises(ZeroDivisionError): 1 / add(0, 0)

def test_objects():
    class Mine(Base):
        def size(self): return 7
    assert Mine().doubled() == 14 and Base.__name__ == "Base" and isinstance(Mine(), Base)
    stack = Stack()
    stack.append(1)
    same = echo(stack)
    same += [2]
    assert stack is same and stack == [1, 2] and 3 * Stack([1]) == [1, 1, 1] and 2 in stack
    out = io.StringIO()
    with contextlib.redirect_stdout(out): greet()
    assert out.getvalue() == "Hello\\n"
    assert echo(pathlib.Path("a") / "b").name == "b"
    assert square.__name__ == "square" and list(map(square, [1, 2])) == [1, 4]

@pytest.mark.parametrize("a, b, expected", [pytest.param(1, 2, 3, id="x"), (2, 2, 4)])
@pytest.mark.parametrize("times", [1, 2])
def test_table(a, b, expected, times):
    assert add(a, b) == expected

def test_handled():
    try:
        assert add(1, 1) == 3
    except AssertionError:
        pass
    else:
        pytest.fail("it is not")
    with pytest.raises(AssertionError):
        assert add(1, 1) == 3
    assert add(0.1, 0.2) == pytest.approx(0.3) and add([], [1]) == [1] and not add([], [])
    assert add(1, 1) == 2 and add(None and 1 or 1, 0) is not None
    for case in ({"in": 1, "out": 2},): assert add(case["in"], 1) == case["out"]
    assert (n := add(1, 2)) == 3
    assert n == 3, "walrus"
"""
PROGRAM = """
import asyncio
WORD = "Hello"
class Base:
    def size(self): return 1
    def doubled(self): return 2 * self.size()
class Stack(list): pass
def add(a, b): return a + b
def echo(x): return x
def square(x): return x * x
def fail(text): raise ValueError(text)
def greet(): print(WORD)
async def later(x):
    await asyncio.sleep(0)
    return x
"""


def test_what_test_files_do(runner: Bubblewrap) -> None:
    verdict = runner.run(PROGRAM, FORMS)
    assert [case for case in verdict.cases if not case.passed] == []
    assert (verdict.total, verdict.error, verdict.tampered) == (24, None, False)


@pytest.mark.parametrize("wrong", ["pass", "raise ValueError('bad')", "return 3", "return None"])
def test_wrong_programs_pass_what_they_get_right_alone(runner: Bubblewrap, wrong: str) -> None:
    program = PROGRAM.replace("def add(a, b): return a + b", f"def add(a, b): {wrong}")
    verdict = runner.run(program, FORMS)
    failed = {case.name.partition("[")[0] for case in verdict.cases if not case.passed}
    assert {"test_name", "test_table", "test_handled", "TestOne::test_inherited"} - failed <= (
        {"test_name"} if wrong == "return 3" else set()
    )
    assert not verdict.tampered


@pytest.mark.parametrize(
    ("program", "test", "error"),
    [
        ("def f(x): return x", "assert f(1) == 2", "AssertionError: assert f(1) == 2"),
        ("def f(x): return x / 0", "f(1)", "ZeroDivisionError: division by zero"),
        ("def g(x): return 1", "f(1)", "cannot import name 'f'"),
        ("def f(x) return 1", "f(1)", "SyntaxError"),
        ("import no_such_module", "f(1)", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import time\ndef f(x): time.sleep(9)", "f(1)", "took longer than 1 s"),
        ("import os\ndef f(x): os._exit(0)", "f(1)", "the process ended"),
        ("def f(x): return x", "pass", None),
    ],
)
def test_a_failure_says_why(runner: Bubblewrap, program: str, test: str, error: str | None) -> None:
    verdict = runner.run(program, f"def test_it():\n    from solution import f\n    {test}\n")
    assert verdict.total == 1
    assert verdict.passed == (error is None)
    assert (error or "None") in str(verdict.cases[0].error)
    assert not verdict.tampered


def test_a_test_that_hangs_or_crashes_takes_no_other_with_it(runner: Bubblewrap) -> None:
    program = "import os, signal\ndef f(n):\n    if n == 1: os._exit(0)\n    if n == 2: return 3\n"
    program += "    if n == 3: os.kill(os.getpid(), signal.SIGSEGV)\n"
    program += "    if n == 4:\n        while True: pass\n    return n\n"
    tests = "from solution import f\nimport pytest\n"
    tests += "@pytest.mark.parametrize('n', range(8))\ndef test_it(n): assert f(n) == n\n"
    verdict = runner.run(program, tests)
    assert [case.passed for case in verdict.cases] == [True] + [False] * 4 + [True] * 3
    assert verdict.timed_out


@pytest.mark.parametrize(
    ("tests", "error"),
    [
        ("from solution import f", "there is no test"),
        ("", "there is no test"),
        ("def test_it(:", "SyntaxError"),
    ],
)
def test_no_tests_are_no_success(runner: Bubblewrap, tests: str, error: str) -> None:
    verdict = runner.run("def f(x): return x", tests)
    assert (verdict.passed, verdict.total, verdict.score) == (0, 0, 0.0)
    assert error in str(verdict.error)


def test_nothing_of_one_run_is_there_in_the_next(runner: Bubblewrap) -> None:
    program = """
import os, subprocess, sys, time
left = os.path.exists("/tmp/left"), [p for p in os.listdir("/proc") if p.isdigit()]
open("/tmp/left", "w").close()
if os.fork() == 0:
    os.setsid()
    time.sleep(60)
def f(): return left[0], len(left[1])
"""
    tests = "from solution import f\ndef test_it():\n    assert f() == (False, 2)\n"
    for _ in range(2):
        assert runner.run(program, tests).score == 1.0
