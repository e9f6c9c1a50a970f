"""Which grid a completion gives, in every spelling, and what its cells pay."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from egspo.tasks import build_task
from egspo.tasks.sudoku import Puzzle
from egspo.tasks.sudoku_answers import GridRewards, grid_in, tagged_grid

GRID = "1234341221434321"
PUZZLE = "1030040220404001"
WRONG = "".join("2341"[int(digit) - 1] for digit in GRID)
ROWS = [GRID[i : i + 4] for i in range(0, 16, 4)]


def answer(text: str) -> str:
    return f"<answer>{text}</answer>"


@pytest.mark.parametrize(
    ("text", "digits"),
    [
        ("", None),
        ("no digits", None),
        (GRID, GRID),
        ("12 34\n3412", "12343412"),
        (f"The solved 4x4 Sudoku puzzle is:\n{GRID}", GRID),
        (f"The solved 4x4 Sudoku, rows 1-4:\n{GRID[:8]}\n{GRID[8:]}", GRID),
        ("Row 1: {} Row 2: {} Row 3: {} Row 4: {}".format(*ROWS), GRID),
        ("row 1 = {}\nROW 2 = {}\nrow 3 = {}\nrow 4 = {}".format(*map(" ".join, ROWS)), GRID),
        ("R1: {}\nR2: {}\nR3: {}\nR4: {}".format(*map(",".join, ROWS)), GRID),
        ("1. {}\n2. {}\n3. {}\n4. {}".format(*ROWS), GRID),
        ("1: {}\n2: {}\n3: {}\n4: {}".format(*map(" ".join, ROWS)), GRID),
        ("4 rows: {} / {} / {} / {} (16 digits)".format(*ROWS), GRID),
        (f"{WRONG}, no: {GRID}", GRID),
        (f"{PUZZLE}\n{GRID}", GRID),
        (f"{GRID}\n(rows 1-4 of a 4x4 Sudoku)", GRID),
        (f"{GRID}1", GRID + "1"),
        (GRID[:15], GRID[:15]),
        (f"a grid: {GRID[:15]}", None),
        ("4x4, with 1 to 4 in each of 4 rows", None),
        ("١٢٣٤" * 4, None),
        ("１２３４" * 4, None),
        ("²①Ⅳ", None),
    ],
)
def test_the_grid_in_a_text(text: str, digits: str | None) -> None:
    assert grid_in(text) == digits
    assert tagged_grid(answer(text)) == digits
    assert tagged_grid(text) is None


SEPARATORS = ["", " ", ",", ", ", " | ", "|"]
BETWEEN_ROWS = ["\n", "\r\n", " ", " / ", "\n\n", "; ", "],\n [", "\n---+---\n", " |\n| "]
LABELS = ["", "Row {}: ", "row {} ", "R{}: ", "**Row {}:** ", "Line {} - "]
BEFORE = ["", "The solved 4x4 Sudoku puzzle is:\n", "Rows 1 to 4 hold 1, 2, 3 and 4.\nGrid:\n"]
AFTER = ["", "\n", ".", "\nEach row of the 4 has 1 to 4."]
FRAMES = ["{}", "[[{}]]", "```\n{}\n```", "$${}$$", "\\boxed{{{}}}", "| {} |"]


@given(st.text("1234", min_size=16, max_size=16), st.data())
def test_every_spelling_of_a_grid_is_read(grid: str, data: st.DataObject) -> None:
    separator, between = (data.draw(st.sampled_from(x)) for x in (SEPARATORS, BETWEEN_ROWS))
    label = data.draw(st.sampled_from(LABELS))
    rows = [label.format(i + 1) + separator.join(grid[4 * i : 4 * i + 4]) for i in range(4)]
    frame, before, after = (data.draw(st.sampled_from(x)) for x in (FRAMES, BEFORE, AFTER))
    text = frame.format(between.join(rows))
    if not frame.startswith("\\boxed"):
        text = before + text + after
    assert tagged_grid(f"Think: 4x4, {WRONG}.\n{answer(text)} 12") == grid


@pytest.mark.parametrize(
    ("completion", "digits"),
    [
        (f"4x4, so 1 and 2: {answer(GRID)} 99", GRID),
        (answer("1111") + answer(GRID), GRID),
        (answer(GRID) + answer(""), GRID),
        (f"<answer>12<answer>{GRID}</answer></answer>", GRID),
        (f"12 <answer>{GRID}", None),
        (f"{GRID}</answer>", None),
        (GRID, None),
    ],
)
def test_answers_are_in_closed_tags(completion: str, digits: str | None) -> None:
    assert tagged_grid(completion) == digits


def paid(completion: str, reward: str, style: str = "digits") -> tuple[float, float]:
    options = {"train_examples": 1, "test_examples": 1, "prompt_style": style, "reward": reward}
    task = build_task("sudoku", **options)
    columns = {"puzzle": [PUZZLE], "solution": [GRID]}
    assert task.solved is not None
    (cells,) = task.rewards[0].function(prompts=[[]], completions=[completion], **columns)
    (whole,) = task.solved(prompts=[[]], completions=[completion], **columns)
    return cells, whole


@pytest.mark.parametrize(
    ("completion", "strict", "published", "whole"),
    [
        (GRID, 1, 1, 1),
        ("\n".join(ROWS), 1, 1, 1),
        (WRONG, 0, 0, 0),
        ("", 0, 0, 0),
        (PUZZLE, 0, 0, 0),
        # A clue that is not kept is a wrong cell, whatever it becomes: 0, another digit, nothing.
        ("2" + GRID[1:], 8 / 9, 1, 0),
        ("0" + GRID[1:], 8 / 9, 1, 0),
        (GRID[:15], 8 / 9, 1, 0),
        (GRID[:8], 4 / 12, 4 / 8, 0),
        ("1" * 16, 2 / 14, 2 / 8, 0),
        ("1234" * 4, 2 / 14, 2 / 8, 0),
        # 17 digits are no grid.
        (GRID + "1", 0, 1, 0),
        ("0" + GRID, 0, 0, 0),
    ],
)
def test_what_cells_pay(completion: str, strict: float, published: float, whole: float) -> None:
    for style, text in (("digits", completion), ("instruct", answer(completion))):
        assert paid(text, "strict", style) == (pytest.approx(strict), whole)
        assert paid(text, "empty_cells", style) == (pytest.approx(published), whole)


def test_the_sample_of_a_run_that_overwrote_clues() -> None:
    pay = GridRewards(grid_in, "strict").cell_accuracy
    published = GridRewards(grid_in, "empty_cells").cell_accuracy
    puzzle, completion = "0124000324010042", "3324421324311342"
    columns = {"puzzle": [puzzle], "solution": ["3124421324311342"]}
    assert published([completion], **columns) == [1.0]
    assert pay([completion], **columns) == [7 / 8]


@pytest.mark.parametrize("text", ["A 4x4 grid uses the digits 1-4: 1, 2, 3, 4.", GRID, "4 4 4"])
def test_a_text_without_an_answer_pays_nothing(text: str) -> None:
    assert paid(text, "strict", "instruct") == paid(text, "empty_cells", "instruct") == (0, 0)


cells = st.sampled_from([*"01234", "", "5"])


@given(st.lists(cells, min_size=16, max_size=16), st.randoms(use_true_random=False))
def test_the_strict_reward_is_whole_for_the_solution_alone(given: list[str], rng: Any) -> None:
    mixed = "".join(rng.choice([GRID[i], GRID[i], given[i]]) for i in range(16))
    for text in ("".join(given), mixed):
        pay, solved = GridRewards(grid_in, "strict"), [float(text == GRID)]
        columns = {"puzzle": [PUZZLE], "solution": [GRID]}
        (value,) = pay.cell_accuracy([text], **columns)
        (published,) = GridRewards(grid_in, "empty_cells").cell_accuracy([text], **columns)
        assert 0.0 <= value <= published <= 1.0
        assert pay.solved([text], **columns) == solved == [float(value == 1.0)]
        # Keeping the clues never pays less.
        kept = "".join(
            p if p != "0" else t for p, t in zip(PUZZLE, text.ljust(16, "5"), strict=True)
        )
        if len(text) == 16:
            assert pay.cell_accuracy([kept], **columns)[0] >= value


@given(st.text())
def test_any_text_is_paid_in_range(completion: str) -> None:
    for reward in ("strict", "empty_cells"):
        pay = GridRewards(tagged_grid, reward)
        columns = {"puzzle": PUZZLE, "solution": GRID}
        (value,) = pay.cell_accuracy([completion], [PUZZLE], [GRID])
        assert 0.0 <= value <= 1.0
        assert pay.explain(completion, **columns)


@pytest.mark.parametrize(
    "text",
    ["1", "1 ", "a1", "<answer>", "</answer>", "<answer>1", "é", "<", "row 1", "\n1.", "r #"],
)
def test_a_megabyte_is_scored_in_linear_time(text: str) -> None:
    completion = answer(text * (10**6 // len(text)))
    start = time.process_time()
    (value,) = GridRewards(tagged_grid, "strict").cell_accuracy([completion], [PUZZLE], [GRID])
    # About 0.3 s; anything quadratic takes minutes.
    assert time.process_time() - start < 2.0
    assert value < 1.0


def test_scores_follow_the_batch() -> None:
    pay = GridRewards(grid_in, "strict")
    columns = {"puzzle": [PUZZLE] * 3, "solution": [GRID] * 3}
    assert pay.cell_accuracy([GRID, WRONG, GRID], **columns, other=[1, 2, 3]) == [1.0, 0.0, 1.0]
    assert pay.solved([GRID, WRONG, ""], **columns, other=[1, 2, 3]) == [1.0, 0.0, 0.0]
    assert pay.cell_accuracy([], [], []) == pay.solved([], []) == []


def test_why() -> None:
    pay, columns = GridRewards(grid_in, "strict"), {"puzzle": PUZZLE, "solution": GRID}
    assert pay.explain(GRID, **columns) == "8 of 8 empty cells are right"
    assert pay.explain("2" + GRID[1:], **columns).endswith("1 clues are not kept (cells 1)")
    assert pay.explain("", **columns) == "no grid found"
    assert pay.explain(GRID + "1", **columns) == "17 digits are no grid"
    assert Puzzle(PUZZLE, GRID).empty == [1, 3, 4, 6, 9, 11, 13, 14]
