"""What ``math-verify`` lets through: arithmetic that was not carried out, and tiny differences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sympy import (
    Add,
    Basic,
    Function,
    Interval,
    MatrixBase,
    Mul,
    Pow,
    Rational,
    Tuple,
    UnevaluatedExpr,
    preorder_traversal,
)
from sympy.core.function import AppliedUndef
from sympy.sets.sets import FiniteSet

_RELATIVE = 1e-9


def first_expression(parsed: list[Any]) -> Any:
    """The expression that was read, None where there is only text."""
    return next((value for value in parsed if isinstance(value, Basic | MatrixBase)), None)


def is_unevaluated(expression: Any) -> bool:
    r"""Whether it holds an operation on rational numbers that gives a rational number.

    A fraction, a power of ten, a sign and a percentage are ways to write a number; ``2+3``,
    ``2 \\cdot 3 \\pi``, ``7!``, ``2^{10}`` and ``\\sqrt{4}`` are work that is left.
    """
    return any(map(_is_work, _nodes(expression)))


def _nodes(expression: Any) -> Iterator[Any]:
    for part in expression if isinstance(expression, MatrixBase) else [expression]:
        yield from preorder_traversal(part)


def _is_work(node: Any) -> bool:
    if isinstance(node, Add):
        return sum(map(_is_rational, node.args)) > 1
    if isinstance(node, Mul):
        factors = [arg for arg in node.args if _is_rational(arg) and not _is_power_of_ten(arg)]
        below = [arg for arg in factors if isinstance(arg, Pow)]
        above = [arg for arg in factors if not isinstance(arg, Pow) and arg not in (1, -1)]
        return len(above) > 1 or len(below) > 1
    if isinstance(node, Pow):
        return node.exp != -1 and not _is_power_of_ten(node) and _is_rational(node)
    return isinstance(node, Function) and not isinstance(node, AppliedUndef) and _is_rational(node)


def _is_power_of_ten(node: Any) -> bool:
    return isinstance(node, Pow) and node.base == 10 and bool(node.exp.is_Integer)


def _is_rational(node: Any) -> bool:
    if node.has(UnevaluatedExpr) or node.free_symbols or not getattr(node, "is_number", False):
        return False
    value = node.doit()
    return isinstance(value, Rational) or bool(value.is_Float)


def are_close(gold: Any, answer: Any) -> bool:
    """Whether numbers that were found equal after rounding are so to nine digits of their own."""
    pairs = list(_leaves(gold)), list(_leaves(answer))
    if len(pairs[0]) != len(pairs[1]):
        return True
    return all(_is_close(a, b) for a, b in zip(*pairs, strict=True))


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Interval):
        return [value.start, value.end]
    if isinstance(value, FiniteSet):
        return sorted(value.args, key=lambda arg: (str(type(arg)), _size(arg)))
    if isinstance(value, Tuple | MatrixBase):
        return list(value)
    return [value]


def _size(value: Any) -> float:
    try:
        return float(value)
    except TypeError:
        return 0.0


def _is_close(a: Any, b: Any) -> bool:
    if a.has(UnevaluatedExpr) or b.has(UnevaluatedExpr):  # 10% is taken for 10 and for 0.1
        return True
    if not (getattr(a, "is_number", False) and getattr(b, "is_number", False)):
        return True
    a, b = a.doit(), b.doit()
    if not (a.is_finite and b.is_finite):
        return True
    return bool(abs((a - b).evalf(30)) <= _RELATIVE * max(abs(a.evalf(30)), abs(b.evalf(30))))
