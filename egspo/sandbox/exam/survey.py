"""Which tests a file has, as it is written: what its run is measured against."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Written:
    """A test function."""

    count: int | None = 1
    """How many items pytest makes of it; None where the source does not tell."""
    may_skip: bool = False
    may_fail: bool = False
    """Marked as expected to fail."""
    required: list[int] = field(default_factory=list)
    """Checks that every run of it comes to."""


@dataclass
class Survey:
    """All of a file."""

    tests: dict[str, Written] = field(default_factory=dict)
    """By name, methods as ``Class::name``."""
    functions: dict[ast.AST, Written] = field(default_factory=dict)


def survey(tree: ast.Module) -> Survey:
    """The tests that pytest finds in a module by its default rules."""
    found = Survey()
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    marks = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and "pytestmark" in map(ast.unparse, node.targets)
    ]
    fixtures = [n for n in ast.walk(tree) if isinstance(n, Function) and _is_parametrized(n)]
    for node in tree.body:
        if isinstance(node, Function) and node.name.startswith("test"):
            _add(found, node.name, node, marks)
        elif isinstance(node, ast.ClassDef) and _is_collected(node, classes):
            _add_class(found, node.name, node, classes, marks)
    if fixtures:
        for test in found.tests.values():
            test.count = None
    return found


def _add_class(
    found: Survey,
    prefix: str,
    node: ast.ClassDef,
    classes: dict[str, ast.ClassDef],
    marks: list[ast.expr],
) -> None:
    marks = [*marks, *node.decorator_list]
    for ancestor in _ancestry(node, classes):
        for member in ancestor.body:
            if isinstance(member, Function) and member.name.startswith("test"):
                name = f"{prefix}::{member.name}"
                if name not in found.tests or ancestor is node:
                    _add(found, name, member, marks)
            elif isinstance(member, ast.ClassDef) and _is_collected(member, classes):
                _add_class(found, f"{prefix}::{member.name}", member, classes, marks)


def _ancestry(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> list[ast.ClassDef]:
    """A class and those of this file that it is derived from."""
    found, waiting = [node], [node]
    while waiting:
        for base in waiting.pop().bases:
            parent = classes.get(base.id) if isinstance(base, ast.Name) else None
            if parent is not None and parent not in found:
                found.append(parent)
                waiting.append(parent)
    return found


def _is_collected(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> bool:
    bases = [ast.unparse(base) for each in _ancestry(node, classes) for base in each.bases]
    return node.name.startswith("Test") or any(base.endswith("TestCase") for base in bases)


def _add(found: Survey, name: str, node: Function, marks: list[ast.expr]) -> None:
    earlier = found.functions.get(node)
    texts = [ast.unparse(mark) for mark in (*marks, *node.decorator_list)]
    test = earlier or Written(
        count=_count([*marks, *node.decorator_list]),
        may_skip=any("skip" in text.partition("(")[0] for text in texts),
        may_fail=any("xfail" in text or "expectedFailure" in text for text in texts),
    )
    found.tests[name] = found.functions[node] = test


def _count(marks: list[ast.expr]) -> int | None:
    """The product of what ``parametrize`` lists, where they are written out."""
    count = 1
    for mark in marks:
        if "parametrize" not in ast.unparse(mark).partition("(")[0]:
            if isinstance(mark, ast.List | ast.Tuple) and "parametrize" in ast.unparse(mark):
                return None
            continue
        values = mark.args[1] if isinstance(mark, ast.Call) and len(mark.args) > 1 else None
        if not isinstance(values, ast.List | ast.Tuple):
            return None
        if any(isinstance(element, ast.Starred) for element in values.elts):
            return None
        count *= len(values.elts)
    return count


def _is_parametrized(node: Function) -> bool:
    return any(
        isinstance(mark, ast.Call)
        and "fixture" in ast.unparse(mark.func)
        and any(keyword.arg == "params" for keyword in mark.keywords)
        for mark in node.decorator_list
    )
