"""Honest programs get the verdict that they would get beside their tests."""

from __future__ import annotations

import pytest

from egspo.sandbox import Bubblewrap, Limits

PROGRAM = """
import collections

class Stack(list):
    def push(self, x): self.append(x)

class CodeError(ValueError):
    def __init__(self, code):
        self.code = code
        super().__init__(f"bad {code}")

Point = collections.namedtuple("Point", "x y")

class Vector:
    def __init__(self, *parts): self.parts = parts
    def __eq__(self, other): return self.parts == other.parts
    def __add__(self, other): return Vector(*map(sum, zip(self.parts, other.parts)))
    def __len__(self): return len(self.parts)
    def __repr__(self): return f"Vector{self.parts}"

class Node:
    def __init__(self, value): self.value, self.next = value, None

class Managed:
    def __enter__(self): return 5
    def __exit__(self, kind, error, trace): return kind is not None

def fail(code): raise CodeError(code)
def sort_in_place(xs): xs.sort()
def clear_row(rows): rows[0].clear()
def count_up(n): yield from range(n)
def apply(f, xs): return [f(x) for x in xs]
def shift(p): return Point(p.x + 1, p.y)
def same(x): return x
def plus_one(f): return lambda *args: f(*args) + 1
def double(tree): tree.value *= 2
def reverse(node):
    last = None
    while node: node.next, last, node = last, node, node.next
    return last
"""
TESTS = """
import collections, contextlib, datetime, decimal, fractions, math
import solution
from solution import *

@contextlib.contextmanager
def raises(kind, found=None):
    try:
        yield
    except kind as error:
        found is None or found.append(error)
    else:
        raise AssertionError(f"did not raise {kind}")

def test_objects_of_the_program():
    s = Stack()
    s.push(1)
    s.push(2)
    assert len(s) == 2 and s[0] == 1 and s[-1] == 2 and list(s) == [1, 2] and s.pop() == 2
    assert 1 in s and 5 not in s and isinstance(s, Stack) and not isinstance(s, Vector) and s

def test_exceptions():
    found = []
    with raises(CodeError, found):
        fail(3)
    assert found[0].code == 3 and str(found[0]) == "bad 3"
    with raises(ValueError):
        fail(4)
    with raises(AttributeError):
        solution.absent
    with raises(TypeError):
        fail()

def test_arguments_changed_in_place():
    xs = [3, 1, 2]
    sort_in_place(xs)
    assert xs == [1, 2, 3]
    rows = [[1], [2]]
    first = rows[0]
    clear_row(rows)
    assert rows == [[], [2]] and first is rows[0] and first == []

def test_generators():
    assert list(count_up(3)) == [0, 1, 2] and sum(count_up(4)) == 6
    g = count_up(1)
    assert next(g) == 0
    with raises(StopIteration):
        next(g)

def test_functions_of_the_tests():
    assert apply(lambda x: x + 1, [1, 2]) == [2, 3]
    assert apply(str, (1, 2)) == ["1", "2"] and apply(math.sqrt, [4]) == [2.0]
    assert apply(lambda n: n.value, [Node(7)]) == [7]
    with raises(ZeroDivisionError):
        apply(lambda x: 1 / 0, [1])
    @plus_one
    def f(x): return x * 2
    assert f(3) == 7

def test_objects_of_the_tests():
    class Tree:
        def __init__(self): self.value = 4
    tree = Tree()
    double(tree)
    assert tree.value == 8

def test_named_tuples():
    q = shift(Point(1, 2))
    assert q == (2, 2) and q.x == 2 and isinstance(q, Point) and shift(q).x == 3

def test_operators_of_the_program():
    assert Vector(1, 2) + Vector(3, 4) == Vector(4, 6) and Vector(1, 2) != Vector(1, 3)
    assert repr(Vector(1)) == "Vector(1,)" and len(Vector(1, 2)) == 2
    with Managed() as five:
        assert five == 5
    with Managed():
        raise ValueError("suppressed")

def test_linked_lists():
    a = Node(1)
    a.next = Node(2)
    h = reverse(a)
    assert h.value == 2 and h.next.value == 1 and h.next.next is None and h.next is a

VALUES = [None, True, 1, -5, 10**5000, 1.5, float("inf"), "é\\ud800", b"x", [1, [2]], (1, (2,)),
          {1: 2, (1, 2): [3]}, {1, 2}, frozenset([1]), 1 + 2j, range(3), bytearray(b"a"), int,
          decimal.Decimal("1.10"), fractions.Fraction(1, 3), datetime.date(2020, 1, 2),
          datetime.timedelta(1, 2), datetime.datetime(2020, 1, 2, 3, 4), datetime.time(1, 2),
          collections.Counter("aab"), collections.OrderedDict(a=1), collections.deque([1], 2),
          collections.defaultdict(list, {1: [2]}), [], {}, (), "", 0.1 + 0.2]

def test_plain_values():
    for value in VALUES:
        result = same(value)
        assert result == value and type(result) is type(value)

def test_nan():
    result = same(float("nan"))
    assert result != result and abs(same([0.1 + 0.2])[0] - 0.3) < 1e-9
"""


