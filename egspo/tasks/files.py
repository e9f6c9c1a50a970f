"""Tasks from a user's Python file."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path

from egspo.tasks.base import nearest, registered_tasks, unregister_task

_LOADED: dict[Path, tuple[bytes, list[str]]] = {}
"""Content, and names of the tasks it registered, by file."""


class TaskFileError(ValueError):
    """A task file could not be run."""


def load_task_file(path: str | os.PathLike[str]) -> list[str]:
    """Run the file, which registers tasks; returns their names.

    What was run already, in this file or a copy, is not run again; a file that has changed
    replaces its tasks.

    Args:
        path: of a Python file, relative to the working directory.

    Raises:
        FileNotFoundError: there is no such file.
        TaskFileError: naming file, line and exception, if it raises one; or if it registers no
            task. Its cause is the exception.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"there is no task file {path} ({file}){_near(file)}")
    content = file.read_bytes()
    for known_content, names in _LOADED.values():
        if known_content == content:
            return names
    for name in _LOADED.pop(file, (b"", []))[1]:
        unregister_task(name)
    known = set(registered_tasks())
    try:
        _run(file)
    except BaseException as error:
        for name in set(registered_tasks()) - known:
            unregister_task(name)
        if not isinstance(error, Exception | SystemExit):
            raise
        raise TaskFileError(f"{path}{_where(error, file)}") from error
    names = sorted(set(registered_tasks()) - known)
    if not names:
        raise TaskFileError(f"{path} registers no task: decorate a builder with @register_task")
    _LOADED[file] = (content, names)
    return names


def _run(file: Path) -> None:
    # Not under the file's own name, which may be that of a package.
    name = f"egspo_task_{hashlib.sha256(os.fsencode(file)).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError("expected a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for dataclasses and pickle, which look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _where(error: BaseException, file: Path) -> str:
    """``, line 7: KeyError: 'x'``: the innermost line that is the file's own."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f", line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    place = f", line {lines[-1]}" if lines else ""
    return f"{place}: {type(error).__name__}: {error}"


def _near(file: Path) -> str:
    if not file.parent.is_dir():
        return f": no folder {file.parent}"
    return nearest(file.name, [path.name for path in file.parent.glob("*.py")])
