"""Test files as exams: what becomes of assertions, and how reports are marked."""

from __future__ import annotations

import ast
import json
import random
import types
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egspo.sandbox.exam import Exam, judge, set_exam
from egspo.sandbox.exam.decoys import COUNT, candidates, exceptions
from egspo.sandbox.exam.survey import survey
from egspo.sandbox.inside.session import Checks

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(plain, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_candidates_differ_and_one_is_the_value(value: object, rng: random.Random) -> None:
    found = candidates(value, rng)
    if found is None:
        return
    values, place = found
    assert values[place] == value
    assert type(values[place]) is type(value)
    assert [v == value for v in values].count(True) == 1
    assert all(ast.literal_eval(repr(v)) == v for v in values if "inf" not in repr(v))


@pytest.mark.parametrize("value", [0, 5, -3, 2.5, 1e-9, "spam", [1, 2, 3], {"a": 1}, (1, "x"), ""])
def test_an_ordinary_value_is_one_of_sixteen(value: object) -> None:
    sizes = [len((candidates(value, random.Random(n)) or ([], 0))[0]) for n in range(50)]
    assert sum(sizes) / 50 > COUNT - 3


@pytest.mark.parametrize(
    "rule",
    [
        lambda values: sorted(values)[len(values) // 2],  # the one in the middle
        lambda values: min(values, key=abs),
        lambda values: values[0],
        lambda values: min(values, key=lambda v: sum(abs(v - other) for other in values)),
    ],
)
def test_no_rule_finds_the_value_of_a_number(rule: Any) -> None:
    hits = 0
    for seed in range(400):
        rng = random.Random(seed)
        value = rng.randint(50, 500)
        values, place = candidates(value, rng) or ([], 0)
        hits += rule(values) == values[place]
    assert hits / 400 < 0.16  # 1/16 by chance; the middle of a walk is a little more than that


def test_candidates_of_a_tolerance_are_apart() -> None:
    for seed in range(50):
        values, place = candidates(2.5, random.Random(seed), gap=0.05) or ([], 0)
        near = [v for v in values if abs(v - values[place]) <= 0.1]
        assert near == [2.5]


def test_exceptions_are_unrelated() -> None:
    for kind in (ValueError, KeyError, UnicodeDecodeError, RuntimeError, OSError):
        names, place = exceptions(kind, random.Random(0))
        assert names[place] == kind.__name__
        assert len(names) == 6


def rewritten(tests: str) -> str:
    return set_exam(tests, rng=random.Random(1)).source


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("assert f(1) == 5", "each"),
        ("assert 5 == f(1)", "each"),
        ("assert f(1) == -5 and f(2) == [1]", "each"),
        ("assert f(1) is None", "each"),
        ("assert f(1) == True", "each"),
        ("assert f(1) == approx(2.5)", "each"),
        ("assert f(1) == pytest.approx([2.5, 1], rel=1e-3)", "each"),
        ("assert math.isclose(f(1), 2.5, rel_tol=1e-6)", "each"),
        ("assert abs(f(1) - 2.5) < 1e-6", "each"),
        ("self.assertEqual(f(1), 5)", "each"),
        ("self.assertAlmostEqual(f(1), 2.5)", "each"),
        ("self.assertAlmostEqual(f(1), 2.5, places=3)", "each"),
        ("self.assertAlmostEqual(f(1), 2.5, delta=0.01)", "each"),
        ("self.assertIsNone(f(1))", "each"),
        ("assert f(1) == f(2)", "equal"),
        ("assert f(1) == approx(2.5, abs=9)", "equal"),  # no room for other candidates
        ("assert f(1) == approx(2.5, abs=tolerance)", "equal"),
        ("assert f(1) == float('nan')", "equal"),
        ("assert abs(f(1) - 2.5) < 100", "true"),
        ("assert f(1)", "true"),
        ("assert not f(1)", "true"),
        ("assert f(1) > 3", "true"),
        ("assert f(1) != 3", "true"),
        ("assert 1 == 1", "equal"),
        ("self.assertTrue(f(1), 'message')", "true"),
        ("self.assertIn(f(1), [5])", "true"),
        ("with pytest.raises(ValueError): f(1)", "raises"),
        ("with self.assertRaises(KeyError): f(1)", "raises"),
        ("self.assertRaises(KeyError, f, 1)", None),
        ("self.assertCountEqual(f(1), [1])", None),
        ("with pytest.raises(Exception): f(1)", None),
        ("with pytest.raises(AssertionError):\n        assert f(1) == 5", None),
        ("try:\n        assert f(1) == 5\n    except Exception: pass", None),
        ("with self.assertRaises(ValueError) as context: f(1)", None),
        ("f(1)", None),
    ],
)
def test_what_becomes_of_an_assertion(statement: str, kind: str | None) -> None:
    source = rewritten(f"def test_it(self):\n    {statement}\n")
    function = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "test_it"
    )
    calls = {
        node.func.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "_checks"
    }
    assert calls - {"choice"} == ({kind} if kind else set())


