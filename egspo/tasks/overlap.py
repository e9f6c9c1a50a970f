"""How much of one set of questions is in another, as written and normalised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from egspo.tasks.base import SPLITS, Example, Task
from egspo.tasks.data import load_rows
from egspo.tasks.splits import normalise

_QUESTION_COLUMNS = ("question", "problem", "prompt", "instruction", "text", "Puzzle")


@dataclass(frozen=True)
class Overlap:
    """Of the sets ``a`` and ``b``; counts are of rows, those of both sets that are in the other."""

    size: tuple[int, int]
    distinct: tuple[int, int]
    """After :func:`egspo.tasks.splits.normalise`."""
    exact: tuple[int, int]
    normalised: tuple[int, int]
    """At least ``exact``."""
    examples: list[tuple[str, str]] = field(default_factory=list)
    """A question of ``a`` and the same of ``b``, in the order of ``a``; each once."""


def overlap(a: Sequence[str], b: Sequence[str], *, examples: int = 5) -> Overlap:
    """Compare two lists of questions; at most ``examples`` pairs are kept."""
    keys = [normalise(text) for text in a], [normalise(text) for text in b]
    counts = Counter(keys[0]), Counter(keys[1])
    common = counts[0].keys() & counts[1].keys()
    first_of_b: dict[str, str] = {}
    for key, text in zip(keys[1], b, strict=True):
        first_of_b.setdefault(key, text)
    pairs: dict[str, tuple[str, str]] = {}
    for key, text in zip(keys[0], a, strict=True):
        if key in common and len(pairs) < examples:
            pairs.setdefault(key, (text, first_of_b[key]))
    exact = set(a) & set(b)
    return Overlap(
        size=(len(a), len(b)),
        distinct=(len(counts[0]), len(counts[1])),
        exact=(sum(text in exact for text in a), sum(text in exact for text in b)),
        normalised=(sum(counts[0][key] for key in common), sum(counts[1][key] for key in common)),
        examples=list(pairs.values()),
    )


def questions(source: str, column: str | None = None) -> list[str]:
    """The questions of a data set, in ``column`` or in the first of those usual for them.

    Raises:
        OSError, ValueError: as :func:`egspo.tasks.data.load_rows`; or no such column is there.
    """
    if column is not None:
        return [str(row[column]) for row in load_rows(source, {column: str})]
    rows = load_rows(source)
    for name in _QUESTION_COLUMNS:
        if name in rows[0]:
            return [str(row[name]) for row in rows]
    raise ValueError(
        f"{source} has the columns {list(rows[0])}, none of them {', '.join(_QUESTION_COLUMNS)}: "
        "say which holds the question (--column)"
    )


def split_of(task: Task, name: str) -> Sequence[Example]:
    """A split by name; raises ValueError if there is none, or nothing in it."""
    if name not in SPLITS:
        raise ValueError(f"a task has the splits {', '.join(SPLITS)}, not {name!r}")
    examples: Sequence[Example] = getattr(task, name)
    if not examples:
        raise ValueError(f"task {task.name} has no {name} examples")
    return examples


def task_questions(task: Task, split: str) -> list[str]:
    """What the examples of a split ask.

    Raises:
        ValueError: an example does not say so (``question``).
    """
    found = []
    for example in split_of(task, split):
        if example.question is None:
            raise ValueError(
                f"the examples of task {task.name} do not say what their question is: give them "
                "Example(..., question=...)"
            )
        found.append(example.question)
    return found
