"""The table of an evaluation."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from egspo.evaluations.intervals import Interval
from egspo.evaluations.summary import SummaryRow, cells, to_table


@pytest.mark.parametrize("width", [60, 80])
def test_no_number_is_cut_in_a_narrow_terminal(width: int) -> None:
    row = SummaryRow(
        task="sudoku",
        max_new_tokens=16,
        steps=8,
        prompts=8,
        samples=8,
        metric="solved",
        score=0.125,
        interval=Interval(0.022, 0.471, "wilson"),
        rewards={"reward": 0.292},
        mean_tokens=16.0,
        mean_steps=7.5,
        unfinished=0,
        unscored=0,
        metrics={"published": 0.289},
    )
    stream = io.StringIO()
    Console(file=stream, width=width).print(to_table([row], "model"))
    shown = sorted(stream.getvalue())
    for cell in (*cells(row), "28.9 %"):
        for character in cell.replace(" ", ""):
            shown.remove(character)  # ValueError where it is missing
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