def test_what_is_expected_under_a_name_is_hidden_too() -> None:
    tests = """
import pytest
def test_variable():
    expected = "seventeen"
    assert f(1) == expected
def test_loop():
    cases = [(1, "eighteen"), (2, "nineteen")]
    for x, y in cases:
        assert f(x) == y
@pytest.mark.parametrize("x, y", [(1, "twenty"), pytest.param(2, "thirty", id="b")])
def test_parameters(x, y):
    assert f(x) == y
"""
    exam = set_exam(tests, rng=random.Random(0))
    assert [len(check.choices) for check in exam.checks] == [1, 2, 2]
    assert [check.every for check in exam.checks] == [False, True, False]
    for word in ("seventeen", "eighteen", "nineteen", "twenty", "thirty"):
        assert sum(f"'{word}'" in answer.candidates for answer in exam.answers) == 1


@pytest.mark.parametrize(
    "use",
    [
        "assert f(expected) == expected",
        "assert f(1) == expected + 1",
        "assert f(1) == expected\n    expected = 2",
        "assert len(expected) == f(1)\n    assert f(1) == expected",
        "assert all(f(x) == expected for x in [1])",
        "def g(): assert f(1) == expected\n    g()",
    ],
)
def test_a_value_that_has_another_use_stays_what_it_is(use: str) -> None:
    source = rewritten(f"def test_it():\n    expected = 17\n    {use}\n")
    assert "expected = 17" in source


def test_star_gives_no_name_that_the_tests_have() -> None:
    tests = "import math\nfrom solution import *\nLIMIT = 3\ndef test_it():\n"
    tests += "    assert math.floor(f(LIMIT)) == len(g(1))\n"
    assert "_checks.star(globals(), ['f', 'g'])" in rewritten(tests)


def test_future_imports_and_docstrings_stay_first() -> None:
    source = rewritten('"""Doc."""\nfrom __future__ import annotations\ndef test_it(): assert f()')
    compile(source, "tests", "exec")
    assert source.startswith('"""Doc."""\nfrom __future__ import annotations\nfrom _checks')


def test_canaries_are_named_and_placed_like_tests() -> None:
    tests = "from solution import f\n" + "".join(
        f"def test_{word}():\n    assert f({n}) == {n}\n" for n, word in enumerate("abcdef")
    )
    places: Counter[int] = Counter()
    for seed in range(25):
        exam = set_exam(tests, rng=random.Random(seed))
        assert len(exam.canaries) == 2
        assert not exam.canaries & exam.tests.keys()
        places.update(exam.order.index(name) for name in exam.canaries)
    assert len(places) >= 7  # anywhere


def test_tests_as_they_are_written() -> None:
    tests = """
import unittest, pytest
def helper(): pass
def test_a(): pass
@pytest.mark.parametrize("a", [1, 2, 3])
@pytest.mark.parametrize("b", [1, 2])
def test_b(a, b): pass
@pytest.mark.parametrize("a", range(3))
def test_c(a): pass
@pytest.mark.skip
def test_d(): pass
class TestE:
    @pytest.mark.xfail
    def test_f(self): pass
class Base: 
    def test_g(self): pass
class TestH(Base): pass
class Cases(unittest.TestCase):
    def test_i(self): pass
"""
    found = survey(ast.parse(tests)).tests
    assert {name: test.count for name, test in found.items()} == {
        **{"test_a": 1, "test_b": 6, "test_c": None, "test_d": 1, "TestE::test_f": 1},
        **{"TestH::test_g": 1, "Cases::test_i": 1},
    }
    assert [name for name, test in found.items() if test.may_skip] == ["test_d"]
    assert [name for name, test in found.items() if test.may_fail] == ["TestE::test_f"]


