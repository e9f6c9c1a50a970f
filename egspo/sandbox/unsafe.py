"""No sandbox: ordinary processes with limits, for machines that have nothing better."""

from __future__ import annotations

import os
import sys
import tempfile

from egspo.sandbox.files import pytest_packages
from egspo.sandbox.processes import Command, Servers, run_tests
from egspo.sandbox.verdict import Limits, Verdict, check_runner


class Unsafe:
    """Runs programs as the user that trains, who can lose everything by it.

    Verdicts are reached as in the sandbox, and no ordinary program gets around that, but a program
    can read and delete files, use the network, and kill its user's processes, these included.

    Args:
        limits: of each run; not the number of processes, which is that of all its user's.
        runner: ``separate`` or ``pytest``.
    """

    name = "unsafe"

    def __init__(self, limits: Limits | None = None, *, runner: str = "separate") -> None:
        self.runner = check_runner(runner)
        self._limits = limits or Limits()
        self._servers = Servers()

    @property
    def identity(self) -> str:
        return f"{self.name} {self.runner} {sys.version} {self._limits}"

    def check(self) -> None:
        """Raises: SandboxUnavailable: pytest is to run the tests, and is not there."""
        self._command()

    def run(self, code: str, tests: str) -> Verdict:
        limits = {**self._limits.for_launcher(), "processes": None}
        with tempfile.TemporaryDirectory(prefix="egspo-", ignore_cleanup_errors=True) as folder:
            job = {"uids": [None, None], "folder": folder, "limits": limits}
            return run_tests(self._servers, self._command(), job, code, tests, self._limits)

    def close(self) -> None:
        """End the processes that wait for runs."""
        self._servers.close()

    def _command(self) -> Command:
        settings = {
            "runner": self.runner,
            "packages": pytest_packages()[1] if self.runner == "pytest" else (),
            "seccomp": None,
            "namespaces": None,
        }
        return Command([os.path.realpath(sys.executable)], settings)
