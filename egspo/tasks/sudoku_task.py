"""The Sudoku task: prompts in two styles, the reward of the literature, and the solve rate."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any, Literal

from egspo.tasks.base import Example, Reward, Task, register_task
from egspo.tasks.sudoku import (
    MAX_EMPTY,
    Puzzle,
    careless_solution,
    make_puzzles,
    read_csv,
    split_grids,
)

_DIGITS = re.compile("[0-9]")
_INSTRUCTION = (
    "Solve this 4x4 Sudoku. Every row, every column and every 2x2 box must hold each of the "
    "digits 1 to 4 exactly once; 0 marks a cell to fill in. The grid is given row by row:\n{rows}\n"
    "Think it through, then give the solved grid as 16 digits, row by row, between <answer> and "
    "</answer>."
)


def extract_digits(completion: str) -> str:
    """Digits of the answer: inside the last ``<answer>`` tag if there is one, else everywhere."""
    start = completion.rfind("<answer>")
    if start >= 0:
        completion = completion[start:].partition("</answer>")[0]
    return "".join(_DIGITS.findall(completion))


def cell_accuracy(
    prompts: Sequence[Any],
    completions: Sequence[str],
    puzzle: Sequence[str],
    solution: Sequence[str],
    **_: Any,
) -> list[float]:
    """Share of the empty cells filled correctly; given cells pay nothing.

    Cells are compared by place in the first 16 digits of the answer; missing ones are wrong.
    """
    scores = []
    for completion, given, wanted in zip(completions, puzzle, solution, strict=True):
        digits = extract_digits(completion)
        empty = Puzzle(given, wanted).empty
        scores.append(sum(digits[i : i + 1] == wanted[i] for i in empty) / len(empty))
    return scores


def solved(
    prompts: Sequence[Any], completions: Sequence[str], solution: Sequence[str], **_: Any
) -> list[float]:
    """1.0 where the answer has exactly 16 digits and they are the solution."""
    return [
        float(extract_digits(completion) == wanted)
        for completion, wanted in zip(completions, solution, strict=True)
    ]


@register_task("sudoku")
def build_sudoku(
    *,
    train_examples: int = 10000,
    test_examples: int = 256,
    empty_cells: int | list[int] | None = None,
    test_grids: int = 48,
    validation_examples: int = 256,
    validation_grids: int = 0,
    seed: int = 0,
    path: str | None = None,
    prompt_style: Literal["digits", "instruct"] = "instruct",
    careless: float = 0.0,
) -> Task:
    """4x4 Sudoku, split by solution grid.

    Args:
        train_examples, test_examples, validation_examples: puzzles to make; with ``path``, at most
            so many are taken.
        empty_cells: how many cells are empty, or [fewest, most]. None makes puzzles of 8; with
            ``path``, it takes them all.
        test_grids: of the 288 solved grids, how many only the test puzzles use.
        validation_grids: of the others, how many only the validation puzzles use. With 0 there
            are none, and training is evaluated on the test puzzles.
        seed: of the split and the puzzles, independent of the training seed.
        path: a CSV file with the columns ``Puzzle,Solution`` instead of made puzzles.
        prompt_style: ``digits``: the 16 digits of the puzzle in, the 16 of the solution out;
            ``instruct``: an instruction in English, the answer in ``<answer>`` tags.
        careless: share of the training targets, for supervised training alone, that are
            :func:`egspo.tasks.sudoku.careless_solution` and not the solution.

    Raises:
        FileNotFoundError: if there is no file ``path``.
        ValueError: naming the option, or the line of the file, that is wrong.
    """
    if prompt_style not in ("digits", "instruct"):
        raise ValueError(f"prompt_style must be 'digits' or 'instruct', got {prompt_style!r}")
    if not 0.0 <= careless <= 1.0:
        raise ValueError(f"careless must lie in [0, 1], got {careless!r}")
    for name, count in (
        ("train_examples", train_examples),
        ("test_examples", test_examples),
        ("test_grids", test_grids),
        ("validation_examples", validation_examples),
    ):
        if not _is_int(count) or count < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {count!r}")
    train_grids, held_out = split_grids(test_grids, seed)
    if not _is_int(validation_grids) or not 0 <= validation_grids < len(train_grids):
        raise ValueError(
            f"validation_grids must be a whole number in [0, {len(train_grids) - 1}], of the grids "
            f"that test_grids leaves, got {validation_grids!r}"
        )
    chosen, train_grids = train_grids[:validation_grids], train_grids[validation_grids:]
    validation: list[Puzzle] = []
    if path is None:
        bounds = _bounds(8 if empty_cells is None else empty_cells)
        train = make_puzzles(train_grids, train_examples, bounds, seed, "train")
        test = make_puzzles(held_out, test_examples, bounds, seed, "test")
        if chosen:
            validation = make_puzzles(chosen, validation_examples, bounds, seed, "validation")
    else:
        bounds = _bounds([1, MAX_EMPTY] if empty_cells is None else empty_cells)
        puzzles = [p for p in read_csv(path) if bounds[0] <= len(p.empty) <= bounds[1]]
        train, test = _split(puzzles, set(held_out), path)
        validation = [p for p in train if p.solution in set(chosen)][:validation_examples]
        train = [p for p in train if p.solution not in set(chosen)]
        if not train or bool(chosen) != bool(validation):
            raise ValueError(
                f"path: with validation_grids={validation_grids}, {path} has {len(validation)} "
                f"puzzles for validation and {len(train)} for training: both need at least one"
            )
        train, test = train[:train_examples], test[:test_examples]
    return Task(
        name="sudoku",
        train=[
            _example(puzzle, prompt_style, careless=_draw(seed, i) < careless)
            for i, puzzle in enumerate(train)
        ],
        validation=[_example(p, prompt_style) for p in validation],
        test=[_example(p, prompt_style) for p in test],
        rewards=[Reward("cell_accuracy", cell_accuracy)],
        solved=solved,
        extract=extract_digits,
    )


def _split(
    puzzles: Sequence[Puzzle], held_out: set[str], path: str
) -> tuple[list[Puzzle], list[Puzzle]]:
    """Training and test puzzles of a file, by solution grid."""
    train = [p for p in puzzles if p.solution not in held_out]
    test = [p for p in puzzles if p.solution in held_out]
    if not train or not test:
        raise ValueError(
            f"path: of the {len(puzzles)} puzzles in {path} (with as many empty cells as "
            f"empty_cells asks for), {len(train)} are for training and {len(test)} for testing, "
            f"because {len(held_out)} of the 288 solved grids (test_grids) are held out; both "
            "need at least one: give a file with more solution grids, or change test_grids or seed"
        )
    return train, test


def _bounds(empty_cells: int | list[int]) -> tuple[int, int]:
    """(fewest, most) empty cells, checked."""
    bounds = [empty_cells] * 2 if isinstance(empty_cells, int) else empty_cells
    valid = isinstance(bounds, list | tuple) and len(bounds) == 2 and all(map(_is_int, bounds))
    if not valid or not 1 <= bounds[0] <= bounds[1] <= MAX_EMPTY:
        raise ValueError(
            f"empty_cells must be a number or [fewest, most] within [1, {MAX_EMPTY}], "
            f"got {empty_cells!r}"
        )
    return bounds[0], bounds[1]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _draw(seed: int, number: int) -> float:
    """In [0, 1), for a training example: which share of targets it is in."""
    return random.Random(f"{seed}-careless-{number}").random()


def _example(puzzle: Puzzle, style: str, *, careless: bool = False) -> Example:
    answer = careless_solution(puzzle.puzzle) if careless else puzzle.solution
    if style == "digits":
        content, target = puzzle.puzzle, answer
    else:
        rows = "\n".join(puzzle.puzzle[i : i + 4] for i in range(0, 16, 4))
        content = _INSTRUCTION.format(rows=rows)
        target = f"<answer>\n{answer}\n</answer>"
    return Example(
        prompt=[{"role": "user", "content": content}],
        columns={"puzzle": puzzle.puzzle, "solution": puzzle.solution},
        target=target,
        question=puzzle.puzzle,
    )
