"""Rows of a data set as a task needs them: checked, and bad ones counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from egspo.tasks.columns import ColumnNames
from egspo.tasks.data import Row, checked, raw_rows

logger = logging.getLogger("egspo")

_SHOWN = 5


def check_share(skip_bad_rows: object) -> float:
    """The option ``skip_bad_rows``; raises ValueError if it is no share."""
    number = isinstance(skip_bad_rows, int | float) and not isinstance(skip_bad_rows, bool)
    if not number or not 0.0 <= float(skip_bad_rows) <= 1.0:  # type: ignore[arg-type]
        raise ValueError(
            "skip_bad_rows is the share of the rows that may be left out because they are wrong, "
            f"a number in [0, 1], got {skip_bad_rows!r}"
        )
    return float(skip_bad_rows)  # type: ignore[arg-type]


def read_rows(
    source: str,
    columns: Mapping[str, Any],
    *,
    names: ColumnNames | None = None,
    read: Callable[[Row], Row] = lambda row: row,
    skip_bad_rows: float = 0.0,
) -> list[Row]:
    """The good rows of a source.

    Args:
        source, columns: as for :func:`egspo.tasks.data.load_rows`, by the task's own names.
        names: what the columns are called in the source.
        read: makes of a row what the task needs; raises ValueError for one that is wrong.
        skip_bad_rows: share of the rows that may be wrong; they are left out, counted and named.

    Raises:
        OSError, ValueError: as ``load_rows``; or more rows are wrong, the first of which is named.
    """
    rows = raw_rows(source, columns, names)
    good: list[Row] = []
    bad: dict[int, str] = {}
    for number, row in enumerate(rows):
        try:
            good.append(read(checked(row, columns)))
        except ValueError as error:
            bad[number] = str(error)
    report_bad(source, bad, len(rows), skip_bad_rows, unit="row")
    return good


def checking(build: Callable[[Row], object]) -> Callable[[Row], Row]:
    """For :func:`read_rows`: the row as it is, if ``build`` raises no ValueError for it."""

    def read(row: Row) -> Row:
        build(row)
        return row

    return read


def report_bad(
    source: str, bad: Mapping[int, str], total: int, skip_bad_rows: float, *, unit: str
) -> None:
    """Say which rows of a source are left out.

    Args:
        source: its name.
        bad: what is wrong, by row.
        total: how many rows there are.
        skip_bad_rows: share that may be left out.
        unit: what a row is called.

    Raises:
        ValueError: more rows are wrong than may be left out, or all are.
    """
    if not bad:
        return
    first = min(bad)
    problem = f"{source}, {unit} {first}: {bad[first]}"
    count = f"{len(bad)} of {total} rows are wrong ({unit}s {_listed(sorted(bad))})"
    if len(bad) > skip_bad_rows * total or len(bad) == total:
        hint = (
            "skip_bad_rows: SHARE leaves so many out"
            if not skip_bad_rows
            else (f"skip_bad_rows allows a share of {skip_bad_rows:g}")
        )
        raise ValueError(f"{problem}. {count}; {hint}")
    logger.warning("%s are left out: %s", count, problem)


def _listed(numbers: Sequence[int]) -> str:
    more = len(numbers) - _SHOWN
    return ", ".join(map(str, numbers[:_SHOWN])) + (f" and {more} more" if more > 0 else "")
