"""A sandbox for programs that a model wrote, and verdicts that they cannot forge.

There are two runners. With ``separate`` a run has two sides in two sandboxes that share nothing but
a socket: one holds the program, the other the tests, plain functions of asserts. ``from solution
import f`` in the tests gives an object that stands for the program's ``f``: calling it sends the
arguments, as plain data, and what ``f`` returned comes back as plain data, from which the tests'
side builds lists, numbers and strings of its own. Objects that are not plain data stay where they
are and are referred to; their methods and attributes work.

With ``pytest`` real pytest runs the tests in the program's process. Nothing can be hidden there, so
they are set as an exam, multiple choice, and the key stays outside: :mod:`egspo.sandbox.exam`.

**Guaranteed** (``bubblewrap``), whatever the program does:

* It sees no network, no file of this machine but those that the interpreter needs, no other
  process, no environment, and can write nowhere but to a small /tmp of its own.
* CPU time, memory, file size, number of processes, of files and of open files are limited by the
  kernel, and the run ends at its deadline with every process in it. It leaves nothing behind.
* The verdict is made where the program cannot reach it; its exit code and its output mean nothing,
  and ending early fails the test.
* ``separate``: the expected results, the tests' source, the checker's memory, frames and files are
  never in the program's process, and each test has a fresh one. An object of the program is never
  equal to a plain value, and no comparison or arithmetic with one, nor ``in``, is left to it.
* ``pytest``: which of the candidates for a value is the expected one, and whether a condition
  should hold, is never in the program's process. Reports that no honest run makes score 0.

**Not guaranteed**:

* Tests that ask an object of the program whether it is right (``assert result.is_valid()``) get its
  answer. Tests that pass without an answer being right (``assert f(x) or True``) pass.
* ``pytest``: guesses, which are right once in sixteen times for most values, and expected results
  that the tests compute themselves.
* The program sees the arguments of each call, so tests that pass the expected result to it give
  it away, and it may recognise a test set that it has learned by heart.
* Bugs in the kernel are not protected against beyond a list of denied system calls. Sandboxes
  share the machine: a program may make others slower, up to their time limits.
* ``http`` and ``unsafe`` guarantee less: :class:`HttpSandbox`, :class:`Unsafe`.
"""

from __future__ import annotations

import difflib
from typing import Any

from egspo.sandbox.bubblewrap import Bubblewrap
from egspo.sandbox.http import HttpSandbox
from egspo.sandbox.pool import SandboxPool
from egspo.sandbox.unsafe import Unsafe
from egspo.sandbox.verdict import (
    Backend,
    CaseResult,
    Limits,
    SandboxError,
    SandboxUnavailable,
    Verdict,
)

__all__ = [
    "Backend",
    "Bubblewrap",
    "CaseResult",
    "HttpSandbox",
    "Limits",
    "SandboxError",
    "SandboxPool",
    "SandboxUnavailable",
    "Unsafe",
    "Verdict",
    "make_backend",
]

BACKENDS = ("bubblewrap", "http", "unsafe")


def make_backend(
    name: str = "bubblewrap",
    *,
    runner: str = "separate",
    url: str | None = None,
    limits: dict[str, Any] | None = None,
) -> Backend:
    """The backend called ``name``; nothing is started yet.

    Args:
        name: ``bubblewrap``, ``http`` or ``unsafe``.
        runner: ``separate`` or ``pytest``.
        url: endpoint, for ``http`` alone.
        limits: fields of :class:`Limits` that differ from the defaults.

    Raises:
        ValueError: an unknown name, runner or limit, or ``url`` where there should be none or is
            none.
    """
    if name not in BACKENDS:
        close = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"sandbox must be one of {list(BACKENDS)}, got {name!r}{hint}")
    if (url is not None) != (name == "http"):
        raise ValueError(f"sandbox: {name} with url: {url!r}; url goes with sandbox: http, always")
    valid = list(Limits.__dataclass_fields__)
    for field in limits or {}:
        if field not in valid:
            raise ValueError(f"limits has no {field!r}; it has {valid}")
    wanted = Limits(**(limits or {}))
    if url is not None:
        return HttpSandbox(url, wanted, runner=runner)
    return (Bubblewrap if name == "bubblewrap" else Unsafe)(wanted, runner=runner)
