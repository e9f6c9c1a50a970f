"""MBPP: short problems with three assertions each; for evaluation."""

from __future__ import annotations

from typing import Any

from egspo.tasks.base import Example, Task, register_task
from egspo.tasks.code import (
    INSTRUCTION,
    extract_tested,
    program_tests,
)
from egspo.tasks.code_tests import as_test, import_free_names
from egspo.tasks.columns import ColumnNames
from egspo.tasks.data import Row
from egspo.tasks.programs import behind, fenced
from egspo.tasks.references import check_verify, verified
from egspo.tasks.rows import checking
from egspo.tasks.splits import load_splits, normalise

COLUMNS = {"text": str, "code": str, "test_list": list[str], "test_setup_code": str}


@register_task("mbpp")
def build_mbpp(
    *,
    train: str = "google-research-datasets/mbpp/full:train",
    test: str | None = "google-research-datasets/mbpp/full:test",
    train_examples: int | None = None,
    validation_examples: int = 90,
    test_examples: int | None = None,
    seed: int = 0,
    instruction: str = INSTRUCTION,
    columns: dict[str, str] | None = None,
    skip_bad_rows: float = 0.0,
    shown_tests: int = 3,
    verify_solutions: str = "sample",
    runner: str = "separate",
    sandbox: str = "bubblewrap",
    url: str | None = None,
    limits: dict[str, Any] | None = None,
    workers: int | None = None,
) -> Task:
    """MBPP, or data in its format: ``text``, ``code``, ``test_list``, ``test_setup_code``.

    Args:
        train, test: sources, see :mod:`egspo.tasks.data`; without ``test``, ``test_examples`` are
            held out of ``train``.
        train_examples, test_examples: at most so many; None for all.
        validation_examples: taken out of ``train``; training evaluates on them.
        seed: of the splits, independent of the training seed.
        instruction: stands before every problem.
        columns: what columns are called in the files, by their names here.
        skip_bad_rows: share of the rows of a source that may be wrong: they are left out, counted
            and named. With 0, one stops the run.
        shown_tests: how many of the assertions the prompt shows, at least one, as nothing else
            names the function; the usual evaluation shows all three.
        verify_solutions: run reference solutions first, of a ``sample`` of the rows, ``all`` or
            ``none``, and leave out rows where they fail, but not those of the test set.
        runner: ``separate`` keeps what is expected out of the program's process; ``pytest`` runs
            the tests in it, as an exam.
        sandbox, url, limits, workers: as for ``kodcode``.

    Raises:
        OSError, ValueError: naming the source, and the column or row that is wrong.
        SandboxUnavailable: programs cannot run; the message says why.
    """
    if isinstance(shown_tests, bool) or not isinstance(shown_tests, int) or shown_tests < 1:
        raise ValueError(f"shown_tests must be a whole number >= 1, got {shown_tests!r}")
    check_verify(verify_solutions)
    programs = program_tests(sandbox, url, limits, workers, runner)
    splits = load_splits(
        train,
        test,
        COLUMNS,
        key=lambda row: normalise(row["text"]),
        read=checking(lambda row: mbpp_example(row, instruction, shown_tests)),
        names=ColumnNames(columns, COLUMNS),
        skip_bad_rows=skip_bad_rows,
        train_examples=train_examples,
        validation_examples=validation_examples,
        test_examples=test_examples,
        seed=seed,
    )
    sets = [
        [mbpp_example(row, instruction, shown_tests) for row in rows]
        for rows in (splits.train, splits.validation, splits.test)
    ]
    train_set, validation_set, test_set = verified(
        sets, programs, verify_solutions, seed, complete=2
    )
    return Task(
        name="mbpp",
        train=train_set,
        validation=validation_set,
        test=test_set,
        rewards=programs.rewards(),
        solved=programs.solved,
        extract=extract_tested,
    )


def mbpp_example(row: Row, instruction: str, shown_tests: int = 3) -> Example:
    """A row as a prompt; each assertion is a test."""
    shown = "\n".join(row["test_list"][:shown_tests])
    return Example(
        prompt=[
            {
                "role": "user",
                "content": f"{instruction}\n\n{row['text'].strip()}\n\n"
                f"The program must pass tests such as:\n{shown}",
            }
        ],
        columns={"tests": _tests(row), "prelude": ""},
        target=fenced(row["code"]),
        question=row["text"],
    )


def _tests(row: Row) -> str:
    if not row["test_list"]:
        raise ValueError(f"test_list of {row['text'][:60]!r} is empty")
    setup = row["test_setup_code"]
    try:
        parts = [behind(import_free_names(setup, reference=row["code"]), setup)]
        # Names that the setup defines are none of the program's.
        for number, assertion in enumerate(row["test_list"]):
            name = f"test_{number}"
            parts.append(as_test(name, assertion, defined=setup, reference=row["code"]))
    except SyntaxError as error:
        raise ValueError(f"the tests of {row['text'][:60]!r} are no Python: {error}") from error
    return "\n\n".join(part for part in parts if part.strip()) + "\n"