def test_what_a_test_can_do_with_a_program(sandbox: Bubblewrap) -> None:
    verdict = sandbox.run(PROGRAM, TESTS)
    assert [case for case in verdict.cases if not case.passed] == []
    assert (verdict.total, verdict.score, verdict.error) == (11, 1.0, None)


@pytest.mark.parametrize(
    ("program", "test", "error"),
    [
        ("def f(x): return x", "assert f(1) == 2", "AssertionError: assert f(1) == 2"),
        ("def f(x): return x / 0", "f(1)", "ZeroDivisionError: division by zero"),
        ("def g(x): return 1", "f(1)", "ImportError: cannot import name 'f'"),
        ("def f(x) return 1", "f(1)", "the program failed to load: SyntaxError"),
        ("import no_such_module", "f(1)", "the program failed to load: ModuleNotFoundError"),
        ("input()", "f(1)", "the program failed to load: EOFError"),
        ("def f(x): return x", "import sys; f(sys)", "a module cannot be given"),
        ("def f(x): return x", "f(1) + nothing", "NameError"),
        ("import time\ndef f(x): time.sleep(9)", "f(1)", "took longer than 1 s"),
        ("import os\ndef f(x): os._exit(0)", "f(1)", "the program's process ended"),
        ("def f(x): return x", "import pytest", "No module named 'pytest'"),
    ],
)
def test_a_failure_says_why(sandbox: Bubblewrap, program: str, test: str, error: str) -> None:
    verdict = sandbox.run(program, f"def test_it():\n    from solution import f\n    {test}\n")
    assert verdict.passed == 0
    assert error in str(verdict.cases[0].error)


@pytest.mark.parametrize(
    ("program", "error", "timed_out"),
    [
        ("import os; os._exit(0)", "the program ended while it loaded", False),
        ("while True: pass", "loading took longer than 1 s", True),
    ],
)
def test_a_program_that_does_not_load(
    sandbox: Bubblewrap, program: str, error: str, timed_out: bool
) -> None:
    verdict = sandbox.run(program, "def test_it(): pass")
    assert (verdict.total, verdict.error, verdict.timed_out) == (0, error, timed_out)


def test_the_share_of_tests_passed(sandbox: Bubblewrap) -> None:
    tests = "from solution import f\n"
    tests += "".join(f"def test_{n}(): assert f({n}) == {n}\n" for n in range(8))
    program = "import os, time\ndef f(n):\n    if n == 1: os._exit(0)\n    if n == 2: return 3\n"
    verdict = sandbox.run(program + "    if n == 3: time.sleep(9)\n    return n\n", tests)
    assert [case.passed for case in verdict.cases] == [True] + [False] * 3 + [True] * 4
    assert (verdict.passed, verdict.total, verdict.score) == (5, 8, 0.625)
    assert verdict.timed_out


