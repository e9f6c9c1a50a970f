"""The grid in a completion, and what its cells pay."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from egspo.tasks.answers import answer_in_tags
from egspo.tasks.sudoku import CELLS, Puzzle

Extract = Callable[[str], str | None]
"""The digits that a completion gives as its answer, row by row; None where it gives none."""

CellReward = Callable[[str | None, Puzzle], tuple[float, str]]
"""What digits pay for a puzzle, in [0, 1], and why."""

_DIGITS = re.compile("[0-9]+")
_WORD_LABEL = re.compile(
    r"\b(?:(?:rows|lines) [0-9] ?(?:-|\u2013|to) ?[0-9]|(?:rows?|lines?|r)[ \t#]*[0-9])\b"
    r"[ \t]*[.:)=-]*",
    re.IGNORECASE,
)
_NUMBER_LABEL = re.compile(r"^[ \t]*[0-9][.:)](?=[ \t])", re.MULTILINE)
_LETTERS = re.compile(r"[^\W0-9_]+")


def tagged_grid(completion: str) -> str | None:
    """:func:`grid_in` what the last answer tags enclose that are closed and not empty."""
    answer = answer_in_tags(completion)
    return None if answer is None else grid_in(answer)


def grid_in(text: str) -> str | None:
    """The grid that a text gives, as digits.

    It is 16 ASCII digits in a row, or 4 rows of 4, or 16 digits apart from each other, with no
    letters between them, but for ``Row 1:``; the last such grid wins. Without one it is all digits,
    as long as there are no letters: a grid that lacks cells, or has too many, is an answer, digits
    in prose are none.
    """
    labelled = _WORD_LABEL.sub(" ", text)
    for plain in (labelled, _NUMBER_LABEL.sub(" ", labelled)):
        grids = [_grid(str(part)) for part in _LETTERS.split(plain)]
        last = next((grid for grid in reversed(grids) if grid is not None), None)
        if last is not None:
            return last
    if _LETTERS.search(labelled) is not None:
        return None
    return "".join(_DIGITS.findall(labelled)) or None


def _grid(text: str) -> str | None:
    """The grid in a text without letters."""
    runs = _DIGITS.findall(text)
    whole: list[str] = [run for run in runs if len(run) == CELLS]
    rows: list[str] = [run for run in runs if len(run) == 4]
    if whole:
        return whole[-1]
    if len(rows) >= 4:
        return "".join(rows[-4:])
    digits = "".join(runs)
    return digits if len(digits) == CELLS else None


def strict_cells(digits: str | None, puzzle: Puzzle) -> tuple[float, str]:
    """Right cells among those that were empty, where each changed clue counts as a wrong cell more.

    1.0 for the solution alone. More than 16 digits are no grid; what lacks cells has them wrong.
    """
    if digits is None:
        return 0.0, "no grid found"
    if len(digits) > CELLS:
        return 0.0, f"{len(digits)} digits are no grid"
    empty = puzzle.empty
    right = _right(digits, puzzle)
    changed = [i for i in range(CELLS) if i not in empty and digits[i : i + 1] != puzzle.puzzle[i]]
    why = f"{right} of {len(empty)} empty cells are right"
    if changed:
        why += (
            f"; {len(changed)} clues are not kept (cells {', '.join(str(i + 1) for i in changed)})"
        )
    return right / (len(empty) + len(changed)), why


def empty_cells_only(digits: str | None, puzzle: Puzzle) -> tuple[float, str]:
    """Share of the empty cells filled correctly, compared by place in the first 16 digits.

    As published (diffu-GRPO, arXiv 2504.12216): a clue may be overwritten at no cost.
    """
    right, of = _right(digits or "", puzzle), len(puzzle.empty)
    return right / of, f"{right} of {of} empty cells are right"


def _right(digits: str, puzzle: Puzzle) -> int:
    return sum(digits[i : i + 1] == puzzle.solution[i] for i in puzzle.empty)


CELL_REWARDS: dict[str, CellReward] = {"strict": strict_cells, "empty_cells": empty_cells_only}
"""By the name that the option ``reward`` takes."""


class GridRewards:
    """Reward function and metric of a way to read completions, and one to pay cells."""

    def __init__(self, extract: Extract, reward: str) -> None:
        self.extract, self._pay = extract, CELL_REWARDS[reward]

    def cell_accuracy(
        self, completions: Sequence[str], puzzle: Sequence[str], solution: Sequence[str], **_: Any
    ) -> list[float]:
        """In [0, 1]: what the cells of each answer pay."""
        samples = zip(completions, puzzle, solution, strict=True)
        return [self._pay(self.extract(text), Puzzle(*given))[0] for text, *given in samples]

    def solved(self, completions: Sequence[str], solution: Sequence[str], **_: Any) -> list[float]:
        """1.0 where the answer is exactly the solution, clues and all."""
        pairs = zip(completions, solution, strict=True)
        return [float(self.extract(text) == wanted) for text, wanted in pairs]

    def explain(self, completion: str, puzzle: str, solution: str, **_: Any) -> str:
        """Why :meth:`cell_accuracy` pays what it does."""
        return self._pay(self.extract(completion), Puzzle(puzzle, solution))[1]
