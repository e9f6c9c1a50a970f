"""The arithmetic task: chains of sums worked out line by line, paid line by line."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from egspo.tasks.answers import FORMAT, answer_in_tags
from egspo.tasks.arithmetic import LARGEST, Chain, make_chains, right_lines
from egspo.tasks.base import Example, Reward, Task, register_task

Style = Literal["digits", "form", "instruct"]
_INSTRUCTION = (
    f"{FORMAT}\n\nWork out {{chain}} from left to right, one operation a line, each line in the "
    "form {line} and going on from the result before. Put these lines alone between the answer "
    "tags."
)
_LINES = {1: "3+5=8", 2: "23+18=41"}


@register_task("arithmetic")
def build_arithmetic(
    *,
    train_examples: int = 10_000,
    validation_examples: int = 128,
    test_examples: int = 256,
    changes: int = 7,
    largest: int = LARGEST,
    seed: int = 0,
    prompt_style: Style = "instruct",
    careless: float = 0.0,
) -> Task:
    """Sums of numbers of one or two digits with a scratchpad; no two splits share a problem.

    The reward ``lines`` is the share of right lines; solved is who has all of them.

    Args:
        train_examples, validation_examples, test_examples: distinct problems to make.
        changes: additions and subtractions of a problem; the answer has nine characters for each,
            six where numbers have one digit.
        largest: of the running results. Up to 9, numbers have one digit, above it two.
        seed: of the problems, independent of the training seed.
        prompt_style: ``digits``: ``23+18-07`` in, ``23+18=41;41-07=34`` out, for models of single
            characters; ``form``: the same with ``23+18=__;__-07=__`` in, where all that is copied
            stands as far from its copy; ``instruct``: an instruction in English, the lines in tags.
        careless: share of the targets of training examples, for supervised training alone, whose
            solver carries nothing; with one digit, that is one off where it counts.

    Raises:
        ValueError: naming the option that is wrong.
    """
    _check(changes, largest, careless, prompt_style)
    counts = {"test": test_examples, "validation": validation_examples, "train": train_examples}
    taken: set[str] = set()
    parts: dict[str, Any] = {}
    for name, count in counts.items():
        least = int(name != "validation")
        if type(count) is not int or count < least:
            raise ValueError(f"{name}_examples must be a whole number >= {least}, got {count!r}")
        chains = make_chains(changes, count, largest=largest, taken=taken, seed=seed, name=name)
        taken |= {chain.key for chain in chains}
        rng = random.Random(f"{seed}-careless")
        share = careless if name == "train" else 0.0
        parts[name] = [_example(chain, prompt_style, rng.random() < share) for chain in chains]
    tagged = prompt_style == "instruct"
    extract = answer_in_tags if tagged else _whole
    return Task(
        name="arithmetic",
        **parts,
        rewards=[Reward("lines", _share_right(extract), explain=_explained(extract))],
        solved=_solved(extract),
        extract=extract,
        characters=None if tagged else "0123456789+-=;" + "_" * (prompt_style == "form"),
    )


def _whole(completion: str) -> str | None:
    return completion.strip() or None


def _scores(
    extract: Callable[[str], str | None],
    completions: Sequence[str],
    start: Sequence[int],
    changes: Sequence[Sequence[int]],
) -> list[tuple[int, int]]:
    samples = zip(completions, start, changes, strict=True)
    return [right_lines(extract(text) or "", Chain(s, tuple(c))) for text, s, c in samples]


def _share_right(extract: Callable[[str], str | None]) -> Callable[..., list[float]]:
    def lines(
        completions: Sequence[str], start: Sequence[int], changes: Sequence[Any], **_: Any
    ) -> list[float]:
        return [right / of for right, of in _scores(extract, completions, start, changes)]

    return lines


def _solved(extract: Callable[[str], str | None]) -> Callable[..., list[float]]:
    def solved(
        completions: Sequence[str], start: Sequence[int], changes: Sequence[Any], **_: Any
    ) -> list[float]:
        return [float(a == b) for a, b in _scores(extract, completions, start, changes)]

    return solved


def _explained(extract: Callable[[str], str | None]) -> Callable[..., str]:
    def explain(completion: str, start: int, changes: Sequence[int], **_: Any) -> str:
        ((right, of),) = _scores(extract, [completion], [start], [changes])
        return f"{right} of {of} lines are right"

    return explain


def _example(chain: Chain, style: Style, careless: bool) -> Example:
    answer = chain.careless_solution() if careless else chain.solution()
    lines = answer.replace(";", "\n")
    prompts = {
        "digits": chain.key,
        "form": chain.form,
        "instruct": _INSTRUCTION.format(chain=chain.key, line=_LINES[chain.digits]),
    }
    return Example(
        prompt=[{"role": "user", "content": prompts[style]}],
        columns={"start": chain.start, "changes": list(chain.changes)},
        target=f"<answer>\n{lines}\n</answer>" if style == "instruct" else answer,
        question=chain.key,
    )


def _check(changes: int, largest: int, careless: float, prompt_style: str) -> None:
    if prompt_style not in (styles := get_args(Style)):
        raise ValueError(f"prompt_style must be one of {styles}, got {prompt_style!r}")
    if type(changes) is not int or not 1 <= changes <= 100:
        raise ValueError(f"changes must be a whole number in [1, 100], got {changes!r}")
    if type(largest) is not int or not 1 <= largest <= LARGEST:
        raise ValueError(f"largest must be a whole number in [1, {LARGEST}], got {largest!r}")
    if not 0.0 <= careless <= 1.0:
        raise ValueError(f"careless must lie in [0, 1], got {careless!r}")
