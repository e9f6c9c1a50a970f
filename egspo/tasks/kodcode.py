"""KodCode: coding problems with test files, made by language models; for training.

``KodCode/KodCode-Light-RL-10K`` has one split. Its tests are pytest functions that import from the
module ``solution``.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from egspo.tasks.base import Example, Task, register_task
from egspo.tasks.code import (
    INSTRUCTION,
    extract_tested,
    program_tests,
)
from egspo.tasks.code_tests import unsupported
from egspo.tasks.columns import ColumnNames
from egspo.tasks.data import Row
from egspo.tasks.programs import fenced
from egspo.tasks.references import check_verify, verified
from egspo.tasks.rows import checking
from egspo.tasks.splits import load_splits, normalise

logger = logging.getLogger("egspo")

_COLUMNS = {"question": str, "solution": str, "test": str, "test_info": Any}


@register_task("kodcode")
def build_kodcode(
    *,
    train: str = "KodCode/KodCode-Light-RL-10K:train",
    test: str | None = None,
    train_examples: int | None = None,
    validation_examples: int = 128,
    test_examples: int | None = 256,
    seed: int = 0,
    instruction: str = INSTRUCTION,
    columns: dict[str, str] | None = None,
    skip_bad_rows: float = 0.0,
    verify_solutions: str = "sample",
    runner: str = "pytest",
    sandbox: str = "bubblewrap",
    url: str | None = None,
    limits: dict[str, Any] | None = None,
    workers: int | None = None,
) -> Task:
    """KodCode, or data in its format: ``question``, ``solution``, ``test``, ``test_info``.

    Rows that cannot work in the sandbox (they import numpy) are left out, and counted in the log.

    Args:
        train, test: sources, see :mod:`egspo.tasks.data`; without ``test``, ``test_examples`` are
            held out of ``train``.
        train_examples, test_examples: at most so many; None for all.
        validation_examples: taken out of ``train``; training evaluates on them.
        seed: of the splits, independent of the training seed.
        instruction: stands before every question.
        columns: what columns are called in the files, by their names here.
        skip_bad_rows: share of the rows of a source that may be wrong: they are left out, counted
            and named. With 0, one stops the run.
        verify_solutions: run reference solutions first, of a ``sample`` of the rows, ``all`` or
            ``none``, and leave out rows where they fail.
        runner: ``pytest`` runs the tests in the program's process, as an exam; ``separate`` plain
            test functions alone, in another.
        sandbox: where programs run: ``bubblewrap``, ``http`` or ``unsafe``.
        url: endpoint, with ``sandbox: http``.
        limits: fields of :class:`egspo.sandbox.Limits`.
        workers: programs at a time; None for half the cores.

    Raises:
        OSError, ValueError: naming the source, and the column or row that is wrong.
        SandboxUnavailable: programs cannot run; the message says why.
    """
    check_verify(verify_solutions)
    programs = program_tests(sandbox, url, limits, workers, runner)
    left_out: Counter[str] = Counter()

    def keep(row: Row) -> bool:
        reason = unsupported(row["test"], row["solution"], runner=runner)
        if reason is not None:
            left_out[reason.split(":")[0]] += 1
        return reason is None

    splits = load_splits(
        train,
        test,
        _COLUMNS,
        key=lambda row: normalise(row["question"]),
        keep=keep,
        read=checking(_declarations),
        names=ColumnNames(columns, _COLUMNS),
        skip_bad_rows=skip_bad_rows,
        train_examples=train_examples,
        validation_examples=validation_examples,
        test_examples=test_examples,
        seed=seed,
    )
    if left_out:
        shown = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common(5))
        logger.warning("%d rows are left out: %s", left_out.total(), shown)
    sets = [
        [_example(row, instruction) for row in rows]
        for rows in (splits.train, splits.validation, splits.test)
    ]
    train_set, validation_set, test_set = verified(sets, programs, verify_solutions, seed)
    return Task(
        name="kodcode",
        train=train_set,
        validation=validation_set,
        test=test_set,
        rewards=programs.rewards(),
        solved=programs.solved,
        extract=extract_tested,
    )


def _example(row: Row, instruction: str) -> Example:
    question = row["question"].strip()
    declared = _declarations(row)
    if declared:
        question += "\n\nThe tests use:\n" + "\n".join(declared)
    return Example(
        prompt=[{"role": "user", "content": f"{instruction}\n\n{question}"}],
        columns={"tests": row["test"], "prelude": ""},
        target=fenced(row["solution"]),
        question=row["question"],
    )


def _declarations(row: Row) -> list[str]:
    """What the question does not say, and the tests need: how the functions are called."""
    infos = row["test_info"] or []
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        raise ValueError(
            f"test_info of {row['question'][:60]!r} must be a list of mappings, got {infos!r:.100}"
        )
    declared = [str(info.get("function_declaration") or "").strip() for info in infos]
    return [declaration for declaration in declared if declaration]