# --- Marking

ONE = "from solution import f\ndef test_it():\n    assert f(3) == 17\n    assert f(4)\n"


def reports(exam: Exam, program: dict[int, Any]) -> list[str]:
    """What a run would write in which ``f`` gives these answers."""
    lines: list[dict[str, Any]] = []
    module = types.ModuleType("tests")
    module.__dict__.update(_checks=Checks(lines.append), f=lambda x: program[x])
    body = exam.source.replace("from _checks import _checks\n", "")
    exec(body.replace("from solution import f\n", ""), module.__dict__)
    for name in exam.order:
        lines.append({"start": f"test_solution.py::{name}"})
        outcome = "passed"
        try:
            module.__dict__[name]()
        except Exception:
            outcome = "failed"
        lines.append({"end": f"test_solution.py::{name}", "outcome": outcome, "error": "no"})
    return [f"-{json.dumps(line)}" for line in lines] + ['={"end": null, "timeout": false}']


def test_right_and_wrong_answers() -> None:
    for seed in range(20):
        exam = set_exam(ONE, rng=random.Random(seed))
        assert judge(exam, reports(exam, {3: 17, 4: True})).score == 1.0
        assert judge(exam, reports(exam, {3: 17, 4: 0})).score == 0.0
        assert judge(exam, reports(exam, {3: 18, 4: True})).score == 0.0
        assert not judge(exam, reports(exam, {3: 18, 4: True})).tampered


def test_a_guess_is_right_once_in_sixteen() -> None:
    passed = 0
    for seed in range(240):
        exam = set_exam(ONE.replace("    assert f(4)\n", ""), rng=random.Random(seed))
        guess = random.Random(-seed).choice(exam.answers[0].candidates)
        passed += judge(exam, reports(exam, {3: int(guess), 4: True})).passed
    assert 4 <= passed <= 36  # 15 expected, a little more where there are fewer candidates


def test_many_guesses_are_tampering() -> None:
    tests = "from solution import f\n" + "".join(
        f"def test_{n}():\n    assert f({n}) == {100 + 7 * n}\n" for n in range(12)
    )
    exam = set_exam(tests, rng=random.Random(0))
    rng = random.Random(1)
    guesses = {n: int(rng.choice(exam.answers[n].candidates)) for n in range(12)}
    assert judge(exam, reports(exam, guesses)).tampered
    right = {n: 100 + 7 * n for n in range(12)}
    assert judge(exam, reports(exam, right)).score == 1.0
    wrong = {n: 100 + 7 * n + 3 * (n % 3 > 0) for n in range(12)}  # off by a little, now and then
    assert judge(exam, reports(exam, wrong)).score == pytest.approx(4 / 12)
    constant = judge(exam, reports(exam, dict.fromkeys(range(12), 107)))
    assert (constant.passed, constant.tampered) == (1, False)


@pytest.mark.parametrize(
    ("change", "tampered"),
    [
        (lambda lines: [line for line in lines if "check" not in line], False),
        (lambda lines: [line for line in lines if '"check": 0' not in line], False),
        (lambda lines: lines[:-1], False),  # no time left: what was reached counts
        (lambda lines: [line.replace('"failed"', '"passed"') for line in lines], True),
        (lambda lines: [line.replace('"failed"', '"skipped"') for line in lines], True),
        (lambda lines: lines[:1] + lines, True),
        (lambda lines: ["-{}", "-{", *lines], True),
        (lambda lines: ["-[1]", *lines], True),
        (lambda lines: ['-{"check": 99, "found": "1"}', *lines], True),
        (lambda lines: ['-{"check": true, "found": "2"}', *lines], True),
        (lambda lines: ['-{"check": 0, "choice": 0, "found": "1"}', *lines], True),
        (lambda lines: ['-{"check": 0, "choice": 7, "found": "0"}', *lines], True),
        (lambda lines: [line for line in lines if "::test_it_" not in line], True),
    ],
)
def test_reports_that_no_honest_run_makes(change: Any, tampered: bool) -> None:
    exam = set_exam(ONE, rng=random.Random(0))
    lines = change(reports(exam, {3: 17, 4: True}))
    lines = [line for line in lines if line]
    verdict = judge(exam, lines)
    assert verdict.tampered == tampered
    if tampered:
        assert verdict.score == 0.0
