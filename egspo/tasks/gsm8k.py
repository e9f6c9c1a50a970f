"""GSM8K: grade-school word problems with a number as the answer.

The rewards are those of diffu-GRPO (arXiv 2504.12216), which EGSPO trains with: correctness 2.0,
integer 0.5, strict format 0.5, soft format 0.5, XML tags up to 0.5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from egspo.tasks.answers import (
    FORMAT,
    explain_soft_format,
    explain_strict_format,
    explain_xml_count,
    extract_answer,
    in_format,
    soft_format,
    strict_format,
    xml_count,
)
from egspo.tasks.base import Example, Reward, Task, register_task
from egspo.tasks.columns import ColumnNames
from egspo.tasks.data import Row
from egspo.tasks.numbers import last_number, number
from egspo.tasks.rows import checking
from egspo.tasks.splits import load_splits, normalise

_COLUMNS = {"question": str, "answer": str}
_INTEGER = re.compile(r"-?[0-9]{1,64}")
_CALCULATION = re.compile(r"<<[^<>]*>>")


def correctness(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **_: Any
) -> list[float]:
    """1.0 where the extracted answer is the number ``answer``."""
    pairs = zip(completions, answer, strict=True)
    return [float(number(extract_answer(text)) == number(gold)) for text, gold in pairs]


def explain_correctness(completion: str, answer: str, **_: Any) -> str:
    """Why :func:`correctness` pays what it does."""
    found = extract_answer(completion)
    if found is None:
        return "no answer in closed tags or a box"
    value = number(found)
    read = f"{found!r:.80} is {'no number' if value is None else value}"
    return f"{read}, as it should" if value == number(answer) else f"{read}, not {answer}"


def solved(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **_: Any
) -> list[float]:
    """1.0 where the extracted answer, or the last number in it (``18 dollars``), is ``answer``.

    More lenient than the reward, as the published evaluation is.
    """
    pairs = zip(completions, answer, strict=True)
    return [float(last_number(extract_answer(text)) == number(gold)) for text, gold in pairs]


def integer(completions: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the extracted answer is nothing but the digits of a whole number."""
    answers = map(extract_answer, completions)
    return [float(a is not None and _INTEGER.fullmatch(a) is not None) for a in answers]


def explain_integer(completion: str, **_: Any) -> str:
    """Why :func:`integer` pays what it does."""
    found = extract_answer(completion)
    if found is None:
        return "no answer in closed tags or a box"
    return f"{found!r:.80} is {'' if integer([completion]) == [1.0] else 'not '}nothing but digits"


@register_task("gsm8k")
def build_gsm8k(
    *,
    train: str = "openai/gsm8k/main:train",
    test: str | None = "openai/gsm8k/main:test",
    train_examples: int | None = None,
    validation_examples: int = 128,
    test_examples: int | None = None,
    seed: int = 0,
    instruction: str = FORMAT,
    columns: dict[str, str] | None = None,
    skip_bad_rows: float = 0.0,
) -> Task:
    """GSM8K, or data in its format: ``question``, and ``answer`` that ends in ``#### 42``.

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

    Raises:
        OSError, ValueError: naming the source, and the column or row that is wrong.
    """
    splits = load_splits(
        train,
        test,
        _COLUMNS,
        key=lambda row: normalise(row["question"]),
        read=checking(lambda row: _example(row, instruction)),
        names=ColumnNames(columns, _COLUMNS),
        skip_bad_rows=skip_bad_rows,
        train_examples=train_examples,
        validation_examples=validation_examples,
        test_examples=test_examples,
        seed=seed,
    )
    return Task(
        name="gsm8k",
        train=[_example(row, instruction) for row in splits.train],
        validation=[_example(row, instruction) for row in splits.validation],
        test=[_example(row, instruction) for row in splits.test],
        rewards=[
            Reward("correctness", correctness, weight=2.0, explain=explain_correctness),
            Reward("integer", integer, weight=0.5, explain=explain_integer),
            Reward("strict_format", strict_format, weight=0.5, explain=explain_strict_format),
            Reward("soft_format", soft_format, weight=0.5, explain=explain_soft_format),
            Reward("xml_count", xml_count, explain=explain_xml_count),
        ],
        solved=solved,
        extract=extract_answer,
    )


def _example(row: Row, instruction: str) -> Example:
    reasoning, mark, gold = row["answer"].rpartition("####")
    gold = gold.strip()
    if not mark or number(gold) is None:
        raise ValueError(
            f"the answer to {row['question'][:60]!r} must end in '#### NUMBER', "
            f"got {row['answer'][-60:]!r}"
        )
    return Example(
        prompt=[{"role": "user", "content": f"{instruction}\n\n{row['question']}"}],
        columns={"answer": gold},
        target=in_format(_CALCULATION.sub("", reasoning).strip(), gold.replace(",", "")),
        question=row["question"],
    )
