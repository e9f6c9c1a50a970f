"""What a run may use, what comes of it, and how it can fail to be one."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Protocol


class SandboxError(RuntimeError):
    """A run could not be carried out: no verdict about the program."""


class SandboxUnavailable(SandboxError):
    """This machine cannot run the sandbox; the message says why, and what to install."""


@dataclass(frozen=True)
class Limits:
    """What one run of a program against its tests may use.

    Memory, file size and CPU time are per process; with ``processes`` of them, ``memory_mb *
    processes + tmp_mb`` bounds the memory of one side.
    """

    wall_seconds: float = 20.0
    """Of the whole run; tests without a result by then have failed."""
    test_seconds: float = 3.0
    """Of one test, and of loading the program."""
    cpu_seconds: int = 10
    memory_mb: int = 512
    tmp_mb: int = 16
    """The size of /tmp, the only place that can be written to."""
    tmp_files: int = 4096
    """Files and folders in it."""
    file_mb: int = 8
    processes: int = 16
    """Processes and threads."""
    open_files: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.name.endswith("_seconds") else (int,)
            number = isinstance(value, kinds) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise ValueError(f"limit {field.name} must be a number > 0, got {value!r}")
            if field.name == "cpu_seconds" and not isinstance(value, int):
                raise ValueError(f"limit cpu_seconds must be a whole number, got {value!r}")

    def for_launcher(self) -> dict[str, Any]:
        """As :mod:`egspo.sandbox.inside.launcher` takes them: bytes and seconds."""
        return {
            "test_seconds": self.test_seconds,
            "cpu_seconds": self.cpu_seconds,
            "memory": self.memory_mb * 2**20,
            "file_size": self.file_mb * 2**20,
            "processes": self.processes,
            "open_files": self.open_files,
        }


@dataclass(frozen=True)
class CaseResult:
    """One test."""

    name: str
    passed: bool
    error: str | None = None
    """Why it failed, in a line."""


@dataclass(frozen=True)
class Verdict:
    """What the tests said about a program."""

    cases: tuple[CaseResult, ...]
    """In order; where the run ended early, those that had a result."""
    total: int
    """How many tests there are; 0 where the program or the tests could not be loaded."""
    error: str | None = None
    """Why there is no result for every test."""
    timed_out: bool = False
    """Whether a time limit ended a test or the run: another machine might say otherwise."""
    tampered: bool = False
    """Whether the program forged results: no test has passed, whatever it reported."""

    @property
    def passed(self) -> int:
        """How many tests passed."""
        return sum(case.passed for case in self.cases)

    @property
    def score(self) -> float:
        """Share of the tests passed; 0.0 where there is none."""
        return self.passed / self.total if self.total else 0.0


RUNNERS = ("separate", "pytest")
PROBE = (
    "def f():\n    return 1\n",
    "from solution import f\n\ndef test_it():\n    assert f() == 1\n",
)
"""A program that passes, and its tests: whether a sandbox works."""


def check_runner(name: str) -> str:
    """Raises: ValueError: there is no such runner."""
    if name not in RUNNERS:
        raise ValueError(f"runner must be one of {list(RUNNERS)}, got {name!r}")
    return name


class Backend(Protocol):
    """Where programs run. Safe to use from several threads."""

    name: str
    runner: str
    """``separate``: plain test functions, in a process that the program cannot reach. ``pytest``:
    by pytest, in the process of the program, as an exam."""

    @property
    def identity(self) -> str:
        """Changes with everything that may change a verdict: part of the cache's key."""

    def check(self) -> None:
        """Raises: SandboxUnavailable: no program can run here."""

    def run(self, code: str, tests: str) -> Verdict:
        """Test ``code``, which ``tests`` import as the module ``solution``.

        Raises:
            SandboxError: no verdict could be reached, for a reason that is not the program's.
        """

    def close(self) -> None:
        """End what waits for programs. Another run starts it again."""
