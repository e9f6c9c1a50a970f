"""Expected values that a test gives names to: a variable, a loop's or a parameter's.

A name counts if nothing is done with it but comparing it, as what is expected, in assertions, and
it is bound once, to values that are written out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from egspo.sandbox.exam.assertions import Reading, assertions, literal
from egspo.sandbox.exam.survey import Function


@dataclass
class Column:
    """The values that a name is bound to, each where it is written."""

    places: list[tuple[list[ast.expr], int]]
    """Lists of nodes, and the place in them."""
    looped: bool = False
    """Whether it takes each of them in one run of the function."""
    gap: float = 0.0
    choices: list[int] = field(default_factory=list)


def expected_columns(function: Function) -> dict[str, Column]:
    """By name."""
    uses = _uses(function)
    loads = [
        n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
    ]
    stores = [
        n.id
        for n in ast.walk(function)
        if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)
    ]
    functions = [n for n in ast.walk(function) if isinstance(n, Function | ast.Lambda)]
    arguments = [argument.arg for argument in function.args.args]
    found: dict[str, Column] = {}
    for name, column in _bound(function):
        once = stores.count(name) + arguments.count(name) == 1
        compared = name in uses and loads.count(name) == len(uses[name])
        written = all(literal(nodes[place]) is not None for nodes, place in column.places)
        if once and compared and written and len(functions) == 1:
            column.gap = max(uses[name])
            found[name] = column
    for left, right in _pairs(function):  # of two values that are written out neither is a result
        if left in found and right in found:
            del found[left], found[right]
    return found


def _uses(function: Function) -> dict[str, list[float]]:
    """The tolerance of each comparison with a name, by name."""
    found: dict[str, list[float]] = {}
    for reading in _readings(function):
        if isinstance(reading.expected, ast.Name) and literal(reading.value) is None:
            found.setdefault(reading.expected.id, []).append(reading.gap)
    return found


def _pairs(function: Function) -> list[tuple[str, str]]:
    return [
        (reading.value.id, reading.expected.id)
        for reading in _readings(function)
        if isinstance(reading.value, ast.Name) and isinstance(reading.expected, ast.Name)
    ]


def _readings(function: Function) -> Iterator[Reading]:
    for node in ast.walk(function):
        for assertion in assertions(node) if isinstance(node, ast.stmt) else ():
            yield from assertion.readings


def tables(function: Function) -> dict[str, list[ast.expr]]:
    """Lists that are written out, have a name, and are used once: to loop over."""
    names = [n for n in ast.walk(function) if isinstance(n, ast.Name)]
    return {
        node.targets[0].id: node.value.elts
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        and len(node.targets) == 1
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.List | ast.Tuple)
        and [n.id for n in names].count(node.targets[0].id) == 2
    }


def rows(loop: ast.For, known: dict[str, list[ast.expr]]) -> list[ast.expr]:
    """What a loop goes over, if it is written out."""
    if isinstance(loop.iter, ast.Name):
        return known.get(loop.iter.id, [])
    return loop.iter.elts if isinstance(loop.iter, ast.List | ast.Tuple) else []


def _bound(function: Function) -> Iterator[tuple[str, Column]]:
    known = tables(function)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            if isinstance(target, ast.Name):
                yield target.id, Column([(_Field(node, "value"), 0)])
        elif isinstance(node, ast.For):
            yield from _table(_target_names(node.target), rows(node, known), looped=True)
    for mark in function.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith("mark.parametrize"):
            values = mark.args[1] if len(mark.args) == 2 else None
            names = literal(mark.args[0]) if mark.args else None
            if names is not None and isinstance(values, ast.List | ast.Tuple):
                given = names[0].split(",") if isinstance(names[0], str) else list(names[0])
                names_given = [str(name).strip() for name in given]
                yield from _table(names_given, values.elts, looped=False)


def _target_names(target: ast.expr) -> list[str]:
    parts = target.elts if isinstance(target, ast.Tuple | ast.List) else []
    names = [part.id if isinstance(part, ast.Name) else "" for part in parts]
    return names if parts else [getattr(target, "id", "")]


def _table(
    names: list[str], written: list[ast.expr], *, looped: bool
) -> Iterator[tuple[str, Column]]:
    if len(names) < 2 or not written:
        return
    for index, name in enumerate(names):
        places = [
            (row.elts, index)
            for row in map(_row, written)
            if isinstance(row, ast.Tuple | ast.List) and len(row.elts) == len(names)
        ]
        if name and len(places) == len(written):
            yield name, Column(places, looped)


def _row(node: ast.expr) -> ast.expr:
    """The values of ``pytest.param(...)`` stand for a tuple."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("param"):
        return ast.Tuple(node.args, ast.Load())
    return node


class _Field(list[ast.expr]):
    """A field of a node, as a list of one."""

    def __init__(self, node: ast.Assign, name: str) -> None:
        super().__init__([node.value])
        self._node, self._name = node, name

    def __setitem__(self, index: object, value: object) -> None:
        setattr(self._node, self._name, value)
