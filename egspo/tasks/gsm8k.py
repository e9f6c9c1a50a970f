"""GSM8K: grade-school word problems with a number as the answer.

The rewards are those of diffu-GRPO (arXiv 2504.12216), which EGSPO trains with: correctness 2.0,
integer 0.5, strict format 0.5, soft format 0.5, XML tags up to 0.5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from egspo.tasks.answers import (
    FORMAT,
    extract_answer,
    in_format,
    soft_format,
    strict_format,
    xml_count,
)
from egspo.tasks.base import Example, Reward, Task, register_task
from egspo.tasks.data import Row
from egspo.tasks.splits import load_splits, normalise

_COLUMNS = {"question": str, "answer": str}
_INTEGER = re.compile(r"-?[0-9]{1,64}")
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,64}(?:\.[0-9]{0,64})?|\.[0-9]{1,64})")
_GROUPED = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_ANY_NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")
_CALCULATION = re.compile(r"<<[^<>]*>>")


def number(text: str | None) -> Fraction | None:
    """The number that ``text`` is, or None where it is something else as well.

    A currency sign, a percent sign, a full stop at the end and commas between thousands do not
    count: ``$1,250.00`` is 1250.
    """
    if text is None or len(text) > 100:
        return None
    plain = text.strip().removesuffix(".").removesuffix("%").strip()
    plain = plain.removeprefix("\\").removeprefix("$").removesuffix("$").removesuffix("\\").strip()
    if _GROUPED.fullmatch(plain):
        plain = plain.replace(",", "")
    return Fraction(plain.removesuffix(".")) if _NUMBER.fullmatch(plain) else None


def correctness(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **_: Any
) -> list[float]:
    """1.0 where the extracted answer is the number ``answer``."""
    pairs = zip(completions, answer, strict=True)
    return [float(number(extract_answer(text)) == number(gold)) for text, gold in pairs]


def solved(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **_: Any
) -> list[float]:
    """1.0 where the extracted answer, or the last number in it (``18 dollars``), is ``answer``.

    More lenient than the reward, as the published evaluation is.
    """
    pairs = zip(completions, answer, strict=True)
    return [float(_last_number(extract_answer(text)) == number(gold)) for text, gold in pairs]


def _last_number(text: str | None) -> Fraction | None:
    whole = number(text)
    if whole is not None or text is None or len(text) > 1000:
        return whole
    found = _ANY_NUMBER.findall(text)
    return number(found[-1]) if found else None


def integer(completions: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the extracted answer is nothing but the digits of a whole number."""
    answers = map(extract_answer, completions)
    return [float(a is not None and _INTEGER.fullmatch(a) is not None) for a in answers]


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
) -> Task:
    """GSM8K, or data in its format: ``question``, and ``answer`` that ends in ``#### 42``.

    Args:
        train, test: sources, see :mod:`egspo.tasks.data`; without ``test``, ``test_examples`` are
            held out of ``train``.
        train_examples, test_examples: at most so many; None for all.
        validation_examples: taken out of ``train``; training evaluates on them.
        seed: of the splits, independent of the training seed.
        instruction: stands before every question.

    Raises:
        OSError, ValueError: naming the source, and the column or row that is wrong.
    """
    splits = load_splits(
        train,
        test,
        _COLUMNS,
        key=lambda row: normalise(row["question"]),
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
            Reward("correctness", correctness, weight=2.0),
            Reward("integer", integer, weight=0.5),
            Reward("strict_format", strict_format, weight=0.5),
            Reward("soft_format", soft_format, weight=0.5),
            Reward("xml_count", xml_count),
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
