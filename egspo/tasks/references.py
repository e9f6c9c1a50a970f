"""Whether the reference solutions of coding tasks pass their own tests."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

from egspo.tasks.base import Example
from egspo.tasks.code import ProgramTests

logger = logging.getLogger("egspo")

VERIFY = ("sample", "all", "none")
SAMPLE = 64
"""Reference solutions that are run at the start, all together; all of them if there are no more."""
_NAMED = 10


def check_verify(verify: str) -> str:
    """Raises: ValueError: there is no such choice."""
    if verify not in VERIFY:
        raise ValueError(f"verify_solutions must be one of {list(VERIFY)}, got {verify!r}")
    return verify


def verified(
    splits: Sequence[list[Example]],
    runner: ProgramTests,
    verify: str,
    seed: int,
    *,
    complete: int | None = None,
) -> tuple[list[Example], ...]:
    """The splits, without examples whose reference solution fails, as far as these were run.

    Those are counted and named in the log.

    Args:
        splits: examples with the columns ``tests`` and ``prelude``, and a ``target``.
        runner: runs the programs.
        verify: ``all``, a ``sample`` drawn by ``seed``, or ``none``.
        complete: place of a split that keeps all of its examples: a benchmark.

    Raises:
        SandboxError: a program could not be run, for a reason that is not its own.
    """
    known = [(place, number) for place, split in enumerate(splits) for number in range(len(split))]
    if verify == "none" or not known:
        return tuple(splits)
    if verify == "sample" and len(known) > SAMPLE:
        known = sorted(random.Random(seed).sample(known, SAMPLE))
    chosen = [splits[place][number] for place, number in known]
    columns = {name: [e.columns[name] for e in chosen] for name in ("tests", "prelude")}
    verdicts = runner.verdicts([str(example.target) for example in chosen], **columns)
    failed = {
        each: verdict.error or next(c.error for c in verdict.cases if not c.passed)
        for each, verdict in zip(known, verdicts, strict=True)
        if verdict.score != 1.0
    }
    if failed:
        named = [
            f"{splits[place][number].question!r:.60} ({error})"
            for (place, number), error in list(failed.items())[:_NAMED]
        ]
        more = [] if len(failed) <= _NAMED else ["..."]
        total = sum(map(len, splits))
        kept = sum(place == complete for place, _ in failed)
        rest = f", {len(failed) - kept} rows are left out"
        if len(known) < total:
            rest += ", verify_solutions: all runs those of all rows"
        logger.warning(
            "the reference solutions of %d of %d rows fail their tests%s: %s",
            *(len(failed), len(known), rest, "; ".join([*named, *more])),
        )
    return tuple(
        [
            example
            for number, example in enumerate(split)
            if place == complete or (place, number) not in failed
        ]
        for place, split in enumerate(splits)
    )
