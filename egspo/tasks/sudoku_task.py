"""The Sudoku task: prompts in two styles, made puzzles or those of files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from egspo.tasks.base import Example, Reward, Task, register_task
from egspo.tasks.columns import ColumnNames
from egspo.tasks.prompt_text import check_instruction
from egspo.tasks.published import Protocol, under_protocol
from egspo.tasks.rows import check_share
from egspo.tasks.splits import sample
from egspo.tasks.sudoku import (
    COLUMNS,
    MAX_EMPTY,
    Puzzle,
    careless_solution,
    make_puzzles,
    read_csv,
    split_grids,
)
from egspo.tasks.sudoku_answers import CELL_REWARDS, GridRewards, grid_in, tagged_grid

_INSTRUCTION = (
    "Solve this 4x4 Sudoku. Every row, every column and every 2x2 box must hold each of the "
    "digits 1 to 4 exactly once; 0 marks a cell to fill in. The grid is given row by row:\n{rows}\n"
    "Think it through, then give the solved grid as 16 digits, row by row, between <answer> and "
    "</answer>."
)


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
    test: str | None = None,
    columns: dict[str, str] | None = None,
    skip_bad_rows: float = 0.0,
    prompt_style: Literal["digits", "instruct"] = "instruct",
    instruction: str | None = None,
    protocol: Protocol = "strict",
    reward: str = "strict",
    careless: float = 0.0,
) -> Task:
    """4x4 Sudoku, split by solution grid.

    Args:
        train_examples, test_examples, validation_examples: puzzles to make; of files, at most so
            many are taken, drawn by ``seed``.
        empty_cells: how many cells are empty, or [fewest, most]. None makes puzzles of 8, and
            takes all of a file.
        test_grids: of the 288 solved grids, how many only the test puzzles use; without effect
            with ``test``.
        validation_grids: of the others, how many only the validation puzzles use. With 0 there
            are none, and training is evaluated on the test puzzles.
        seed: of the split and the puzzles, independent of the training seed.
        path: a CSV file with the columns ``Puzzle,Solution`` instead of made puzzles.
        test: such a file that is a test set: no other puzzles have its solution grids.
        columns: what ``Puzzle`` and ``Solution`` are called in the files.
        skip_bad_rows: share of the rows of a file that may be wrong (several solutions, no grid):
            they are left out, counted and named. With 0, one stops the run.
        prompt_style: ``digits``: the 16 digits of the puzzle in, the 16 of the solution out;
            ``instruct``: an instruction in English, the answer in ``<answer>`` tags.
        instruction: of ``instruct``, instead of its own: a text with {rows}, the grid in four
            lines, or {puzzle}, its 16 digits. The answer is expected in ``<answer>`` tags.
        protocol: ``published`` has the prompts and rewards of the paper's code, see
            ``docs/protocol.md``.
        reward: ``strict``: a clue that is changed counts as a wrong cell; ``empty_cells``: the
            published one, to which clues do not matter.
        careless: share of the training targets, for supervised training alone, that are
            :func:`egspo.tasks.sudoku.careless_solution` and not the solution.

    Raises:
        FileNotFoundError: if there is no file ``path`` or ``test``.
        ValueError: naming the option, or the line of the file, that is wrong.
    """
    if prompt_style not in ("digits", "instruct"):
        raise ValueError(f"prompt_style must be 'digits' or 'instruct', got {prompt_style!r}")
    check_instruction(instruction, ("{rows}", "{puzzle}"), prompt_style)
    if reward not in CELL_REWARDS:
        raise ValueError(f"reward must be one of {list(CELL_REWARDS)}, got {reward!r}")
    if not 0.0 <= careless <= 1.0:
        raise ValueError(f"careless must lie in [0, 1], got {careless!r}")
    counts = {"train": train_examples, "test": test_examples, "validation": validation_examples}
    for name, count in (
        *((f"{name}_examples", count) for name, count in counts.items()),
        ("test_grids", test_grids),
    ):
        if not _is_int(count) or count < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {count!r}")
    reader = _Reader(
        ColumnNames(columns, COLUMNS), check_share(skip_bad_rows), empty_cells, path, test
    )
    grids = _split_grids(reader, test_grids, validation_grids, seed)
    parts = {
        name: reader.read(name, used, counts[name], seed)
        for name, used in grids.items()
        if used or name != "validation"
    }
    reader.names.check_used()
    rewards = GridRewards(grid_in if prompt_style == "digits" else tagged_grid, reward)
    text = _INSTRUCTION if instruction is None else instruction
    task = Task(
        name="sudoku",
        train=[
            _example(puzzle, prompt_style, text, careless=_draw(seed, i) < careless)
            for i, puzzle in enumerate(parts["train"])
        ],
        validation=[_example(p, prompt_style, text) for p in parts.get("validation", ())],
        test=[_example(p, prompt_style, text) for p in parts["test"]],
        rewards=[Reward("cell_accuracy", rewards.cell_accuracy, explain=rewards.explain)],
        solved=rewards.solved,
        extract=rewards.extract,
    )
    return under_protocol(
        task,
        protocol,
        instruction=instruction,
        prompt_style=None if prompt_style == "instruct" else prompt_style,
        reward=None if reward == "strict" else reward,
    )


class _Reader:
    """Puzzles of the files there are, others made."""

    def __init__(
        self,
        names: ColumnNames,
        skip_bad_rows: float,
        empty_cells: int | list[int] | None,
        path: str | None,
        test: str | None,
    ) -> None:
        self.names = names
        self._made = _bounds(8 if empty_cells is None else empty_cells)
        bounds = _bounds([1, MAX_EMPTY] if empty_cells is None else empty_cells)
        self.files = {
            file: [
                puzzle
                for puzzle in read_csv(file, names=names, skip_bad_rows=skip_bad_rows)
                if bounds[0] <= len(puzzle.empty) <= bounds[1]
            ]
            for file in (path, test)
            if file is not None
        }
        self._path, self.test = path, test

    def read(self, name: str, grids: Sequence[str], count: int, seed: int) -> list[Puzzle]:
        """At most ``count`` puzzles of a split that has these solution grids."""
        file = self.test if name == "test" and self.test is not None else self._path
        if file is None:
            return make_puzzles(grids, count, self._made, seed, name)
        allowed = set(grids)
        found = [puzzle for puzzle in self.files[file] if puzzle.solution in allowed]
        if not found:
            raise ValueError(
                f"{'test' if file == self.test else 'path'}: of the {len(self.files[file])} puzzles"
                f" in {file} (with as many empty cells as empty_cells asks for), none has one of "
                f"the {len(allowed)} of the 288 solved grids that are for {_PURPOSE[name]}: give a "
                "file with more solution grids, or change test_grids, validation_grids or seed"
            )
        return sample(found, count, lambda puzzle: puzzle.puzzle, seed)


_PURPOSE = {"train": "training", "validation": "validation", "test": "testing"}


def _split_grids(
    reader: _Reader, test_grids: int, validation_grids: int, seed: int
) -> dict[str, list[str]]:
    """Solution grids by split, disjoint; a test file has all of its own."""
    train, test = split_grids(test_grids, seed)
    if reader.test is not None:
        test = sorted({puzzle.solution for puzzle in reader.files[reader.test]})
        train = [grid for part in split_grids(test_grids, seed) for grid in part]
        train = [grid for grid in train if grid not in set(test)]
        if not train:
            raise ValueError(
                f"test: the puzzles of {reader.test} use all of the 288 solved grids, which leaves "
                "none to train on"
            )
    if not _is_int(validation_grids) or not 0 <= validation_grids < len(train):
        raise ValueError(
            f"validation_grids must be a whole number in [0, {len(train) - 1}], of the grids "
            f"that {'test' if reader.test else 'test_grids'} leaves, got {validation_grids!r}"
        )
    return {"train": train[validation_grids:], "validation": train[:validation_grids], "test": test}


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


def _example(puzzle: Puzzle, style: str, instruction: str, *, careless: bool = False) -> Example:
    answer = careless_solution(puzzle.puzzle) if careless else puzzle.solution
    if style == "digits":
        content, target = puzzle.puzzle, answer
    else:
        rows = "\n".join(puzzle.puzzle[i : i + 4] for i in range(0, 16, 4))
        content = instruction.replace("{rows}", rows).replace("{puzzle}", puzzle.puzzle)
        target = f"<answer>\n{answer}\n</answer>"
    return Example(
        prompt=[{"role": "user", "content": content}],
        columns={"puzzle": puzzle.puzzle, "solution": puzzle.solution},
        target=target,
        question=puzzle.puzzle,
    )
