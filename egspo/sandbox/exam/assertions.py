"""What an assertion compares: a value of the program's with one that is expected."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

_EQUALITIES = (
    *("assertEqual", "assertEquals", "assertListEqual", "assertTupleEqual", "assertDictEqual"),
    *("assertSetEqual", "assertSequenceEqual", "assertMultiLineEqual"),
)
_COMPARISONS: dict[str, ast.cmpop] = {
    **dict.fromkeys(_EQUALITIES, ast.Eq()),
    "assertNotEqual": ast.NotEq(),
    "assertIs": ast.Is(),
    "assertIsNot": ast.IsNot(),
    "assertIn": ast.In(),
    "assertNotIn": ast.NotIn(),
    "assertGreater": ast.Gt(),
    "assertGreaterEqual": ast.GtE(),
    "assertLess": ast.Lt(),
    "assertLessEqual": ast.LtE(),
}
_SINGLETONS = ((None,), (True,), (False,))


@dataclass(frozen=True)
class Reading:
    """One way to read a condition: ``relation`` of ``_v``, the value, and ``_e``, the expected."""

    value: ast.expr
    expected: ast.expr
    relation: ast.expr
    gap: float = 0.0
    """Expected values are the same to it that differ by less."""


@dataclass(frozen=True)
class Assertion:
    """A condition that must hold."""

    test: ast.expr
    readings: tuple[Reading, ...]


def assertions(node: ast.stmt) -> list[Assertion]:
    """Those that a statement makes; none where it is no assertion of a known form."""
    if isinstance(node, ast.Assert):
        both = isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)
        tests = node.test.values if both and isinstance(node.test, ast.BoolOp) else [node.test]
        return [_assertion(test) for test in tests]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return _method(node.value)
    return []


def _method(call: ast.Call) -> list[Assertion]:
    """Of :class:`unittest.TestCase`."""
    function = call.func
    if not isinstance(function, ast.Attribute) or ast.unparse(function.value) != "self":
        return []
    name, arguments = function.attr, call.args
    if name in _COMPARISONS and len(arguments) >= 2:
        return [_assertion(ast.Compare(arguments[0], [_COMPARISONS[name]], [arguments[1]]))]
    if name in ("assertIsNone", "assertIsNotNone") and arguments:
        operation = ast.Is() if name == "assertIsNone" else ast.IsNot()
        return [_assertion(ast.Compare(arguments[0], [operation], [ast.Constant(None)]))]
    if name in ("assertIsInstance", "assertNotIsInstance") and len(arguments) >= 2:
        is_one = ast.Call(_name("isinstance"), arguments[:2], [])
        positive = name == "assertIsInstance"
        return [_assertion(is_one if positive else ast.UnaryOp(ast.Not(), is_one))]
    if name == "assertTrue" and arguments:
        return [_assertion(arguments[0])]
    if name == "assertFalse" and arguments:
        return [_assertion(ast.UnaryOp(ast.Not(), arguments[0]))]
    return _almost_equal(call) if name == "assertAlmostEqual" and len(arguments) >= 2 else []


def _almost_equal(call: ast.Call) -> list[Assertion]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    places = given.get("places", call.args[2] if len(call.args) > 2 else ast.Constant(7))
    delta = given.get("delta")
    first, second = call.args[:2]
    tolerance = literal(places if delta is None else delta)
    if tolerance is None or not isinstance(tolerance[0], int | float):
        return []
    gap = 10.0 ** -int(tolerance[0]) if delta is None else float(tolerance[0])
    text = (
        "_v == _e or abs(_v - _e) <= " + repr(gap)
        if delta is not None
        else (f"_v == _e or round(abs(_v - _e), {int(tolerance[0])}) == 0")
    )
    relation = _expression(text)
    readings = [Reading(*sides, relation, gap) for sides in ((first, second), (second, first))]
    names = {"_v": first, "_e": second}
    return [Assertion(_Replace(names).visit(_expression(text)), tuple(readings))]


def _assertion(test: ast.expr) -> Assertion:
    readings: list[Reading] = []
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        if isinstance(test.ops[0], ast.Eq | ast.Is):
            readings = _equal(test)
        elif isinstance(test.ops[0], ast.Lt | ast.LtE):
            readings = _near(test)
    elif isinstance(test, ast.Call) and last_name(test.func) == "isclose" and len(test.args) == 2:
        gap = _tolerance(test, "rel_tol", "abs_tol", (1e-9, 0.0))
        for sides in (test.args, test.args[::-1]):
            relation = ast.Call(test.func, [_name("_v"), _name("_e")], test.keywords)
            readings.append(Reading(sides[0], sides[1], relation, gap))
    return Assertion(test, tuple(readings))


def _equal(test: ast.Compare) -> list[Reading]:
    """``value == expected``, the other way round, and with ``approx``."""
    readings = []
    left, right = test.left, test.comparators[0]
    for value, expected, turned in ((left, right, False), (right, left, True)):
        operand: ast.expr = _name("_e")
        gap = 0.0
        if isinstance(expected, ast.Call) and last_name(expected.func) == "approx":
            if not expected.args:
                continue
            gap = _tolerance(expected, "rel", "abs", (1e-6, 1e-12))
            operand = ast.Call(expected.func, [operand, *expected.args[1:]], expected.keywords)
            expected = expected.args[0]
        if isinstance(test.ops[0], ast.Is) and literal(expected) not in (
            (None,),
            (True,),
            (False,),
        ):
            continue
        sides = (operand, _name("_v")) if turned else (_name("_v"), operand)
        relation = ast.Compare(sides[0], test.ops, [sides[1]])
        readings.append(Reading(value, expected, relation, gap))
    return readings


def _near(test: ast.Compare) -> list[Reading]:
    """``abs(value - expected) < tolerance``."""
    call, limit = test.left, literal(test.comparators[0])
    if not isinstance(call, ast.Call) or last_name(call.func) != "abs" or len(call.args) != 1:
        return []
    inner = call.args[0]
    if limit is None or not isinstance(limit[0], int | float):
        return []
    if not isinstance(inner, ast.BinOp) or not isinstance(inner.op, ast.Sub):
        return []
    difference = ast.BinOp(_name("_v"), ast.Sub(), _name("_e"))
    relation = ast.Compare(ast.Call(call.func, [difference], []), test.ops, test.comparators)
    sides = ((inner.left, inner.right), (inner.right, inner.left))
    return [Reading(value, expected, relation, float(limit[0])) for value, expected in sides]


def _tolerance(
    call: ast.Call, relative: str, absolute: str, defaults: tuple[float, float]
) -> float:
    """The larger one; infinite where it is not written out."""
    if len(call.args) > 2:
        return float("inf")
    given = {keyword.arg: literal(keyword.value) for keyword in call.keywords}
    given.setdefault(relative, (defaults[0],))
    given.setdefault(absolute, (defaults[1],))
    values = [given[relative], given[absolute]]
    numbers = [v[0] for v in values if v is not None and isinstance(v[0], int | float)]
    return float(max(numbers)) if len(numbers) == 2 else float("inf")


def literal(node: ast.AST) -> tuple[Any] | None:
    """The value of a node that is written out, in a tuple: it may be None itself."""
    try:
        return (ast.literal_eval(node),)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def last_name(node: ast.expr) -> str:
    """``approx`` of ``pytest.approx``."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _name(name: str) -> ast.expr:
    return ast.Name(name, ast.Load())


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


class _Replace(ast.NodeTransformer):
    def __init__(self, names: dict[str, ast.expr]) -> None:
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._names.get(node.id, node)
