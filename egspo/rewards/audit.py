"""What a task makes of given completions: the answer, each reward and why, whether it is solved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from egspo.rewards.scoring import score_completions
from egspo.tasks.base import SPLITS, Example, Reward, Task


@dataclass(frozen=True)
class Completion:
    """A text, and the example that it answers."""

    text: str
    split: str
    row: int
    example: Example


@dataclass(frozen=True)
class Audited:
    """What a completion earns."""

    split: str
    row: int
    extracted: str | None
    rewards: dict[str, float | None]
    """By name, unweighted; None where one does not apply."""
    total: float | None
    """Weighted; None where none applies."""
    why: dict[str, str]
    """By name, for the rewards that can say it."""
    solved: bool | None
    """None where the task does not say what that is."""


def audit(task: Task, completions: Sequence[Completion]) -> list[Audited]:
    """Score N completions as training does, in order.

    Raises:
        RewardError: naming the function that failed.
    """
    prompts = [completion.example.prompt for completion in completions]
    texts = [completion.text for completion in completions]
    names = completions[0].example.columns if completions else {}
    columns = {name: [c.example.columns[name] for c in completions] for name in names}
    scored = score_completions(task.rewards, prompts, texts, columns)
    solved: list[bool | None] = [None] * len(texts)
    if task.solved is not None:
        metric = score_completions([Reward("solved", task.solved)], prompts, texts, columns)
        solved = [value == 1.0 for value in metric.total.tolist()]
    values = {name: numbers.tolist() for name, numbers in scored.per_function.items()}
    totals = scored.total.tolist()
    return [
        Audited(
            split=completion.split,
            row=completion.row,
            extracted=task.answer_in(completion.text, completion.example.columns),
            rewards={name: _known(numbers[i]) for name, numbers in values.items()},
            total=_known(totals[i]),
            why={
                reward.name: reward.explain(completion.text, **completion.example.columns)
                for reward in task.rewards
                if reward.explain is not None
            },
            solved=solved[i],
        )
        for i, completion in enumerate(completions)
    ]


def _known(value: float) -> float | None:
    return None if value != value else value


def read_completions(task: Task, text: str, name: str) -> list[Completion]:
    """Completions in JSONL: ``{"row": 3, "completion": "..."}``, of the split ``train``.

    ``"split": "test"`` names another; ``"prompt"``, a text or chat messages, may stand instead of
    the row where it is unique. Other keys do not matter.

    Args:
        task: whose examples are meant.
        text: of the file.
        name: of the file, for errors.

    Raises:
        ValueError: naming the line, and what is wrong with it.
    """
    found = []
    by_prompt = _ByPrompt(task)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append(_completion(task, by_prompt, line))
            except ValueError as error:
                raise ValueError(f"{name}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{name} has no completions")
    return found


def _completion(task: Task, by_prompt: _ByPrompt, line: str) -> Completion:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("completion"), str):
        raise ValueError(
            f"expected an object with the text completion, and row or prompt, got {line[:80]}"
        )
    split, row, prompt = (record.get(key) for key in ("split", "row", "prompt"))
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if row is None and prompt is None:
        raise ValueError("lacks row, the number of a row, or prompt, its text")
    places = by_prompt.find(prompt, split) if prompt is not None else []
    if row is None:
        if len(places) != 1:
            count = f"{len(places)} rows have" if places else "no row has"
            where = f"in the split {split}" if split else "in any split"
            raise ValueError(f"{count} the prompt {_short(prompt)} {where}")
        split, row = places[0]
    else:
        split = split or "train"
        size = len(getattr(task, split))
        if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < size:
            raise ValueError(f"row must be a number in [0, {size - 1}] of {split}, got {row!r}")
        if prompt is not None and (split, row) not in places:
            raise ValueError(f"row {row} of {split} has another prompt than {_short(prompt)}")
    return Completion(record["completion"], split, row, getattr(task, split)[row])


def _short(prompt: object) -> str:
    text = repr(prompt)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _ByPrompt:
    """Places of examples by what they ask: the text of the message, or the question in it."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._places: dict[str, list[tuple[str, int]]] | None = None

    def find(self, prompt: object, split: str | None) -> list[tuple[str, int]]:
        if self._places is None:
            self._places = {}
            for name in SPLITS:
                for row, example in enumerate(getattr(self._task, name)):
                    for text in _texts(example):
                        self._places.setdefault(text, []).append((name, row))
        text = prompt.strip() if isinstance(prompt, str) else _spelled(prompt)
        return [place for place in self._places.get(text, ()) if split in (None, place[0])]


def _texts(example: Example) -> set[str]:
    last = example.prompt[-1]["content"].strip()
    return {
        _spelled(example.prompt),
        last,
        *([example.question.strip()] if example.question else []),
    }


def _spelled(messages: Sequence[Mapping[str, Any]] | object) -> str:
    return json.dumps(messages, sort_keys=True, default=str)
