r"""MATH: competition problems with an answer in LaTeX, tested on the 500 of MATH-500.

The rewards are those of diffu-GRPO (arXiv 2504.12216), which EGSPO trains with: correctness 2.0,
format 0.25 to 1.0. Equality is decided by ``math-verify``, an optional extra.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from egspo.tasks.answers import FORMAT, boxed, extract_answer, in_format, tagged_answer
from egspo.tasks.base import SPLITS, Example, Reward, Task, register_task
from egspo.tasks.columns import ColumnNames
from egspo.tasks.data import Row
from egspo.tasks.equivalence import equivalent, require_math_verify, unreadable, verdicts
from egspo.tasks.rows import checking
from egspo.tasks.splits import load_splits, normalise

INSTRUCTION = (
    f"{FORMAT}\n\nSolve the following mathematical problem step by step. Put the final answer, and "
    "nothing else, in \\boxed{} between the answer tags."
)
_COLUMNS = {"problem": str, "solution": str}
_GOLDS_READ = 500
"""Reference answers of a split that are read at start: some milliseconds each."""

logger = logging.getLogger("egspo")


def correctness(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **_: Any
) -> list[float]:
    """1.0 where the extracted answer is mathematically equal to ``answer``."""
    pairs = [
        (gold, extracted)
        for gold, text in zip(answer, completions, strict=True)
        if (extracted := extract_answer(text))
    ]
    outcomes = iter(equivalent(pairs))
    return [float(next(outcomes)) if extract_answer(text) else 0.0 for text in completions]


def explain_correctness(completion: str, answer: str, **_: Any) -> str:
    """Why :func:`correctness` pays what it does."""
    found = extract_answer(completion)
    if found is None:
        return "no answer in closed tags or a box"
    (verdict,) = verdicts([(answer, found)])
    return f"{found!r:.80} for {answer!r:.80}: {verdict}"


def boxed_format(completions: Sequence[str], **_: Any) -> list[float]:
    r"""1.0 for ``\boxed{}`` in answer tags, 0.75 for tags, 0.5 for a box, 0.25 for neither."""
    return [0.25 + 0.5 * tags + 0.25 * box for tags, box in map(_format_of, completions)]


def _format_of(completion: str) -> tuple[bool, bool]:
    """Whether there is an answer in closed tags, and in a box; where both, in one another."""
    tagged = tagged_answer(completion)
    return tagged is not None, boxed(completion if tagged is None else tagged) is not None


def explain_boxed_format(completion: str, **_: Any) -> str:
    """Why :func:`boxed_format` pays what it does."""
    tags, box = _format_of(completion)
    return f"{'an' if tags else 'no'} answer in closed tags, {'a' if box else 'no'} box"


@register_task("math500")
def build_math500(
    *,
    train: str = "ankner/math-500:train",
    test: str | None = "ankner/math-500:test",
    train_examples: int | None = None,
    validation_examples: int = 128,
    test_examples: int | None = None,
    seed: int = 0,
    instruction: str = INSTRUCTION,
    columns: dict[str, str] | None = None,
    skip_bad_rows: float = 0.0,
) -> Task:
    r"""MATH, or data in its format: ``problem``, and ``solution`` with ``\boxed{answer}``.

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

    Raises:
        OSError, ValueError: naming the source, and the column or row that is wrong; or
            ``math-verify`` is not installed.
    """
    require_math_verify()
    splits = load_splits(
        train,
        test,
        _COLUMNS,
        key=lambda row: normalise(row["problem"]),
        read=checking(lambda row: _example(row, instruction)),
        names=ColumnNames(columns, _COLUMNS),
        skip_bad_rows=skip_bad_rows,
        train_examples=train_examples,
        validation_examples=validation_examples,
        test_examples=test_examples,
        seed=seed,
    )
    for name in SPLITS:
        _warn_of_golds(name, [str(boxed(row["solution"])) for row in getattr(splits, name)])
    return Task(
        name="math500",
        train=[_example(row, instruction) for row in splits.train],
        validation=[_example(row, instruction) for row in splits.validation],
        test=[_example(row, instruction) for row in splits.test],
        rewards=[
            Reward("correctness", correctness, weight=2.0, explain=explain_correctness),
            Reward("boxed_format", boxed_format, explain=explain_boxed_format),
        ],
        solved=correctness,
        extract=extract_answer,
    )


def _warn_of_golds(split: str, golds: Sequence[str]) -> None:
    """Name the reference answers that no other spelling can be equal to, of those looked at."""
    chosen = golds[:: max(1, len(golds) // _GOLDS_READ)][:_GOLDS_READ]
    bad = [chosen[place] for place in unreadable(chosen)]
    if bad:
        logger.warning(
            "%d of %d %s answers looked at cannot be read as mathematics, and are equal to the "
            "same text alone: %s",
            *(len(bad), len(chosen), split, ", ".join(map(repr, bad[:5]))),
        )


def _example(row: Row, instruction: str) -> Example:
    gold = boxed(row["solution"])
    if not gold:
        raise ValueError(
            f"the solution of {row['problem'][:60]!r} has no \\boxed{{}} answer: "
            f"{row['solution'][-60:]!r}"
        )
    return Example(
        prompt=[{"role": "user", "content": f"{instruction}\n\n{row['problem']}"}],
        columns={"answer": gold},
        target=in_format(row["solution"].strip(), f"\\boxed{{{gold}}}"),
        question=row["problem"],
    )
