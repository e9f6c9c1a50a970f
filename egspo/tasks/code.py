"""Rewards for programs: the share of their tests that they pass, and the format.

The program is the last closed Python block of a completion that defines what the tests call: a
model may reason with smaller ones, and show how to use its answer. A completion that is cut off
counts by its last block, open as it is, for the tests, but not for the format.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from typing import Any

from egspo.sandbox import SandboxPool, Verdict, make_backend
from egspo.tasks.base import Reward
from egspo.tasks.programs import behind, blocks, extract_program, names_under_test

logger = logging.getLogger("egspo")

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


def explain_code_format(completion: str, **_: Any) -> str:
    """Why :func:`code_format` pays what it does."""
    found = list(blocks(completion))
    if any(block.is_python and block.closed and block.text.strip() for block in found):
        return "has a closed Python block"
    return f"none of {len(found)} blocks is closed, marked as Python and not empty"


def extract_tested(completion: str, tests: str, **_: Any) -> str | None:
    """The program in a completion that these tests are for; None where there is none."""
    return extract_program(completion, names_under_test(tests))


class ProgramTests:
    """Reward functions that run the programs of completions against the column ``tests``.

    The column ``prelude`` is code that stands before the program.
    """

    def __init__(self, pool: SandboxPool) -> None:
        self._pool = pool
        self.tampered = 0
        """Programs that forged results so far, counted each time that they are asked about."""

    def tests(
        self, completions: Sequence[str], tests: Sequence[str], prelude: Sequence[str], **_: Any
    ) -> list[float]:
        """Share of the tests passed; 0.0 without a program.

        Raises:
            SandboxError: a program could not be run, for a reason that is not its own.
        """
        return [verdict.score for verdict in self.verdicts(completions, tests, prelude)]

    def solved(
        self, completions: Sequence[str], tests: Sequence[str], prelude: Sequence[str], **_: Any
    ) -> list[float]:
        """1.0 where every test passed."""
        return [float(v.score == 1.0) for v in self.verdicts(completions, tests, prelude)]

    def explain(self, completion: str, tests: str, prelude: str, **_: Any) -> str:
        """Why :meth:`tests` pays what it does."""
        if not (extract_tested(completion, tests) or "").strip():
            return "no block with a program"
        (verdict,) = self.verdicts([completion], [tests], [prelude])
        if verdict.tampered:
            return "forged the results of its tests"
        failed = [f"{case.name}: {case.error}" for case in verdict.cases if not case.passed]
        told = [verdict.error] if verdict.error else failed[:3]
        return "; ".join([f"{verdict.passed} of {verdict.total} tests pass", *told])

    def rewards(self) -> list[Reward]:
        """``tests`` with weight 1.0, ``code_format`` with 0.5."""
        # Without a time limit for the call: each program has its own.
        return [
            Reward("tests", self.tests, timeout=None, explain=self.explain),
            Reward("code_format", code_format, weight=0.5, explain=explain_code_format),
        ]

    def verdicts(
        self, completions: Sequence[str], tests: Sequence[str], prelude: Sequence[str]
    ) -> list[Verdict]:
        """What the tests say; nothing without a program.

        Raises:
            SandboxError: a program could not be run, for a reason that is not its own.
        """
        programs = []
        for completion, test, before in zip(completions, tests, prelude, strict=True):
            program = extract_tested(completion, test)
            usable = program is not None and program.strip() and len(program) <= MAX_PROGRAM
            programs.append(behind(before, program) if program and usable else None)
        jobs = [(p, t) for p, t in zip(programs, tests, strict=True) if p is not None]
        found = self._pool.run_many(jobs)
        forged = sum(verdict.tampered for verdict in found)
        if forged:
            self.tampered += forged
            logger.warning(
                "%d of %d programs tampered with their tests, and score 0; %d so far",
                *(forged, len(found), self.tampered),
            )
        verdicts = iter(found)
        return [Verdict((), 0) if program is None else next(verdicts) for program in programs]


def program_tests(
    sandbox: str,
    url: str | None,
    limits: dict[str, Any] | None,
    workers: int | None,
    runner: str,
) -> ProgramTests:
    """Reward functions that use the backend of these task options, which can run.

    Equal options share workers and cached verdicts. Forged verdicts are counted in the log.

    Raises:
        ValueError: a wrong option. SandboxUnavailable: no program can run there.
    """
    if limits is not None and not isinstance(limits, dict):
        raise ValueError(f"limits must be a mapping of names to numbers, got {limits!r}")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int)):
        raise ValueError(f"workers must be a whole number, got {workers!r}")
    chosen = json.dumps(limits or {}, sort_keys=True)
    return ProgramTests(_pool(sandbox, url, chosen, workers, runner))


@functools.cache
def _pool(
    sandbox: str, url: str | None, limits: str, workers: int | None, runner: str
) -> SandboxPool:
    backend = make_backend(sandbox, runner=runner, url=url, limits=json.loads(limits))
    pool = SandboxPool(backend, workers=workers)
    backend.check()
    return pool
