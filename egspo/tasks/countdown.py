"""Countdown: reach a target with the numbers given, each used exactly once, by ``+ - * /``.

Expressions are parsed, never evaluated by Python, and computed in exact rational numbers.
"""

from __future__ import annotations

import ast
import random
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

MAX_LENGTH = 256
"""Characters of an expression; bounds the depth of what the parser is given."""

_CHARACTERS = set("0123456789+-*/() ")
_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


@dataclass(frozen=True)
class Problem:
    """Numbers, a target that they reach, and how."""

    nums: tuple[int, ...]
    target: int
    solution: str

    @property
    def key(self) -> str:
        """The same for the same numbers, in any order, and target."""
        return question_key(self.nums, self.target)


def question_key(nums: Sequence[int], target: int) -> str:
    return f"{sorted(nums)}={target}"


def uses_numbers(expression: str, nums: Sequence[int]) -> bool:
    """Whether it is an expression in which every number of ``nums`` occurs exactly once."""
    tree = _parse(expression)
    return tree is not None and Counter(_leaves(tree)) == Counter(nums)


def is_expression(text: str) -> bool:
    """Whether it is an expression of ``+ - * / ( )`` and integers."""
    return _parse(text) is not None


def evaluate(expression: str) -> Fraction | None:
    """Its value; None if it is no expression of ``+ - * / ( )`` and integers, or divides by 0."""
    tree = _parse(expression)
    try:
        return None if tree is None else _value(tree)
    except ZeroDivisionError:
        return None


def _parse(expression: str) -> ast.expr | None:
    """The tree of an expression of nothing but what is allowed, or None."""
    expression = expression.strip()
    if len(expression) > MAX_LENGTH or set(expression) - _CHARACTERS:
        return None
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two: nested too deep
        return None
    return tree if all(map(_is_allowed, ast.walk(tree))) else None


def _is_allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) is int
    if isinstance(node, ast.BinOp):
        return type(node.op) in _OPERATORS
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.UAdd | ast.USub)
    return isinstance(node, ast.operator | ast.unaryop)


def _leaves(tree: ast.expr) -> list[int]:
    return [int(n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant)]  # type: ignore[arg-type]


def _value(tree: ast.expr) -> Fraction:
    if isinstance(tree, ast.BinOp):
        return _apply(_OPERATORS[type(tree.op)], _value(tree.left), _value(tree.right))
    if isinstance(tree, ast.UnaryOp):
        value = _value(tree.operand)
        return -value if isinstance(tree.op, ast.USub) else value
    assert isinstance(tree, ast.Constant) and isinstance(tree.value, int)
    return Fraction(tree.value)


def _apply(operator: str, left: Fraction, right: Fraction) -> Fraction:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left / right


# --- solving and making problems


@dataclass(frozen=True)
class _Term:
    """A value, how to write it, and the precedence of its last operator (3 for a number)."""

    value: Fraction
    text: str
    precedence: int = 3


def _combine(operator: str, left: _Term, right: _Term) -> _Term | None:
    """``left operator right`` with no more parentheses than it needs; None divides by zero."""
    if operator == "/" and right.value == 0:
        return None
    here = _PRECEDENCE[operator]
    # a-(b-c), a/(b*c): on the right, equal precedence needs them too, but for a+(b-c), a*(b*c).
    bare_right = right.precedence > here or (right.precedence == here and operator in "+*")
    texts = (
        left.text if left.precedence >= here else f"({left.text})",
        right.text if bare_right else f"({right.text})",
    )
    value = _apply(operator, left.value, right.value)
    return _Term(value, f"{texts[0]}{operator}{texts[1]}", here)


def solve(nums: Sequence[int], target: int) -> str | None:
    """An expression of all ``nums``, each once, with the value ``target``; None if there is none.

    Tries everything: up to a millisecond for three numbers, some hundred for four.
    """
    seen: set[tuple[Fraction, ...]] = set()

    def search(terms: list[_Term]) -> str | None:
        if len(terms) == 1:
            return terms[0].text if terms[0].value == target else None
        state = tuple(sorted(term.value for term in terms))
        if state in seen:
            return None
        seen.add(state)
        for i, j in combinations(range(len(terms)), 2):
            rest = [term for k, term in enumerate(terms) if k not in (i, j)]
            a, b = terms[i], terms[j]
            for operator, left, right in (
                *(("+", a, b), ("*", a, b), ("-", a, b), ("-", b, a)),
                *(("/", a, b), ("/", b, a)),
            ):
                term = _combine(operator, left, right)
                found = None if term is None else search([*rest, term])
                if found is not None:
                    return found
        return None

    return search([_Term(Fraction(number), str(number)) for number in nums])


def make_problem(count: int, largest: int, targets: tuple[int, int], rng: random.Random) -> Problem:
    """A problem that is solvable, because its target is the value of a random expression.

    Args:
        count: numbers, >= 2.
        largest: the numbers lie in [1, largest].
        targets: least and greatest target.
        rng: of the choice.

    Raises:
        ValueError: no expression with such a target was found in 10,000.
    """
    for _ in range(10_000):
        nums = [rng.randint(1, largest) for _ in range(count)]
        term = random_expression(nums, rng)
        if term is None or term.value.denominator != 1:
            continue
        if targets[0] <= term.value <= targets[1]:
            return Problem(tuple(nums), int(term.value), term.text)
    raise ValueError(
        f"found no problem of {count} numbers up to {largest} with a target in {list(targets)}"
    )


def random_expression(nums: Sequence[int], rng: random.Random) -> _Term | None:
    """All ``nums``, each once, in a random expression; None if that divides by zero."""
    terms = [_Term(Fraction(number), str(number)) for number in nums]
    while len(terms) > 1:
        left, right = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
        term = _combine(rng.choice("+-*/"), left, right)
        if term is None:
            return None
        terms.append(term)
    return terms[0]


def careless_expression(nums: Sequence[int], rng: random.Random) -> str:
    """All ``nums``, each once, in their order, by operators chosen without a look at the target."""
    text = str(nums[0])
    for number in nums[1:]:
        text += f"{rng.choice('+-*')}{number}"
    return text


def make_problems(
    count: int,
    largest: int,
    targets: tuple[int, int],
    *,
    examples: int,
    taken: Container[str],
    distinct: bool,
    seed: int,
    name: str,
) -> list[Problem]:
    """``examples`` problems, the i-th a function of (seed, name, i) and what is taken.

    Args:
        count, largest, targets: as for :func:`make_problem`.
        examples: how many to make.
        taken: keys of problems not to make.
        distinct: whether no two may have the same key.
        seed, name: of the random choices.

    Raises:
        ValueError: there are not enough such problems (no new one in 1000 attempts).
    """
    problems: list[Problem] = []
    used: set[str] = set()
    for index in range(examples):
        rng = random.Random(f"{seed}-{name}-{index}")
        for _ in range(1000):
            problem = make_problem(count, largest, targets, rng)
            if problem.key not in taken and not (distinct and problem.key in used):
                break
        else:
            raise ValueError(
                f"found only {index} of {examples} {name} problems of {count} numbers up to "
                f"{largest}: allow larger numbers, or make fewer"
            )
        used.add(problem.key)
        problems.append(problem)
    return problems
