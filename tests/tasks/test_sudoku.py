"""4x4 Sudoku: the solver against brute force, puzzles, splits, the CSV format and the task."""

from __future__ import annotations

import itertools
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from egspo.tasks import Example, Reward, Task, build_task, register_task
from egspo.tasks.sudoku import (
    Puzzle,
    all_grids,
    careless_solution,
    has_unique_solution,
    make_puzzle,
    make_puzzles,
    read_csv,
    solutions,
    split_grids,
    write_csv,
)

GRID = "1234341221434321"
PUZZLE = "1030040220404001"
ONE_SOLUTION = Puzzle("1230341221434321", GRID)


def brute_force() -> list[str]:
    """All grids by their definition: rows are permutations, columns and boxes hold all digits."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    pairs = [
        (a, b)
        for a in rows
        for b in rows
        if len(set(a[:2] + b[:2])) == len(set(a[2:] + b[2:])) == 4
    ]
    found = [
        a + b + c + d
        for (a, b), (c, d) in itertools.product(pairs, pairs)
        if all(len({a[i], b[i], c[i], d[i]}) == 4 for i in range(4))
    ]
    return sorted(found)


GRIDS = brute_force()


def test_all_grids_are_those_of_brute_force() -> None:
    assert list(all_grids()) == GRIDS
    assert len(GRIDS) == 288


@st.composite
def partial_grids(draw: st.DrawFn) -> str:
    """A grid with cells emptied, and sometimes one cell changed, so that it may be unsolvable."""
    cells = list(draw(st.sampled_from(GRIDS)))
    for cell in draw(st.sets(st.integers(0, 15))):
        cells[cell] = "0"
    if draw(st.booleans()):
        cells[draw(st.integers(0, 15))] = draw(st.sampled_from("01234"))
    return "".join(cells)


@given(partial_grids(), st.integers(1, 5))
def test_solver_agrees_with_brute_force(puzzle: str, limit: int) -> None:
    expected = [
        grid for grid in GRIDS if all(p in ("0", g) for p, g in zip(puzzle, grid, strict=True))
    ]
    assert solutions(puzzle, limit=1000) == expected
    found = solutions(puzzle, limit=limit)
    assert len(found) == min(limit, len(expected))
    assert set(found) <= set(expected)
    assert has_unique_solution(puzzle) == (len(expected) == 1)


@given(st.text("01234", min_size=16, max_size=16))
def test_solver_on_arbitrary_clues(puzzle: str) -> None:
    expected = [
        grid for grid in GRIDS if all(p in ("0", g) for p, g in zip(puzzle, grid, strict=True))
    ]
    assert solutions(puzzle, limit=1000) == expected


@pytest.mark.parametrize("puzzle", ["", "1" * 15, "1" * 17, "5" + "0" * 15, "١" + "0" * 15])
def test_solver_refuses_what_is_no_puzzle(puzzle: str) -> None:
    with pytest.raises(ValueError, match="16 digits from 0 to 4"):
        solutions(puzzle)


@pytest.mark.parametrize("empty", range(1, 13))
def test_puzzles_have_the_asked_empty_cells_and_one_solution(empty: int) -> None:
    for index, grid in enumerate(GRIDS[::7]):
        puzzle = make_puzzle(grid, empty, random.Random(index))
        assert puzzle.puzzle.count("0") == len(puzzle.empty) == empty
        assert all(puzzle.puzzle[i] == "0" for i in puzzle.empty)
        assert solutions(puzzle.puzzle) == [grid] == [puzzle.solution]


def test_every_grid_has_a_puzzle_of_twelve_empty_cells() -> None:
    for grid in GRIDS:
        assert make_puzzle(grid, 12, random.Random(0)).puzzle.count("0") == 12


@pytest.mark.parametrize(
    ("grid", "empty", "message"),
    [
        (GRID, 0, "empty_cells"),
        (GRID, 13, "empty_cells"),
        ("0" + GRID[1:], 3, "not a solved grid"),
        ("1" * 16, 3, "not a solved grid"),
    ],
)
def test_make_puzzle_refuses(grid: str, empty: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_puzzle(grid, empty, random.Random(0))


def test_puzzles_are_a_function_of_seed_name_and_index() -> None:
    def make(count: int = 20, seed: int = 0, name: str = "train") -> list[Puzzle]:
        return make_puzzles(GRIDS, count, (4, 8), seed, name)

    assert make() == make()
    assert make(count=5) == make()[:5]
    assert make() != make(seed=1)
    assert make() != make(name="test")
    assert len(set(make())) > 15
    assert {len(p.empty) for p in make(count=60)} == {4, 5, 6, 7, 8}


@pytest.mark.parametrize("seed", range(3))
def test_split_grids_is_a_partition(seed: int) -> None:
    train, test = split_grids(48, seed)
    assert len(test) == 48
    assert sorted(train + test) == GRIDS
    assert split_grids(48, seed) == (train, test)
    assert set(split_grids(48, seed + 1)[1]) != set(test)


@pytest.mark.parametrize("test_grids", [0, -1, 288])
def test_split_grids_refuses(test_grids: int) -> None:
    with pytest.raises(ValueError, match=r"test_grids must lie in \[1, 287\]"):
        split_grids(test_grids, 0)


# --- CSV


def test_csv_round_trip(tmp_path: Path) -> None:
    puzzles = make_puzzles(GRIDS, 30, (1, 12), 0, "csv")
    write_csv(tmp_path / "p.csv", puzzles)
    assert read_csv(tmp_path / "p.csv") == puzzles
    assert read_csv(str(tmp_path / "p.csv")) == puzzles


ROW = f"{ONE_SOLUTION.puzzle},{GRID}"
ZEROS = Puzzle("0030040220404001", solutions("0030040220404001")[0])


@pytest.mark.parametrize(
    "text",
    [
        f"Puzzle,Solution\n{ROW}\n".encode(),
        f"Puzzle,Solution\n{ROW}".encode(),
        f"Puzzle,Solution\r\n{ROW}\r\n".encode(),
        f"\ufeffPuzzle,Solution\n{ROW}\n".encode(),
        f"Solution,id,Puzzle\n{GRID},7,{ONE_SOLUTION.puzzle}\n".encode(),
        f'"Puzzle","Solution"\n"{ONE_SOLUTION.puzzle}"," {GRID}"\n\n'.encode(),
    ],
    ids=["plain", "no end of line", "CRLF", "BOM", "other columns", "quotes and blanks"],
)
def test_csv_variants(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "p.csv").write_bytes(text)
    assert read_csv(tmp_path / "p.csv") == [ONE_SOLUTION]


def test_csv_restores_leading_zeros(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(f"Puzzle,Solution\n{int(ZEROS.puzzle)},{ZEROS.solution}\n")
    assert read_csv(tmp_path / "p.csv") == [ZEROS]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"5230341221434321,{GRID}", "16 digits from 0 to 4, got '5230341221434321'"),
        (f"1.23E+15,{GRID}", "got '1.23E\\+15'"),
        (f"12303412214343210,{GRID}", "16 digits"),
        (f"{'0' * 16},{GRID}", "several solutions"),
        (f"0,{GRID}", "several solutions"),
        (f"1100000000000000,{GRID}", "has no solution"),
        (f"{ONE_SOLUTION.puzzle},{GRIDS[-1]}", f"is solved by {GRID}"),
        (f"{ONE_SOLUTION.puzzle},", "its Solution is ''"),
        (ONE_SOLUTION.puzzle, "its Solution is ''"),
        (f",{GRID}", "16 digits from 0 to 4, got ''"),
    ],
)
def test_csv_errors_name_file_and_line(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "bad.csv").write_text(f"Puzzle,Solution\n{ROW}\n{row}\n{ROW}\n")
    with pytest.raises(ValueError, match=rf"bad\.csv, line 3: .*{message}"):
        read_csv(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"line 1: lacks the columns \['Puzzle', 'Solution'\]"),
        (b"Puzzle,Answer\n", r"line 1: lacks the columns \['Solution'\]; .*'Answer'"),
        (b"puzzle;solution\n", "line 1: lacks the columns"),
        (b"Puzzle,Solution\n\xff\xfe\n", "line .*utf-8"),
        (b'Puzzle,Solution\n"' + b"1" * 200_000, "line .*field larger"),
    ],
    ids=["empty", "column", "separator", "encoding", "unclosed quote"],
)
def test_csv_files_that_cannot_be_read(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "bad.csv").write_bytes(text)
    with pytest.raises(ValueError, match=rf"bad\.csv, {message}"):
        read_csv(tmp_path / "bad.csv")


def test_wrong_lines_are_counted_and_left_out_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "p.csv"
    file.write_text(f"Puzzle,Solution\n{ROW}\n{'0' * 16},{GRID}\n{ROW}\nx,y\n{ROW}\n")
    count = r"2 of 5 rows are wrong \(lines 3, 5\)"
    with pytest.raises(ValueError, match=rf"line 3: .*several solutions.* {count}; skip_bad_rows"):
        read_csv(file)
    with pytest.raises(ValueError, match=rf"{count}; skip_bad_rows allows a share of 0\.3"):
        read_csv(file, skip_bad_rows=0.3)
    with caplog.at_level(logging.WARNING, "egspo"):
        assert read_csv(file, skip_bad_rows=0.4) == [ONE_SOLUTION] * 3
    assert re.search(f"{count} are left out: .*line 3", caplog.text)
    file.write_text(f"Puzzle,Solution\nx,{GRID}\n")
    with pytest.raises(ValueError, match="1 of 1 rows are wrong"):
        read_csv(file, skip_bad_rows=1.0)


def test_other_column_names(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    puzzles = make_puzzles(GRIDS, 200, (4, 8), 0, "csv")
    lines = "".join(f"{p.puzzle},{p.solution}\n" for p in puzzles)
    file.write_text(f"quizzes,solutions\n{lines}")
    names = {"Puzzle": "quizzes", "Solution": "solutions"}
    task = sudoku(path=str(file), columns=names, train_examples=999, test_examples=999)
    assert len(task.train) + len(task.test) == 200
    with pytest.raises(ValueError, match=r"lacks the columns \['Puzzle', 'Solution'\]; it has"):
        sudoku(path=str(file))
    with pytest.raises(ValueError, match="no data has the column 'grid', which 'Puzzle' stands"):
        sudoku(columns={"Puzzle": "grid"})
    with pytest.raises(ValueError, match="no column 'puzzle', did you mean 'Puzzle'"):
        sudoku(path=str(file), columns={"puzzle": "quizzes"})
    for wrong in (["quizzes"], {"Puzzle": 1}):
        with pytest.raises(ValueError, match=r"columns must map names of \['Puzzle', 'Solution'\]"):
            sudoku(columns=wrong)


def test_csv_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        read_csv(tmp_path / "none.csv")


# --- Task


def sudoku(**options: Any) -> Task:
    return build_task("sudoku", **{"train_examples": 40, "test_examples": 20, **options})


def answers(examples: Any) -> set[str]:
    return {example.columns["solution"] for example in examples}


@pytest.mark.parametrize("options", [{}, {"empty_cells": 12}, {"empty_cells": [3, 5]}])
def test_made_task_has_what_was_asked(options: dict[str, Any]) -> None:
    task = sudoku(**options)
    assert (len(task.train), len(task.test)) == (40, 20)
    asked = options.get("empty_cells", 8)
    low, high = (asked, asked) if isinstance(asked, int) else asked
    for example in [*task.train, *task.test]:
        puzzle = example.columns["puzzle"]
        assert low <= puzzle.count("0") <= high
        assert solutions(puzzle) == [example.columns["solution"]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("test_grids", [1, 48, 287])
def test_made_splits_share_no_solution(seed: int, test_grids: int) -> None:
    task = sudoku(seed=seed, test_grids=test_grids, train_examples=100, test_examples=100)
    assert not answers(task.train) & answers(task.test)


def test_csv_splits_share_no_solution(tmp_path: Path) -> None:
    write_csv(tmp_path / "p.csv", make_puzzles(GRIDS, 300, (1, 10), 3, "file"))
    task = sudoku(path=str(tmp_path / "p.csv"), train_examples=1000, test_examples=1000)
    assert len(task.train) + len(task.test) == 300
    assert not answers(task.train) & answers(task.test)
    # Which ones are taken does not depend on the order of the file, and spreads over all grids.
    write_csv(
        tmp_path / "sorted.csv", sorted(read_csv(tmp_path / "p.csv"), key=lambda p: p.solution)
    )
    shown = [
        sudoku(path=str(tmp_path / name), train_examples=20, test_examples=20)
        for name in ("p.csv", "sorted.csv")
    ]
    assert shown[0].test == shown[1].test and shown[0].train == shown[1].train
    assert len(answers(shown[0].test)) > 12
    # The same grids are held out from a file and from made puzzles: results compare.
    assert answers(task.test) <= set(split_grids(48, 0)[1])


@pytest.mark.parametrize("from_file", [False, True])
def test_a_test_set_keeps_its_grids(from_file: bool, tmp_path: Path) -> None:
    held_out = make_puzzles(GRIDS[::4], 60, (4, 8), 1, "test")
    write_csv(tmp_path / "test.csv", held_out)
    write_csv(tmp_path / "p.csv", make_puzzles(GRIDS, 300, (1, 10), 3, "file"))
    options = {"path": str(tmp_path / "p.csv")} if from_file else {}
    task = sudoku(test=str(tmp_path / "test.csv"), validation_grids=20, **options)
    assert {e.columns["puzzle"] for e in task.test} <= {p.puzzle for p in held_out}
    assert len(task.test) == 20
    kept = {p.solution for p in held_out}
    assert not answers(task.train) & kept and not answers(task.validation) & kept
    assert not answers(task.train) & answers(task.validation)
    whole = sudoku(test=str(tmp_path / "test.csv"), **{**options, "test_examples": 999})
    assert len(whole.test) == 60
    write_csv(tmp_path / "test.csv", make_puzzles(GRIDS, 5000, (4, 4), 1, "test"))
    with pytest.raises(ValueError, match=r"^test: the puzzles of .* use all of the 288"):
        sudoku(test=str(tmp_path / "test.csv"))


@pytest.mark.parametrize("from_file", [False, True])
def test_validation_puzzles_have_grids_of_their_own(from_file: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train_examples": 300, "test_grids": 40, "validation_grids": 30}
    plain = build_task("sudoku", train_examples=300, test_grids=40)
    if from_file:
        options["path"] = tmp_path / "puzzles.csv"
        grids = all_grids()
        puzzles = make_puzzles(grids, 600, (6, 8), 3, "file")
        write_csv(options["path"], puzzles)
    task = build_task("sudoku", **options, validation_examples=50)
    solutions = [
        {example.columns["solution"] for example in split}
        for split in (task.train, task.validation, task.test)
    ]
    assert all(solutions) and not any(a & b for a, b in itertools.combinations(solutions, 2))
    assert len(task.validation) == 50 and not plain.validation
    if not from_file:
        assert task.test == plain.test


def test_a_file_without_validation_puzzles_is_refused(tmp_path: Path) -> None:
    """Not evaluated on the test puzzles instead."""
    held_out = set(split_grids(40, 0)[1])
    rest = split_grids(40, 0)[0][30:]
    write_csv(tmp_path / "a.csv", make_puzzles([*rest, *held_out], 400, (6, 8), 3, "file"))
    with pytest.raises(ValueError, match=r"none has one of the 30 of the 288 .* for validation"):
        build_task("sudoku", path=str(tmp_path / "a.csv"), test_grids=40, validation_grids=30)


def test_csv_options_are_used(tmp_path: Path) -> None:
    write_csv(tmp_path / "p.csv", make_puzzles(GRIDS, 300, (1, 10), 3, "file"))
    task = sudoku(path=str(tmp_path / "p.csv"), train_examples=7, test_examples=3)
    assert (len(task.train), len(task.test)) == (7, 3)
    task = sudoku(path=str(tmp_path / "p.csv"), empty_cells=[4, 5])
    assert {e.columns["puzzle"].count("0") for e in [*task.train, *task.test]} == {4, 5}


def test_solved_grids_of_a_file_are_no_puzzles(tmp_path: Path) -> None:
    grids = [Puzzle(grid, grid) for grid in GRIDS]
    write_csv(tmp_path / "p.csv", [*grids, *make_puzzles(GRIDS, 100, (4, 4), 0, "file")])
    task = sudoku(path=str(tmp_path / "p.csv"), train_examples=1000, test_examples=1000)
    assert len(task.train) + len(task.test) == 100


def test_csv_in_one_split_is_a_clear_error(tmp_path: Path) -> None:
    train, test = split_grids(48, 0)
    for grids, lacking in ((train, "48 .* for testing"), (test, "240 .* for training")):
        write_csv(tmp_path / "p.csv", make_puzzles(grids, 9, (4, 4), 0, "file"))
        with pytest.raises(
            ValueError, match=rf"^path: of the 9 .*p\.csv .*{lacking}: .*test_grids"
        ):
            sudoku(path=str(tmp_path / "p.csv"))
    write_csv(tmp_path / "p.csv", [])
    with pytest.raises(ValueError, match=r"^path: of the 0 puzzles in .*p\.csv"):
        sudoku(path=str(tmp_path / "p.csv"))


@pytest.mark.parametrize(
    "options",
    [
        {"train_examples": 0},
        {"test_examples": -1},
        {"train_examples": 1.5},
        {"train_examples": "10"},
        {"test_grids": 0},
        {"test_grids": 288},
        {"validation_grids": 240},
        {"validation_grids": -1},
        {"validation_examples": 0},
        {"test_grids": 4.0},
        {"empty_cells": 0},
        {"empty_cells": 13},
        {"empty_cells": [8]},
        {"empty_cells": [4, 6, 8]},
        {"empty_cells": [8, 6]},
        {"empty_cells": [0, 6]},
        {"empty_cells": "8"},
        {"empty_cells": 8.0},
        {"empty_cells": True},
        {"prompt_style": "digit"},
        {"reward": "published"},
        {"skip_bad_rows": 1.5},
        {"skip_bad_rows": True},
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=rf"^{name} "):
        sudoku(**options)


def test_unknown_options_and_tasks_are_named() -> None:
    with pytest.raises(ValueError, match=r"no option 'empty_cell', did you mean 'empty_cells'\?"):
        sudoku(empty_cell=3)
    with pytest.raises(ValueError, match="no option 'name'"):
        sudoku(name="x")
    with pytest.raises(ValueError, match=r"unknown task 'sudoko', did you mean 'sudoku'\?"):
        build_task("sudoko")
    with pytest.raises(ValueError, match="registered already"):
        register_task("sudoku")(sudoku)


@pytest.mark.parametrize("style", ["digits", "instruct"])
def test_prompts_hold_the_puzzle_and_targets_solve_it(style: str) -> None:
    task = sudoku(prompt_style=style)
    assert task.solved is not None
    for example in task.train:
        (message,) = example.prompt
        shown = [line for line in message["content"].split("\n") if line.isdigit()]
        assert "".join(shown) == example.columns["puzzle"]
        assert len(shown) == (1 if style == "digits" else 4)
        assert message["role"] == "user"
        assert example.columns["solution"] not in message["content"].replace("\n", "")
        columns = {name: [value] for name, value in example.columns.items()}
        assert example.target is not None
        sample = {"prompts": [example.prompt], "completions": [example.target], **columns}
        assert task.solved(**sample) == task.rewards[0].function(**sample) == [1.0]


def test_careless_targets_are_the_share_asked_for() -> None:
    answer = "1234341221434321"
    assert careless_solution("1030341200004321") == "1234341212344321"
    assert careless_solution(answer) == answer
    plain, mixed = sudoku(train_examples=400), sudoku(train_examples=400, careless=0.7)
    assert [e.prompt for e in plain.train] == [e.prompt for e in mixed.train]
    assert plain.test == mixed.test
    assert plain.train == sudoku(train_examples=400, careless=0.0).train
    changed = [m for p, m in zip(plain.train, mixed.train, strict=True) if p.target != m.target]
    assert 0.6 < len(changed) / 400 <= 0.75  # now and then the careless answer is right
    for e in changed:
        assert careless_solution(e.columns["puzzle"]) in (e.target or "")
        assert e.columns["solution"] not in (e.target or "")
    with pytest.raises(ValueError, match=r"careless must lie in \[0, 1\], got 1.5"):
        sudoku(careless=1.5)


def example(**columns: Any) -> Example:
    return Example(prompt=[{"role": "user", "content": "?"}], columns=columns)


def reward(name: str = "zero", weight: float = 1.0) -> Reward:
    return Reward(name, lambda completions, **_: [0.0] * len(completions), weight=weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task("t", [], [example()], [reward()]), "no train examples"),
        (lambda: Task("t", [example()], [], [reward()]), "no test examples"),
        (lambda: Task("t", [example()], [example()], [reward()] * 2), "two rewards of one name"),
        (
            lambda: Task("t", [example(a=1)], [example(a=1), example(b=1)], [reward()]),
            r"test example 1 of task t has the columns \['b'\]",
        ),
        (lambda: reward(weight=float("nan")), "weight of reward 'zero'"),
    ],
)
def test_malformed_tasks(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
