"""What a task is: prompts, the columns rewards need, and reward functions."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RewardFunction = Callable[..., Any]
"""``f(prompts, completions, **columns) -> list[float | None]``, or the same as ``async def``.

``prompts`` are chat messages, ``completions`` decoded texts; each column is a list of the same
length. None means that the function does not apply to that sample.
"""


SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One prompt."""

    prompt: list[dict[str, str]]
    """Chat messages, rendered by the tokenizer's chat template."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Passed to reward functions, as lists over the batch."""
    target: str | None = None
    """Reference completion, for supervised training."""
    prefill: str = ""
    """Beginning of the answer that the model is given: it goes on from there. Reward functions get
    the answer with it."""
    question: str | None = None
    """What is asked, without instructions: what tells whether two splits overlap."""


@dataclass(frozen=True)
class Reward:
    """A reward function and its place in the total."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    intermediate: bool = True
    """Whether it also scores the one-step completions of EGSPO-SA."""
    timeout: float | None = 300.0
    """Seconds that a call may take before it counts as failed; None for any."""
    explain: Callable[..., str] | None = None
    """``f(completion, **columns of its example) -> str``: why it pays what it does, in a line."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of reward {self.name!r} must be finite: {self.weight}")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"the timeout of reward {self.name!r} must be > 0: {self.timeout}")


@dataclass(frozen=True)
class Metric:
    """How somebody else counts, for comparison with their numbers; shown by ``egspo eval``."""

    name: str
    function: RewardFunction
    """Of completions without their prefill."""
    meaning: str
    """What its mean is, and whose."""
    weight: Callable[[dict[str, Any]], float] | None = None
    """Of a sample in the mean, by its columns; None for 1."""


@dataclass(frozen=True)
class Task:
    """Training and held-out prompts, which must share no question, and how completions are scored.

    Every example has the same columns: reward functions get them as lists over a batch.
    """

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    rewards: Sequence[Reward]
    solved: RewardFunction | None = None
    """The evaluation metric: 1.0 or 0.0 for each completion. Not a reward."""
    extract: Callable[..., str | None] | None = None
    """``f(completion)``, or ``f(completion, **columns)`` of its example: the answer in it, None
    where there is none. For records of evaluations; see :meth:`answer_in`."""
    validation: Sequence[Example] = ()
    """What training evaluates on, so that no checkpoint is chosen on ``test``; where there is
    none, ``test``."""

    metrics: Sequence[Metric] = ()
    """Besides ``solved``."""
    protocol: str = "strict"
    """``published`` where prompts and rewards are those of the paper's code."""
    characters: str | None = None
    """Alphabet of the character tokenizer of a new model; None for Sudoku's."""

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            if not getattr(self, split):
                raise ValueError(f"task {self.name} has no {split} examples")
        columns = self.train[0].columns.keys()
        for split in SPLITS:
            for number, example in enumerate(getattr(self, split)):
                if example.columns.keys() != columns:
                    raise ValueError(
                        f"{split} example {number} of task {self.name} has the columns "
                        f"{sorted(example.columns)}, the first training example {sorted(columns)}"
                    )
        names = [reward.name for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"task {self.name} has two rewards of one name: {names}")

    def answer_in(self, completion: str, columns: Mapping[str, Any]) -> str | None:
        """What ``extract`` finds, given the columns of the example where it takes them."""
        if self.extract is None:
            return None
        more = list(inspect.signature(self.extract).parameters)[1:]
        return self.extract(completion, **columns) if more else self.extract(completion)


TaskBuilder = Callable[..., Task]
_BUILDERS: dict[str, TaskBuilder] = {}


def register_task(name: str) -> Callable[[TaskBuilder], TaskBuilder]:
    """Decorator: make a function of keyword options to :class:`Task` known by ``name``."""

    def register(builder: TaskBuilder) -> TaskBuilder:
        if name in _BUILDERS:
            raise ValueError(f"task {name!r} is registered already")
        _BUILDERS[name] = builder
        return builder

    return register


def registered_tasks() -> list[str]:
    """Names of all tasks known now."""
    return sorted(_BUILDERS)


def unregister_task(name: str) -> None:
    """Forget the task of that name."""
    del _BUILDERS[name]


def build_task(name: str, /, **options: Any) -> Task:
    """The task of that name.

    Raises:
        ValueError: naming the nearest task, or the valid options, where one is unknown.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown task {name!r}{nearest(name, list(_BUILDERS))}")
    builder = _BUILDERS[name]
    valid = list(inspect.signature(builder).parameters)
    for option in options:
        if option not in valid:
            raise ValueError(
                f"task {name} has no option {option!r}{nearest(option, valid)}; options: {valid}"
            )
    return builder(**options)


def nearest(name: str, known: Sequence[str]) -> str:
    """``", did you mean ...?"`` where a known name is close, otherwise what is known."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else f"; known: {sorted(known)}"
