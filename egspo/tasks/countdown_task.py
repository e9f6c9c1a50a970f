"""The Countdown task: prompts in two styles, the rewards 0, 0.1 and 1, and the solve rate."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal

from egspo.tasks.answers import FORMAT, answer_in_tags
from egspo.tasks.base import SPLITS, Example, Reward, Task, register_task
from egspo.tasks.columns import ColumnNames
from egspo.tasks.countdown import (
    Problem,
    careless_expression,
    evaluate,
    is_expression,
    make_problems,
    question_key,
    uses_numbers,
)
from egspo.tasks.data import Row
from egspo.tasks.rows import check_share, read_rows
from egspo.tasks.spelling import sides
from egspo.tasks.splits import load_splits, sample

_COLUMNS = {"nums": list[int] | str, "target": int | str}
_USUAL = {"nums": "input", "target": "output"}  # of test files: "30,100,93" and "23"
_INTEGER = re.compile(r"\s*-?[0-9]{1,18}\s*")
_INSTRUCTION = (
    f"{FORMAT}\n\nUse the numbers {{nums}}, each exactly once, and the operations +, -, * and / to "
    "write an arithmetic expression whose value is {target}. Put the expression alone between the "
    "answer tags, without an equals sign."
)
_MAX_ANSWER = 1000
_WRONG_VALUE = 0.1


def extract_expression(completion: str) -> str | None:
    """The answer in closed tags, in ``+ - * / ( )``; of an equation both sides."""
    answer = answer_in_tags(completion)
    return None if answer is None else _plain(answer)


def whole_expression(completion: str) -> str | None:
    """All of the completion, as an answer; None if there is nothing."""
    return _plain(completion) or None


def _plain(answer: str) -> str:
    return "=".join(sides(answer)) if len(answer) <= _MAX_ANSWER else answer[:_MAX_ANSWER]


def score(expression: str | None, nums: Sequence[int], target: int) -> float:
    """1.0 for the target, 0.1 for the numbers, each once, with another value; else 0.0.

    An equation is a claim: with the numbers on one side, it counts where every side is an
    expression, and pays 1.0 where all of them have the value of the target.
    """
    return judge(expression, nums, target)[0]


def judge(expression: str | None, nums: Sequence[int], target: int) -> tuple[float, str]:
    """What :func:`score` pays, and why."""
    if expression is None:
        return 0.0, "no answer (it is in closed tags, where the prompt asks for them)"
    parts = expression.split("=")
    if not all(map(is_expression, parts)):
        return 0.0, "no expression of + - * / ( ) and whole numbers"
    if not any(uses_numbers(part, nums) for part in parts):
        return 0.0, f"does not use {list(nums)}, each exactly once"
    for part in parts:
        value = evaluate(part)
        if value != target:
            found = "divides by zero" if value is None else f"is {value}"
            return _WRONG_VALUE, f"{part.strip()} {found}, not {target}"
    return 1.0, f"is {target}"


@register_task("countdown")
def build_countdown(
    *,
    train: str | None = None,
    test: str | None = None,
    train_examples: int | None = None,
    validation_examples: int = 128,
    test_examples: int = 256,
    numbers: int = 3,
    largest: int | None = None,
    targets: list[int] | None = None,
    seed: int = 0,
    columns: dict[str, str] | None = None,
    skip_bad_rows: float = 0.0,
    prompt_style: Literal["digits", "instruct"] = "instruct",
    careless: float = 0.0,
) -> Task:
    """Countdown, made here or read; no two splits share numbers (in any order) and target.

    Args:
        train: a source with the columns ``nums`` and ``target``, see :mod:`egspo.tasks.data`, such
            as ``Jiayi-Pan/Countdown-Tasks-3to4``; without it, problems are made. Texts such as
            ``30,100,93`` will do, and so will the columns ``input`` and ``output``.
        test: a source that is a test set: training has none of its problems. Without it, test
            problems are held out of ``train``, or made.
        train_examples: how many to make (None for 10,000), or to read at most (None for all).
        validation_examples, test_examples: distinct ones to hold out.
        numbers: in a problem; others of a source are left out.
        largest: of the numbers of made problems; None for 99.
        targets: least and greatest target of made problems; None for [1, 99].
        seed: of the problems and splits, independent of the training seed.
        columns: what columns are called in the files, by their names here.
        skip_bad_rows: share of the rows of a source that may be wrong: they are left out, counted
            and named. With 0, one stops the run.
        prompt_style: ``digits``: ``3,5,7=26`` in, ``3*7+5`` out, for models of single characters;
            ``instruct``: an instruction in English, the answer in tags.
        careless: share of the targets of made training problems, for supervised training alone,
            that use the numbers without a look at the target.

    Raises:
        OSError: a source cannot be read.
        ValueError: naming the option, or the source and column, that is wrong.
    """
    _check(prompt_style, careless, numbers)
    reading: dict[str, Any] = {
        "names": ColumnNames(columns, _COLUMNS, _USUAL),
        "read": _numbers_read,
        "skip_bad_rows": check_share(skip_bad_rows),
    }
    if train is None:
        given = None if test is None else _test_rows(test, numbers, test_examples, seed, reading)
        counts = {
            "train": 10_000 if train_examples is None else train_examples,
            "validation": validation_examples,
            **({"test": test_examples} if given is None else {}),
        }
        bounds = [1, 99] if targets is None else targets
        taken = {_row_key(row) for row in given or ()}
        made = _made(counts, numbers, 99 if largest is None else largest, bounds, seed, taken)
        parts = {
            name: [_made_example(problem, prompt_style) for problem in problems]
            for name, problems in made.items()
        }
        parts["train"] = [
            _made_example(problem, prompt_style, careless, random.Random(f"{seed}-careless-{i}"))
            for i, problem in enumerate(made["train"])
        ]
        if given is not None:
            parts["test"] = [_example(row, prompt_style) for row in given]
    else:
        made_only = {"largest": largest, "targets": targets, "careless": careless or None}
        for name, value in made_only.items():
            if value is not None:
                raise ValueError(f"{name} is of made problems: it has no effect with train={train}")
        splits = load_splits(
            train,
            test,
            _COLUMNS,
            key=_row_key,
            keep=lambda row: len(row["nums"]) == numbers,
            train_examples=train_examples,
            validation_examples=validation_examples,
            test_examples=test_examples,
            seed=seed,
            **reading,
        )
        parts = {
            name: [_example(row, prompt_style) for row in getattr(splits, name)] for name in SPLITS
        }
    return _task(parts, prompt_style)


def _row_key(row: Row) -> str:
    return question_key(row["nums"], row["target"])


def _numbers_read(row: Row) -> Row:
    """The row with its numbers, which files also hold as ``30,100,93``, ``[30 100 93]``, ``23``."""
    nums, target = row["nums"], row["target"]
    if isinstance(nums, str):
        parts = nums.strip().strip("[]()").replace(",", " ").split()
        if not parts or not all(map(_INTEGER.fullmatch, parts)):
            raise ValueError(f"the column 'nums' is {nums!r}, expected whole numbers")
        nums = [int(part) for part in parts]
    if isinstance(target, str):
        if not _INTEGER.fullmatch(target):
            raise ValueError(f"the column 'target' is {target!r}, expected a whole number")
        target = int(target)
    return {"nums": nums, "target": target}


def _test_rows(
    test: str, numbers: int, test_examples: int, seed: int, reading: Mapping[str, Any]
) -> list[Row]:
    """The problems of a test set of so many numbers."""
    rows = read_rows(test, _COLUMNS, **reading)
    reading["names"].check_used()
    kept = [row for row in rows if len(row["nums"]) == numbers]
    if not kept:
        raise ValueError(f"{test}: none of its {len(rows)} rows has {numbers} numbers")
    return sample(kept, test_examples, _row_key, seed)


def _check(prompt_style: str, careless: float, numbers: int) -> None:
    if prompt_style not in ("digits", "instruct"):
        raise ValueError(f"prompt_style must be 'digits' or 'instruct', got {prompt_style!r}")
    if not 0.0 <= careless <= 1.0:
        raise ValueError(f"careless must lie in [0, 1], got {careless!r}")
    if type(numbers) is not int or not 2 <= numbers <= 6:
        raise ValueError(f"numbers must lie in [2, 6], got {numbers!r}")


def _task(parts: Mapping[str, Sequence[Example]], prompt_style: str) -> Task:
    tagged = prompt_style == "instruct"
    extract = extract_expression if tagged else whole_expression
    return Task(
        name="countdown",
        **parts,
        rewards=[Reward("expression", _reward(extract), explain=_explain(extract))],
        solved=_solved(extract),
        extract=extract,
        characters=None if tagged else "0123456789+-*/(),=",
    )


def _reward(extract: Callable[[str], str | None]) -> Callable[..., list[float]]:
    def expression(
        prompts: Sequence[Any],
        completions: Sequence[str],
        nums: Sequence[Sequence[int]],
        target: Sequence[int],
        **_: Any,
    ) -> list[float]:
        samples = zip(completions, nums, target, strict=True)
        return [score(extract(text), given, wanted) for text, given, wanted in samples]

    return expression


def _explain(extract: Callable[[str], str | None]) -> Callable[..., str]:
    def explain(completion: str, nums: Sequence[int], target: int, **_: Any) -> str:
        return judge(extract(completion), nums, target)[1]

    return explain


def _solved(extract: Callable[[str], str | None]) -> Callable[..., list[float]]:
    reward = _reward(extract)

    def solved(**columns: Any) -> list[float]:
        return [float(value == 1.0) for value in reward(**columns)]

    return solved


def _made(
    examples: Mapping[str, int],
    numbers: int,
    largest: int,
    bounds: list[int],
    seed: int,
    taken: Set[str],
) -> dict[str, list[Problem]]:
    """So many problems by split, the last split first; none is ``taken``."""
    for name, count in examples.items():
        least = int(name != "validation")
        if type(count) is not int or count < least:
            raise ValueError(f"{name}_examples must be a whole number >= {least}, got {count!r}")
    if type(largest) is not int or largest < 1:
        raise ValueError(f"largest must be a whole number >= 1, got {largest!r}")
    valid = isinstance(bounds, list) and len(bounds) == 2 and all(type(b) is int for b in bounds)
    if not valid or bounds[0] > bounds[1]:
        raise ValueError(f"targets must be [least, greatest], got {bounds!r}")
    made: dict[str, list[Problem]] = {}
    for name, count in reversed(list(examples.items())):
        made[name] = make_problems(
            numbers,
            largest,
            (bounds[0], bounds[1]),
            examples=count,
            taken=taken,
            distinct=name != "train",
            seed=seed,
            name=name,
        )
        if name != "train":
            taken = taken | {problem.key for problem in made[name]}
    return made


def _made_example(
    problem: Problem, style: str, careless: float = 0.0, rng: random.Random | None = None
) -> Example:
    """With a target that, with probability ``careless``, looks at the numbers alone."""
    answer = problem.solution
    if rng is not None and rng.random() < careless:
        answer = careless_expression(problem.nums, rng)
    target = answer if style == "digits" else f"<answer>\n{answer}\n</answer>"
    return _example({"nums": list(problem.nums), "target": problem.target}, style, target)


def _example(row: Row, style: str, target: str | None = None) -> Example:
    nums, wanted = row["nums"], row["target"]
    if style == "digits":
        content = f"{','.join(map(str, nums))}={wanted}"
    else:
        content = _INSTRUCTION.format(nums=nums, target=wanted)
    return Example(
        prompt=[{"role": "user", "content": content}],
        columns={"nums": nums, "target": wanted},
        target=target,
        question=question_key(nums, wanted),
    )
