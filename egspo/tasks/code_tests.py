"""Test files for programs: made of assertions, and which of them the sandbox can run."""

from __future__ import annotations

import ast
import builtins
import sys

from egspo.tasks.programs import defined_functions


def import_free_names(source: str, *, defined: str = "", reference: str = "") -> str:
    """Imports of the names that ``source`` uses, and neither it nor ``defined`` defines.

    The functions and classes of the ``reference`` program are asked of the program, whether or not
    there are builtins or modules of these names. Other modules of the standard library are imported
    as such, and the rest is asked of the program too: one that calls something ``math`` must not
    become the ``math`` of its tests.

    Raises:
        SyntaxError: ``source`` is not Python.
    """
    tree = ast.parse(source)
    loads = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and _is_load(n)]
    bound = _bound_names(tree) | _bound_names(ast.parse(defined))
    used = dict.fromkeys(loads)  # in order, once
    programs = defined_functions(reference)
    imports = []
    for name in used:
        if name in bound:
            continue
        if name in programs or not hasattr(builtins, name):
            module = name in sys.stdlib_module_names and name not in programs
            imports.append(f"import {name}" if module else f"from solution import {name}")
    return "\n".join(imports)


def _bound_names(tree: ast.AST) -> set[str]:
    """Names that are assigned, defined, imported or parameters, anywhere in ``tree``."""
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not _is_load(node):
            bound.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return bound


def _is_load(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def as_test(name: str, body: str, *, defined: str = "", reference: str = "") -> str:
    """A test function of these statements, with the imports that they need.

    Args:
        name: of the function.
        body: its statements.
        defined: code that stands before it.
        reference: a right program, as for :func:`import_free_names`.

    Raises:
        SyntaxError: ``body`` is not Python.
    """
    tree = ast.parse(f"def {name}():\n    pass\n")
    imports = import_free_names(body, defined=defined, reference=reference)
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    function.body = ast.parse(f"{imports}\n{body}").body
    return ast.unparse(tree)


_PLUGIN_FIXTURES = {"benchmark", "mocker"}


def unsupported(tests: str, program: str = "", *, runner: str = "pytest") -> str | None:
    """Why a test file, or the reference program for it, cannot work in the sandbox; None if it may.

    There is the standard library alone, and for the runner ``pytest`` that with its plugin for
    coroutines. ``separate`` knows test functions without parameters.
    """
    try:
        nodes = list(ast.walk(ast.parse(tests)))
        others = list(ast.walk(ast.parse(program)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "is no Python"
    allowed = {*sys.stdlib_module_names, "solution"}
    allowed |= {"pytest", "pytest_asyncio"} if runner == "pytest" else set()
    for module in [name for node in (*nodes, *others) for name in _imports(node)]:
        if module.partition(".")[0] not in allowed:
            return f"imports {module}"
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = [function for function in functions if function.name.startswith("test")]
    for function in found:
        arguments = [a.arg for a in function.args.args]
        if runner == "separate" and (arguments or isinstance(function, ast.AsyncFunctionDef)):
            return "has tests that are no plain functions"
        for name in set(arguments) & _PLUGIN_FIXTURES:
            return f"uses the fixture {name}"
    return None if found else "has no test function"


def _imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module or '.'}.{alias.name}" for alias in node.names]
    return []
