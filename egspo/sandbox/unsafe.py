"""No sandbox: two ordinary processes with limits, for machines that have nothing better."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from egspo.sandbox.processes import Command, run_tests
from egspo.sandbox.verdict import Limits, Verdict


class Unsafe:
    """Runs programs as the user that trains, who can lose everything by it.

    Verdicts are reached as in the sandbox, and no ordinary program gets around that, but a program
    can read and delete files, use the network, and kill its user's processes, these included.
    """

    name = "unsafe"

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()

    @property
    def identity(self) -> str:
        return f"{self.name} {sys.version} {self._limits}"

    def check(self) -> None:
        """There is nothing that could be missing."""

    def run(self, code: str, tests: str) -> Verdict:
        return run_tests(self._command, code, tests, self._limits)

    @contextlib.contextmanager
    def _command(self) -> Iterator[Command]:
        yield Command([os.path.realpath(sys.executable)], hide=True)
