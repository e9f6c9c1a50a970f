"""Rewards for programs: the share of their tests that they pass, and the format.

The program is the last closed Python block of a completion that defines what the tests call: a
model may reason with smaller ones, and show how to use its answer. A completion that is cut off
counts by its last block, open as it is, for the tests, but not for the format.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from egspo.sandbox import SandboxPool, Verdict, make_backend
from egspo.tasks.base import Reward
from egspo.tasks.programs import behind, blocks, extract_program, names_under_test

INSTRUCTION = (
    "Write a Python program that solves the following problem. Think it through, then give the "
    "complete program in one block:\n```python\n...\n```"
)
MAX_PROGRAM = 2**20
"""Characters; a longer program passes no test."""


def code_format(completions: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the completion has a closed block that is marked as Python and is not empty."""
    return [
        float(any(b.is_python and b.closed and b.text.strip() for b in blocks(text)))
        for text in completions
    ]


def extract_tested(completion: str, tests: str, **_: Any) -> str | None:
    """The program in a completion that these tests are for; None where there is none."""
    return extract_program(completion, names_under_test(tests))


class ProgramTests:
    """Reward functions that run the programs of completions against the column ``tests``.

    The column ``prelude`` is code that stands before the program.
    """

    def __init__(self, pool: SandboxPool) -> None:
        self._pool = pool

    def tests(
        self, completions: Sequence[str], tests: Sequence[str], prelude: Sequence[str], **_: Any
    ) -> list[float]:
        """Share of the tests passed; 0.0 without a program.

        Raises:
            SandboxError: a program could not be run, for a reason that is not its own.
        """
        return [verdict.score for verdict in self._verdicts(completions, tests, prelude)]

    def solved(
        self, completions: Sequence[str], tests: Sequence[str], prelude: Sequence[str], **_: Any
    ) -> list[float]:
        """1.0 where every test passed."""
        return [float(v.score == 1.0) for v in self._verdicts(completions, tests, prelude)]

    def rewards(self) -> list[Reward]:
        """``tests`` with weight 1.0, ``code_format`` with 0.5."""
        # Without a time limit for the call: each program has its own.
        return [
            Reward("tests", self.tests, timeout=None),
            Reward("code_format", code_format, weight=0.5),
        ]

    def _verdicts(
        self, completions: Sequence[str], tests: Sequence[str], prelude: Sequence[str]
    ) -> list[Verdict]:
        programs = []
        for completion, test, before in zip(completions, tests, prelude, strict=True):
            program = extract_tested(completion, test)
            usable = program is not None and program.strip() and len(program) <= MAX_PROGRAM
            programs.append(behind(before, program) if program and usable else None)
        jobs = [(p, t) for p, t in zip(programs, tests, strict=True) if p is not None]
        verdicts = iter(self._pool.run_many(jobs))
        return [Verdict((), 0) if program is None else next(verdicts) for program in programs]


def program_tests(
    sandbox: str, url: str | None, limits: dict[str, Any] | None, workers: int | None
) -> ProgramTests:
    """Reward functions that use the backend of these task options, which can run.

    Equal options share workers and cached verdicts.

    Raises:
        ValueError: a wrong option. SandboxUnavailable: no program can run there.
    """
    if limits is not None and not isinstance(limits, dict):
        raise ValueError(f"limits must be a mapping of names to numbers, got {limits!r}")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int)):
        raise ValueError(f"workers must be a whole number, got {workers!r}")
    return ProgramTests(_pool(sandbox, url, json.dumps(limits or {}, sort_keys=True), workers))


@functools.cache
def _pool(sandbox: str, url: str | None, limits: str, workers: int | None) -> SandboxPool:
    backend = make_backend(sandbox, url=url, limits=json.loads(limits))
    pool = SandboxPool(backend, workers=workers)
    backend.check()
    return pool
