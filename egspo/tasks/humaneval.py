"""HumanEval: functions to write from their signature and description; for evaluation."""

from __future__ import annotations

from typing import Any

from egspo.tasks.base import Example, Task, register_task
from egspo.tasks.code import (
    INSTRUCTION,
    extract_tested,
    program_tests,
)
from egspo.tasks.code_tests import import_free_names
from egspo.tasks.columns import ColumnNames
from egspo.tasks.data import Row
from egspo.tasks.mbpp import COLUMNS, mbpp_example
from egspo.tasks.programs import behind, fenced
from egspo.tasks.references import check_verify, verified
from egspo.tasks.rows import check_share, checking, read_rows
from egspo.tasks.splits import normalise, split_off

_COLUMNS = {"prompt": str, "canonical_solution": str, "test": str, "entry_point": str}


@register_task("humaneval")
def build_humaneval(
    *,
    train: str = "google-research-datasets/mbpp/full:train",
    test: str = "openai/openai_humaneval:test",
    validation_examples: int = 90,
    test_examples: int | None = None,
    seed: int = 0,
    instruction: str = INSTRUCTION,
    columns: dict[str, str] | None = None,
    skip_bad_rows: float = 0.0,
    verify_solutions: str = "sample",
    runner: str = "separate",
    sandbox: str = "bubblewrap",
    url: str | None = None,
    limits: dict[str, Any] | None = None,
    workers: int | None = None,
) -> Task:
    """HumanEval, or data in its format: ``prompt``, ``canonical_solution``, ``test``,
    ``entry_point``.

    The program runs behind the code of the prompt, so that its imports and helper functions need
    not be repeated. Each problem is one test. There is nothing to train on in HumanEval: training
    and validation examples are MBPP's.

    Args:
        train: source in the format of MBPP.
        test: source in the format of HumanEval, see :mod:`egspo.tasks.data`.
        validation_examples: taken out of ``train``; training evaluates on them.
        test_examples: at most so many, drawn by ``seed``; None for all.
        seed: of the splits, independent of the training seed.
        instruction: stands before every problem.
        columns: what columns are called in the files, by their names here.
        skip_bad_rows: share of the rows of a source that may be wrong: they are left out, counted
            and named. With 0, one stops the run.
        verify_solutions: run reference solutions first, of a ``sample`` of the rows, ``all`` or
            ``none``, and leave out rows where they fail, but not those of the test set.
        runner: ``separate`` keeps what is expected out of the program's process; ``pytest`` runs
            the tests in it, as an exam.
        sandbox, url, limits, workers: as for ``kodcode``.

    Raises:
        OSError, ValueError: naming the source, and the column or row that is wrong.
        SandboxUnavailable: programs cannot run; the message says why.
    """
    check_verify(verify_solutions)
    programs = program_tests(sandbox, url, limits, workers, runner)
    names = ColumnNames(columns, {**COLUMNS, **_COLUMNS})
    share = check_share(skip_bad_rows)
    rows = read_rows(
        test,
        _COLUMNS,
        names=names,
        read=checking(lambda row: _example(row, instruction)),
        skip_bad_rows=share,
    )
    if test_examples is not None and test_examples < len(rows):
        _, rows = split_off(rows, test_examples, key=_key, seed=seed)
    others = read_rows(
        train,
        COLUMNS,
        names=names,
        read=checking(lambda row: mbpp_example(row, instruction)),
        skip_bad_rows=share,
    )
    names.check_used()
    train_rows, validation_rows = split_off(
        others, validation_examples, key=lambda row: normalise(row["text"]), seed=seed
    )
    sets = [
        [mbpp_example(row, instruction) for row in train_rows],
        [mbpp_example(row, instruction) for row in validation_rows],
        [_example(row, instruction) for row in rows],
    ]
    train_set, validation_set, test_set = verified(
        sets, programs, verify_solutions, seed, complete=2
    )
    return Task(
        name="humaneval",
        train=train_set,
        validation=validation_set,
        test=test_set,
        rewards=programs.rewards(),
        solved=programs.solved,
        extract=extract_tested,
    )


def _key(row: Row) -> str:
    return normalise(row["prompt"])


def _example(row: Row, instruction: str) -> Example:
    name = row["entry_point"]
    if not name.isidentifier():
        raise ValueError(f"entry_point of {row['prompt'][:60]!r} is no name: {name!r}")
    # Helpers that the prompt gives, the tests take from there: a program could define others.
    given = f"{row['prompt']}    pass\n"
    try:
        reference = row["prompt"] + row["canonical_solution"]
        imports = import_free_names(row["test"], defined=given, reference=reference)
    except SyntaxError as error:
        raise ValueError(f"prompt or test of {name} is no Python: {error}") from error
    preamble = f"{given}\nfrom solution import {name}\n{imports}"
    tests = f"{behind(preamble, row['test'])}\n\n\ndef test_{name}():\n    check({name})\n"
    return Example(
        prompt=[
            {
                "role": "user",
                "content": f"{instruction}\n\nComplete the function {name}:\n"
                f"{fenced(row['prompt'])}",
            }
        ],
        columns={"tests": tests, "prelude": row["prompt"]},
        target=fenced(reference),
        question=row["prompt"],
    )
