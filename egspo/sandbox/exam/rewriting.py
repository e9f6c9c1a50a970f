"""Assertions of a test file become checks, see :mod:`egspo.sandbox.exam`.

Left as they are: assertions whose failure the test expects or may catch, or that pytest expects of
a test marked so. What a check has no candidates for is one condition, true or false.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from egspo.sandbox.exam.assertions import Assertion, Reading, assertions, last_name, literal
from egspo.sandbox.exam.columns import Column, expected_columns, rows, tables
from egspo.sandbox.exam.decoys import builtin_exception, candidates, exceptions
from egspo.sandbox.exam.survey import Function, Survey, Written

CHECKS = "_checks"
"""The name of :class:`egspo.sandbox.inside.session.Checks` in a rewritten file."""
_RAISES = ("raises", "assertRaises", "assertRaisesRegex")
_CATCHES = {"AssertionError", "Exception", "BaseException"}
_MAX_GAP = 0.05  # of what is expected: a larger tolerance leaves no room for other candidates


@dataclass(frozen=True)
class Check:
    """One rewritten assertion."""

    text: str
    """As it stood in the test file."""
    holds: bool = True
    """What its condition should be, where it is no choice."""
    choices: frozenset[int] = frozenset()
    """Those that it may be about."""
    every: bool = False
    """Whether each of them comes in one run of the test, as in a loop over them."""


class Rewriter(ast.NodeTransformer):
    """Rewrites a module in place; ``checks`` and ``answers`` are the key to what it reports."""

    def __init__(self, survey: Survey, rng: random.Random) -> None:
        self.checks: list[Check] = []
        self.answers: list[tuple[int, int]] = []
        """Of each choice the place of the expected value, and the number of candidates."""
        self._survey, self._rng = survey, rng
        self._test: Written | None = None
        self._columns: dict[str, Column] = {}
        self._tables: dict[str, list[ast.expr]] = {}
        self._straight = False  # whether every run of the test comes to this statement
        self._caught = False

    def rewrite(self, tree: ast.Module) -> None:
        """All of a module."""
        tree.body = self._statements(tree.body)

    # --- What is around an assertion

    def _function(self, node: Function) -> ast.AST:
        test = self._survey.functions.get(node)
        if test is not None and test.may_fail:
            return node
        outer = self._test, self._columns, self._tables, self._straight, self._caught
        self._test = test or self._test
        self._straight = test is not None and not _leaves_early(node)
        self._caught = False
        self._tables = tables(node)
        self._columns = expected_columns(node)
        for name in list(self._columns):
            self._fill(name)
        node.body = self._statements(node.body)
        self._test, self._columns, self._tables, self._straight, self._caught = outer
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.body = self._statements(node.body, straight=False)
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node

    def _statements(self, body: Sequence[ast.stmt], *, straight: bool = True) -> list[ast.stmt]:
        outer = self._straight
        self._straight = outer and straight
        found: list[ast.stmt] = []
        for statement in body:
            new = self.visit(statement)
            found += new if isinstance(new, list) else [new]
        self._straight = outer
        return found

    def _branches(self, node: Any) -> ast.AST:
        for name in ("body", "orelse"):
            setattr(node, name, self._statements(getattr(node, name), straight=False))
        return node  # type: ignore[no-any-return]

    visit_If = visit_While = visit_AsyncFor = _branches

    def visit_For(self, node: ast.For) -> ast.AST:
        leaves = any(isinstance(each, ast.Break | ast.Continue) for each in ast.walk(node))
        whole = bool(rows(node, self._tables)) and not leaves
        node.body = self._statements(node.body, straight=whole)
        node.orelse = self._statements(node.orelse, straight=False)
        return node

    def visit_Try(self, node: ast.Try) -> ast.AST:
        outer = self._caught
        caught = {name for handler in node.handlers for name in _names(handler.type)}
        self._caught = outer or bool(caught & _CATCHES)
        node.body = self._statements(node.body, straight=not node.handlers)
        self._caught = outer
        for handler in node.handlers:
            handler.body = self._statements(handler.body, straight=False)
        node.orelse = self._statements(node.orelse, straight=False)
        node.finalbody = self._statements(node.finalbody)
        return node

    def _with(self, node: ast.With | ast.AsyncWith) -> ast.AST:
        outer, raising = self._caught, False
        for item in node.items:
            call = item.context_expr
            if isinstance(call, ast.Call) and last_name(call.func) in _RAISES and call.args:
                raising = True
                self._caught = self._caught or bool(set(_names(call.args[0])) & _CATCHES)
                item.context_expr = self._raises(call, used=item.optional_vars is not None)
        node.body = self._statements(node.body, straight=not raising)
        self._caught = outer
        return node

    visit_With = visit_AsyncWith = _with

    # --- Assertions

    def visit_Assert(self, node: ast.Assert) -> Any:
        return node if self._caught else [self._check(a, node) for a in assertions(node)]

    def visit_Expr(self, node: ast.Expr) -> Any:
        found = [] if self._caught else assertions(node)
        return [self._check(assertion, node) for assertion in found] or node

    def _check(self, assertion: Assertion, origin: ast.stmt) -> ast.stmt:
        for reading in assertion.readings:
            found = None if self._is_written(reading.value) else self._candidates(reading)
            if found is not None:
                return self._choose(reading, *found, origin)
        test, holds = assertion.test, True
        while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test, holds = test.operand, not holds
        if self._rng.random() < 0.5:  # as half of all are written: it says nothing of the original
            test, holds = ast.UnaryOp(ast.Not(), test), not holds
        number = self._number(Check(_text(origin), holds=holds))
        return ast.copy_location(ast.Expr(_call("true", ast.Constant(number), test)), origin)

    def _choose(
        self, reading: Reading, expected: ast.expr, column: Column, origin: ast.stmt
    ) -> ast.stmt:
        choices = frozenset(column.choices)
        number = self._number(Check(_text(origin), choices=choices, every=column.looped))
        arguments = ast.arguments([], [ast.arg("_v"), ast.arg("_e")], None, [], [], None, [])
        relation = ast.Lambda(arguments, reading.relation)
        call = _call("each", ast.Constant(number), reading.value, expected, relation)
        return ast.copy_location(ast.Expr(call), origin)

    def _number(self, check: Check) -> int:
        self.checks.append(check)
        number = len(self.checks) - 1
        if self._test is not None and self._straight:
            self._test.required.append(number)
        return number

    # --- What is expected

    def _is_written(self, node: ast.expr) -> bool:
        """Whether this is no result of the program's."""
        named = isinstance(node, ast.Name) and node.id in self._columns
        return named or literal(node) is not None

    def _candidates(self, reading: Reading) -> tuple[ast.expr, Column] | None:
        node = reading.expected
        if isinstance(node, ast.Name) and node.id in self._columns:
            return node, self._columns[node.id]
        found = self._choice(node, reading.gap)
        return None if found is None else (found[0], Column([], choices=[found[1]]))

    def _choice(self, node: ast.expr, gap: float) -> tuple[ast.expr, int] | None:
        value = literal(node)
        if value is None or gap > _MAX_GAP * _size(value[0]):
            return None
        found = candidates(value[0], self._rng, gap=gap)
        if found is None:
            return None
        return self._listed([ast.parse(repr(v), mode="eval").body for v in found[0]], found[1])

    def _listed(self, values: list[ast.expr], place: int) -> tuple[ast.expr, int]:
        self.answers.append((place, len(values)))
        number = len(self.answers) - 1
        return _call("choice", ast.Constant(number), ast.List(values, ast.Load())), number

    def _fill(self, name: str) -> None:
        """Put candidates where the values of a column are written, or leave all of them."""
        column = self._columns[name]
        known = len(self.answers)
        found = [self._choice(nodes[place], column.gap) for nodes, place in column.places]
        if None in found:
            del self._columns[name], self.answers[known:]
            return
        for (nodes, place), choice in zip(column.places, found, strict=True):
            assert choice is not None
            nodes[place] = choice[0]
            column.choices.append(choice[1])

    def _raises(self, call: ast.Call, *, used: bool) -> ast.expr:
        """``pytest.raises`` and ``assertRaises`` of a standard exception."""
        method = last_name(call.func)
        first, *rest = call.args
        match = [keyword for keyword in call.keywords if keyword.arg == "match"]
        others = len(call.keywords) - len(match)
        if method == "assertRaisesRegex" and len(rest) == 1:
            match = [ast.keyword("match", rest.pop())]
        kind = builtin_exception(first.id) if isinstance(first, ast.Name) else None
        if kind is None or rest or others or (used and method != "raises"):
            return call
        names, place = exceptions(kind, self._rng)
        choice, number = self._listed([ast.Name(name, ast.Load()) for name in names], place)
        check = self._number(Check(ast.unparse(call), choices=frozenset([number])))
        function = ast.Attribute(ast.Name(CHECKS, ast.Load()), "raises", ast.Load())
        return ast.Call(function, [ast.Constant(check), choice], match)


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    function = ast.Attribute(ast.Name(CHECKS, ast.Load()), name, ast.Load())
    return ast.Call(function, list(arguments), [])


def _names(node: ast.expr | None) -> list[str]:
    """Of the exceptions that a handler names; without any it has all."""
    if node is None:
        return ["BaseException"]
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]


def _leaves_early(node: Function) -> bool:
    return any(isinstance(each, ast.Return | ast.Yield | ast.YieldFrom) for each in ast.walk(node))


def _size(value: Any) -> float:
    """The smallest number in a value that is not 0, at most 1: what a tolerance is held against."""
    if isinstance(value, bool | str | bytes) or value is None:
        return 1.0
    if isinstance(value, int | float | complex):
        return max(1.0, abs(value))
    return 1.0


def _text(node: ast.stmt) -> str:
    return ast.unparse(node)
