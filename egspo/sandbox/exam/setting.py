"""From a test file to an exam."""

from __future__ import annotations

import ast
import builtins
import random
from dataclasses import dataclass

from egspo.sandbox.exam.rewriting import CHECKS, Check, Rewriter
from egspo.sandbox.exam.survey import Function, Written, survey

_CANARIES = 2
_WORDS = ("again", "more", "also", "twice", "other", "next", "small", "large", "simple", "full")


@dataclass(frozen=True)
class Exam:
    """What the program's process gets, and the key to what it answers."""

    source: str
    checks: list[Check]
    answers: list[tuple[int, int]]
    """Of each choice the place of the expected value, and the number of candidates."""
    tests: dict[str, Written]
    canaries: frozenset[str]
    order: list[str]
    """The names of the module's functions and classes, as they stand."""


def set_exam(tests: str, code: str = "", rng: random.Random | None = None) -> Exam:
    """The exam for a test file.

    Args:
        tests: source of pytest or unittest tests, which import from the module ``solution``.
        code: the program; canaries call what it does not contain.
        rng: of the candidates and their order; by default nothing that could be known.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: ``tests`` is not Python.
    """
    rng = rng or random.SystemRandom()
    tree = ast.parse(tests)
    found = survey(tree)
    rewriter = Rewriter(found, rng)
    rewriter.rewrite(tree)
    _name_what_star_gives(tree)
    canaries = _add_canaries(tree, code, rng)
    place = _after_future_imports(tree)
    tree.body.insert(place, ast.parse(f"from {CHECKS} import {CHECKS}").body[0])
    source = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    order = [node.name for node in tree.body if isinstance(node, Function | ast.ClassDef)]
    return Exam(source, rewriter.checks, rewriter.answers, found.tests, canaries, order)


def _after_future_imports(tree: ast.Module) -> int:
    place = 0
    for index, node in enumerate(tree.body):
        docstring = (
            index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        )
        if docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
            place = index + 1
    return place


def _name_what_star_gives(tree: ast.Module) -> None:
    """``from solution import *`` gives what the tests use and have not themselves."""
    nodes = list(ast.walk(tree))
    bound = {node.name for node in nodes if isinstance(node, Function | ast.ClassDef)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    for node in nodes:
        if isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound |= {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    free = dict.fromkeys(node.id for node in names if node.id not in bound)
    wanted = [name for name in free if name != CHECKS and not hasattr(builtins, name)]
    for index, node in enumerate(tree.body):
        if isinstance(node, ast.ImportFrom) and _gives_all(node):
            text = f"import solution as _s\n{CHECKS}.star(globals(), {wanted!r})"
            tree.body[index : index + 1] = ast.parse(text).body


def _gives_all(node: ast.ImportFrom) -> bool:
    return node.module == "solution" and [alias.name for alias in node.names] == ["*"]


def _add_canaries(tree: ast.Module, code: str, rng: random.Random) -> frozenset[str]:
    """Tests that must fail, for they call what does not exist, at random places."""
    known = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "solution"
        for alias in node.names
        if alias.name.isidentifier()
    ] or ["solve"]
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in imported
        and all(isinstance(argument, ast.Constant) for argument in node.args)
    ]
    names = {node.name for node in tree.body if isinstance(node, Function)}
    first = next(
        (i for i, node in enumerate(tree.body) if getattr(node, "name", "").lower()[:4] == "test"),
        len(tree.body),
    )
    added: set[str] = set()
    while len(added) < _CANARIES:
        stem = rng.choice(sorted(n for n in names if n.startswith("test")) or ["test_result"])
        name = f"{stem}_{rng.choice(_WORDS)}"
        if name in names:
            continue
        missing = f"{rng.choice(imported)}_{rng.choice(_WORDS)}"
        while missing in code or missing in known:
            missing += "s"
        call = ast.unparse(rng.choice(calls)).partition("(")[2] if calls else ")"
        body = f"def {name}():\n    {CHECKS}.true({len(names)}, {missing}({call})\n"
        place = rng.randint(first, len(tree.body))
        tree.body[place:place] = ast.parse(body).body
        names.add(name)
        added.add(name)
    return frozenset(added)
