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
from egspo.tasks.columns import ColumnNames
from egspo.tasks.data import Row
from egspo.tasks.published import Protocol, under_protocol
from egspo.tasks.rows import checking
from egspo.tasks.splits import load_splits, normalise

_COLUMNS = {"question": str, "answer": str}
_INTEGER = re.compile(r"-?[0-9]{1,64}")
_CURRENCY = r"(?:\\?\$|[€£¥₹])"
# A sign, a currency, digits: $-5, -$5, - 5; commas between thousands, `{,}` and thin spaces too.
_NUMBER = re.compile(
    rf"(?P<opened>\$)?\s*(?P<sign>[-+]?)\s*(?:{_CURRENCY}\s*)?(?P<inner>[-+]?)"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{0,64})(?:\.(?P<part>[0-9]{0,64}))?"
    r"\s*(?:\\?%|[€£¥₹])?\s*\$?\s*\.?"
)
_ANY_NUMBER = re.compile(
    rf"(?:(?<![\w).])[-+])?(?:{_CURRENCY}-?)?[0-9](?:[0-9,]*[0-9])?(?:\.[0-9]+)?"
)
_CALCULATION = re.compile(r"<<[^<>]*>>")
_MINUS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"))
_GAP_IN_NUMBER = re.compile(
    r"(?<=[0-9])(?:\{,\}|\\[,!;: ]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))"
)


def number(text: str | None) -> Fraction | None:
    """The number that ``text`` is, or None where it is something else as well.

    A currency sign, a percent sign, a full stop at the end, and what separates thousands (commas,
    ``{,}``, thin spaces) do not count; every minus sign is one: ``$1,250.00`` is 1250 and ``-$5``
    is -5.
    """
    if text is None or len(text) > 100:
        return None
    return _value(_plain(text))


def _plain(text: str) -> str:
    """With ASCII minus signs, and commas for what else separates thousands."""
    return _GAP_IN_NUMBER.sub(",", text.translate(_MINUS)).strip()


def _value(plain: str) -> Fraction | None:
    found = _NUMBER.fullmatch(plain)
    if found is None or (found["sign"] and found["inner"]):
        return None
    whole, part = found["whole"].replace(",", ""), found["part"] or ""
    if not whole and not part:
        return None
    value = Fraction(f"{whole or 0}.{part or 0}")
    return -value if "-" in (found["sign"], found["inner"]) else value


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
    found = _ANY_NUMBER.findall(_plain(text))
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
    columns: dict[str, str] | None = None,
    skip_bad_rows: float = 0.0,
    protocol: Protocol = "strict",
) -> Task:
    """GSM8K, or data in its format: ``question``, and ``answer`` that ends in ``#### 42``.

    Args:
        train, test: sources, see :mod:`egspo.tasks.data`; without ``test``, ``test_examples`` are
            held out of ``train``.
        train_examples, test_examples: at most so many; None for all.
        validation_examples: taken out of ``train``; training evaluates on them.
        seed: of the splits, independent of the training seed.
        instruction: stands before every question.
        protocol: ``published`` has the prompts and rewards of the paper's code, see
            ``docs/protocol.md``.
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
    task = Task(
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
    own = None if instruction == FORMAT else instruction
    return under_protocol(task, protocol, instruction=own)


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
