"""4x4 Sudoku: all grids, puzzles with one solution, splits that do not leak, and the CSV format.

A grid or puzzle is 16 digits, row by row; 0 is an empty cell of a puzzle.
"""

from __future__ import annotations

import csv
import functools
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from egspo.tasks.columns import ColumnNames
from egspo.tasks.rows import report_bad

CELLS = 16
COLUMNS = ("Puzzle", "Solution")
"""Of a CSV file."""

MAX_EMPTY = 12
"""A 4x4 puzzle needs at least four clues to have one solution."""

# Of each cell, those it conflicts with: same row, column or 2x2 box.
_PEERS = [
    [
        j
        for j in range(CELLS)
        if j != i
        and (i // 4 == j // 4 or i % 4 == j % 4 or (i // 8, i % 4 // 2) == (j // 8, j % 4 // 2))
    ]
    for i in range(CELLS)
]


@dataclass(frozen=True)
class Puzzle:
    """A puzzle and its only solution."""

    puzzle: str
    solution: str

    @property
    def empty(self) -> list[int]:
        """Places of the empty cells."""
        return [i for i, digit in enumerate(self.puzzle) if digit == "0"]


def solutions(puzzle: str, limit: int = 2) -> list[str]:
    """The first ``limit`` of all solutions in ascending order.

    Raises:
        ValueError: if ``puzzle`` is not 16 digits from 0 to 4.
    """
    if len(puzzle) != CELLS or set(puzzle) - set("01234"):
        raise ValueError(f"a puzzle is 16 digits from 0 to 4, got {puzzle!r}")
    grids = all_grids()
    matching = (1 << len(grids)) - 1  # bit g: grid g has all the clues so far
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            matching &= _grids_with()[cell, digit]
    found: list[str] = []
    while matching and len(found) < limit:
        lowest = matching & -matching
        found.append(grids[lowest.bit_length() - 1])
        matching ^= lowest
    return found


@functools.cache
def all_grids() -> tuple[str, ...]:
    """The 288 solved grids, ascending."""
    return tuple(_complete([]))


def _complete(cells: list[int]) -> Iterator[str]:
    """Every solved grid that begins with ``cells``, ascending."""
    if len(cells) == CELLS:
        yield "".join(map(str, cells))
        return
    taken = {cells[j] for j in _PEERS[len(cells)] if j < len(cells)}
    for digit in sorted({1, 2, 3, 4} - taken):
        yield from _complete([*cells, digit])


@functools.cache
def _grids_with() -> dict[tuple[int, str], int]:
    """For each cell and digit, the set of grids that have it there, as bits."""
    places = [(cell, digit) for cell in range(CELLS) for digit in "1234"]
    return {
        (cell, digit): sum(1 << g for g, grid in enumerate(all_grids()) if grid[cell] == digit)
        for cell, digit in places
    }


def has_unique_solution(puzzle: str) -> bool:
    return len(solutions(puzzle)) == 1


def make_puzzle(grid: str, empty_cells: int, rng: random.Random) -> Puzzle:
    """A puzzle with exactly ``empty_cells`` empty cells and ``grid`` as its only solution.

    Cells are emptied in random order, skipping those that would make a second solution possible;
    where that ends too early it starts again.

    Raises:
        ValueError: if ``grid`` is not a solved grid, ``empty_cells`` is not in [1, 12], or no
            such puzzle was found in 1000 orders (12 empty cells take up to five, for any grid).
    """
    if "0" in grid or not has_unique_solution(grid):
        raise ValueError(f"{grid!r} is not a solved grid")
    if not 1 <= empty_cells <= MAX_EMPTY:
        raise ValueError(f"empty_cells must lie in [1, {MAX_EMPTY}], got {empty_cells}")
    for _ in range(1000):
        cells = list(grid)
        for cell in rng.sample(range(CELLS), CELLS):
            if cells.count("0") == empty_cells:
                break
            cells[cell] = "0"
            if not has_unique_solution("".join(cells)):
                cells[cell] = grid[cell]
        if cells.count("0") == empty_cells:
            return Puzzle("".join(cells), grid)
    raise ValueError(f"found no puzzle of {empty_cells} empty cells for the grid {grid}")


def careless_solution(puzzle: str) -> str:
    """Rows filled with the digits they lack, ascending, without a look at columns and boxes."""
    rows = []
    for start in range(0, CELLS, 4):
        row = puzzle[start : start + 4]
        lacking = iter(sorted(set("1234") - set(row)))
        rows.append("".join(next(lacking) if digit == "0" else digit for digit in row))
    return "".join(rows)


def split_grids(test_grids: int, seed: int) -> tuple[list[str], list[str]]:
    """Training and test grids, disjoint: a split by puzzle would leak solutions."""
    grids = list(all_grids())
    if not 0 < test_grids < len(grids):
        raise ValueError(f"test_grids must lie in [1, {len(grids) - 1}], got {test_grids}")
    random.Random(f"split-{seed}").shuffle(grids)
    return grids[test_grids:], grids[:test_grids]


def make_puzzles(
    grids: Sequence[str], count: int, empty_cells: tuple[int, int], seed: int, name: str
) -> list[Puzzle]:
    """``count`` puzzles, the i-th a function of (seed, name, i) and ``grids`` alone."""
    puzzles = []
    for index in range(count):
        rng = random.Random(f"{seed}-{name}-{index}")
        puzzles.append(make_puzzle(rng.choice(grids), rng.randint(*empty_cells), rng))
    return puzzles


def write_csv(path: str | os.PathLike[str], puzzles: Sequence[Puzzle]) -> None:
    """Write the columns ``Puzzle,Solution``."""
    with Path(path).open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows([p.puzzle, p.solution] for p in puzzles)


def read_csv(
    path: str | os.PathLike[str],
    *,
    names: ColumnNames | None = None,
    skip_bad_rows: float = 0.0,
) -> list[Puzzle]:
    """Read the columns ``Puzzle,Solution`` and check every line.

    Args:
        path: of the file.
        names: what the columns may be called in it.
        skip_bad_rows: share of the puzzles that may be wrong; they are left out, counted and named.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, for a missing column, or for a malformed grid or a
            solution that is not the puzzle's only one where too many are.
    """
    puzzles: list[Puzzle] = []
    bad: dict[int, str] = {}
    # utf-8-sig: spreadsheets begin a file with a byte order mark.
    with Path(path).open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        try:
            there = dict(zip(COLUMNS, COLUMNS, strict=True))
            there |= {} if names is None else names.of(reader.fieldnames or ())
            missing = set(there.values()) - set(reader.fieldnames or ())
            if missing:
                raise ValueError(
                    f"lacks the columns {sorted(missing)}; it has {reader.fieldnames or []}"
                )
            for row in reader:
                try:
                    puzzles.append(_checked(row[there["Puzzle"]], row[there["Solution"]]))
                except ValueError as error:
                    bad[reader.line_num] = str(error)
        except (ValueError, csv.Error) as error:  # not UTF-8 is a ValueError too
            raise ValueError(f"{path}, line {max(reader.line_num, 1)}: {error}") from error
    report_bad(str(path), bad, len(puzzles) + len(bad), skip_bad_rows, unit="line")
    return puzzles


def _checked(puzzle: str | None, solution: str | None) -> Puzzle:
    """The puzzle of one line; a ValueError says what is wrong with it."""
    puzzle, solution = (puzzle or "").strip(), (solution or "").strip()
    if puzzle.isdigit():  # spreadsheets drop leading zeros of what looks like a number
        puzzle = puzzle.zfill(CELLS)
    found = solutions(puzzle)
    if not found:
        raise ValueError(f"the puzzle {puzzle} has no solution")
    if len(found) > 1:
        raise ValueError(f"the puzzle {puzzle} has several solutions, such as {found}")
    if found != [solution]:
        raise ValueError(
            f"the puzzle {puzzle} is solved by {found[0]}, its Solution is {solution!r}"
        )
    return Puzzle(puzzle, solution)