@pytest.mark.parametrize(
    ("tests", "error"),
    [
        ("from solution import f", "there is no test"),
        ("", "there is no test"),
        ("def test_it(:", "SyntaxError"),
        ("import absent_module\ndef test_it(): pass", "ModuleNotFoundError"),
    ],
)
def test_no_tests_are_no_success(sandbox: Bubblewrap, tests: str, error: str) -> None:
    verdict = sandbox.run("def f(x): return x", tests)
    assert (verdict.passed, verdict.total, verdict.score) == (0, 0, 0.0)
    assert error in str(verdict.error)


DIES = "import os\ndef f(x): os._exit(0)"


@pytest.mark.parametrize(
    ("program", "test"),
    [
        (DIES, "try: f(1)\n    except: pass"),
        (DIES, "try: f(1)\n    except Exception: pass"),
        (DIES, "assert all(map(lambda x: f(x) == 1, [1, 2]))"),
        ("import time\ndef f(x): time.sleep(9)", "try: f(1)\n    except: pass"),
        ("def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == 1, [1, 2]))"),
        ("len = lambda x: 1\ndef f(x): return []", "assert len(f(1)) == 1"),
    ],
)
def test_what_a_careless_test_lets_pass_elsewhere(
    sandbox: Bubblewrap, program: str, test: str
) -> None:
    tests = f"from solution import *\ndef test_it():\n    {test}\n"
    assert sandbox.run(program, tests).passed == 0


@pytest.mark.parametrize(
    "test",
    [
        "assert abs(f(1) - 5.25) < 1e-6",
        "assert 5.25 - f(1) == 0",
        "assert f(1) in [5.25]",
        "assert 5.25 in f(1)",
        "assert f(1) > 5",
        "assert [f(1)] == [5.25]",
        "assert {f(1)} == {5.25}",
        "assert {5.25: 1}[f(1)]",
        "assert round(f(1), 2) == 5.25",
        "assert math.isclose(f(1), 5.25)",
        "assert str(f(1)) == '5.25'",
        "assert isinstance(f(1), float)",
        "assert f(1).__eq__ is True",
        "assert 'a%s' % f(1) == 'a5.25'",
    ],
)
def test_an_object_that_agrees_with_everything(sandbox: Bubblewrap, test: str) -> None:
    program = """
class Same:
    seen = None
    def learn(self, other=0, *rest):
        Same.seen = other
        return True
    __eq__ = __lt__ = __gt__ = __contains__ = __bool__ = __index__ = learn
    def __hash__(self): return hash(5.25)
    def __sub__(self, other): Same.seen = other; return 0.0
    __rsub__ = __add__ = __radd__ = __sub__
    def __iter__(self): return iter([self])
    def __float__(self): return float(Same.seen or 0)
    def __round__(self, digits): return Same.seen or self
    def __str__(self): return str(Same.seen)
    def __getattr__(self, name): return Same()
def f(x): return Same()
"""
    tests = f"import math\nfrom solution import f\ndef test_it():\n    {test}\n"
    assert sandbox.run(program, tests).passed == 0


def test_the_deadline_of_the_run_keeps_what_was_reached() -> None:
    from tests.sandbox.conftest import require_bubblewrap

    require_bubblewrap()
    sandbox = Bubblewrap(Limits(wall_seconds=1.5, test_seconds=1.0))
    tests = "import time\ndef test_a(): pass\n"
    tests += "".join(f"def test_{n}(): time.sleep(0.6)\n" for n in range(6))
    verdict = sandbox.run("", tests)
    assert 1 <= verdict.passed <= 3
    assert verdict.total == 7
    assert verdict.timed_out
    assert "1.5 s" in str(verdict.error)


def test_sets_have_one_order(sandbox: Bubblewrap) -> None:
    program = "def f(): return list(set('abcdefghij')), hash('egspo')"
    tests = "from solution import f\ndef test_it(): assert f() == 0, f()\n"
    verdicts = {sandbox.run(program, tests).cases[0].error for _ in range(3)}
    assert len(verdicts) == 1
    assert "'j'" in str(verdicts)


@pytest.mark.parametrize("field", Limits.__dataclass_fields__)
@pytest.mark.parametrize("value", [0, -1, float("nan"), "5", None, True])
def test_limits_are_checked(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Limits(**{field: value})  # type: ignore[arg-type]
