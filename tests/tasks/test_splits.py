"""Splits by normalised question: nothing leaks, whatever the order of the file."""

from __future__ import annotations

import json
import logging
import random
import re
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from egspo.tasks.columns import ColumnNames
from egspo.tasks.rows import check_share, read_rows
from egspo.tasks.splits import load_splits, normalise, split_off, without

QUESTIONS = [f"Tom has {i} apples; how many?" for i in range(40)]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Tom has 1,000 apples.", "tom has 1000 apples"),
        ("1,234,567.50", "1234567.5"),
        ("2.50 + 3.0", "2.5+3"),
        ("x − 5 × 2", "x-5*2"),
        ("What’s “this”?", 'Whats "this"'.replace("Whats", "What's")),
        ("twenty-one", "twenty one"),
        ("ＡＢＣ　１２", "abc 12"),
        ("٣ + ٤", "3+4"),
        ("a\u200bb\u00ad c\n\td", "ab c d"),
        ("½", "1/2"),
        ("Straße", "STRASSE"),
        ("$5 or €5", "5 or 5"),
    ],
)
def test_the_same_question(a: str, b: str) -> None:
    assert normalise(a) == normalise(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("x+2", "x-2"),
        ("3*4", "3/4"),
        ("5", "-5"),
        ("1.5", "15"),
        ("1.05", "1.5"),
        ("100", "1"),
        ("x^2", "x_2"),
        ("5%", "5"),
        ("a = b", "a < b"),
        ("中", "文"),
        ("1, 234", "1234"),
    ],
)
def test_another_question(a: str, b: str) -> None:
    assert normalise(a) != normalise(b)


@given(st.text())
def test_normalising_is_idempotent(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize("text", ["9", "9.", "1,000", " ", " + ", "-", "a-", ".", "\u0301", "é"])
def test_normalising_takes_linear_time(text: str) -> None:
    huge = text * (1_000_000 // len(text))
    start = time.process_time()
    normalise(huge)
    assert time.process_time() - start < 3.0


def test_split_off_by_key() -> None:
    rows = [f"{spelling} {q}" for q in QUESTIONS for spelling in ("", " ")]
    kept, taken = split_off(rows, 10, key=normalise, seed=0)
    assert len(taken) == 20
    assert sorted(kept + taken) == sorted(rows)
    assert kept == [row for row in rows if row in set(kept)]
    assert not {normalise(row) for row in kept} & {normalise(row) for row in taken}
    assert split_off(rows, 10, key=normalise, seed=1)[1] != taken
    assert split_off(rows, 0, key=normalise, seed=0) == (rows, [])


def test_a_split_does_not_depend_on_the_order() -> None:
    kept, taken = split_off(QUESTIONS, 10, key=normalise, seed=3)
    shuffled = random.Random(0).sample(QUESTIONS, len(QUESTIONS))
    kept_again, taken_again = split_off(shuffled, 10, key=normalise, seed=3)
    assert taken_again == taken
    assert sorted(kept_again) == sorted(kept)
    # Nor much on what else is there.
    _, fewer = split_off(QUESTIONS[1:], 10, key=normalise, seed=3)
    assert len(set(fewer) & set(taken)) >= 9


@pytest.mark.parametrize("count", [40, 41, -1])
def test_a_split_that_leaves_nothing(count: int) -> None:
    with pytest.raises(ValueError, match="cannot hold out"):
        split_off(QUESTIONS, count, key=normalise, seed=0)


def test_without() -> None:
    assert without(["a b", "C!", "d"], ["c", "A  B"], key=normalise) == ["d"]


def write(path: Path, questions: list[str]) -> str:
    path.write_text("".join(json.dumps({"q": q}) + "\n" for q in questions))
    return str(path)


def load(train: str, test: str | None, **options: Any) -> list[list[str]]:
    splits = load_splits(train, test, {"q": str}, key=lambda row: normalise(row["q"]), **options)
    return [[row["q"] for row in rows] for rows in (splits.train, splits.validation, splits.test)]


def test_splits_of_two_sources(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = write(tmp_path / "train.jsonl", QUESTIONS)
    test = write(tmp_path / "test.jsonl", [QUESTIONS[0].upper(), "Another?"])
    rows, validation, held_out = load(train, test, validation_examples=5, test_examples=1)
    assert (len(rows), len(validation), len(held_out)) == (34, 5, 1)
    assert sorted(rows + validation) == sorted(QUESTIONS[1:])
    assert "1 of 40 rows" in caplog.text


def test_splits_of_one_source(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", QUESTIONS)
    sizes = {"validation_examples": 5, "test_examples": 8}
    parts = load(train, None, **sizes)
    assert [len(part) for part in parts] == [27, 5, 8]
    assert sorted(parts[0] + parts[1] + parts[2]) == sorted(QUESTIONS)
    again = write(tmp_path / "b.jsonl", QUESTIONS[::-1])
    assert load(again, None, **sizes)[1:] == parts[1:]
    few, *others = load(train, None, train_examples=3, **sizes)
    assert others == parts[1:]
    assert len(few) == 3
    assert set(few) < set(parts[0])
    assert load(again, None, train_examples=3, **sizes)[0] == few


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "test_examples says how many"),
        ({"test_examples": 40}, "a.jsonl: cannot hold out 40 of 40"),
        ({"test_examples": 1, "validation_examples": 39}, "cannot hold out 39 of 39"),
        ({"test_examples": 0}, "test_examples must be a whole number >= 1, got 0"),
        ({"test_examples": True}, "test_examples must be .* got True"),
        ({"validation_examples": -1}, "validation_examples must be .* >= 0, got -1"),
        ({"train_examples": 1.5}, "train_examples must be .* got 1.5"),
        ({"test_examples": 1, "keep": lambda row: False}, "none of its 40 rows"),
    ],
)
def test_bad_splits(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    train = write(tmp_path / "a.jsonl", QUESTIONS)
    with pytest.raises(ValueError, match=message):
        load(train, None, **options)


COLUMNS = {"q": str, "n": int}


def rows(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def positive(row: dict[str, Any]) -> dict[str, Any]:
    if row["n"] < 0:
        raise ValueError(f"n is {row['n']}, which is negative")
    return {**row, "n": row["n"] * 10}


def test_rows_are_read_by_the_names_of_the_file(tmp_path: Path) -> None:
    theirs = rows(tmp_path / "a.jsonl", [{"question": "A?", "n": 1, "more": "x"}])
    ours = rows(tmp_path / "b.jsonl", [{"q": "B?", "n": 2}])
    names = ColumnNames({"q": "question"}, COLUMNS)
    assert read_rows(theirs, COLUMNS, names=names) == [{"q": "A?", "n": 1}]
    names.check_used()
    assert read_rows(ours, COLUMNS, names=names) == [{"q": "B?", "n": 2}]
    unused = ColumnNames({"q": "problem"}, COLUMNS)
    assert read_rows(ours, COLUMNS, names=unused) == [{"q": "B?", "n": 2}]
    with pytest.raises(ValueError, match="no data has the column 'problem', which 'q' stands for"):
        unused.check_used()
    with pytest.raises(ValueError, match=r"lacks the column 'q'; it has .* the option `columns`"):
        read_rows(theirs, COLUMNS, names=unused)
    text = tmp_path / "a.csv"
    text.write_text("question,n\n007,1\n")
    assert read_rows(str(text), COLUMNS, names=names) == [{"q": "007", "n": 1}]


def test_wrong_rows_are_counted_and_left_out_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records: list[dict[str, Any]] = [{"q": f"{i}?", "n": i} for i in range(8)]
    file = rows(tmp_path / "a.jsonl", [*records, {"q": "x", "n": -1}, {"q": None, "n": 3}])
    count = r"2 of 10 rows are wrong \(rows 8, 9\)"
    with pytest.raises(ValueError, match=rf"a\.jsonl, row 8: n is -1.* {count}; skip_bad_rows"):
        read_rows(file, COLUMNS, read=positive)
    with pytest.raises(ValueError, match=rf"{count}; skip_bad_rows allows a share of 0\.1"):
        read_rows(file, COLUMNS, read=positive, skip_bad_rows=0.1)
    with caplog.at_level(logging.WARNING, "egspo"):
        kept = read_rows(file, COLUMNS, read=positive, skip_bad_rows=0.2)
    assert [row["n"] for row in kept] == [i * 10 for i in range(8)]
    assert re.search(rf"{count} are left out: .*row 8: n is -1", caplog.text)
    with pytest.raises(ValueError, match="10 of 10 rows"):
        read_rows(file, {"q": int, "n": int}, skip_bad_rows=1.0)


@pytest.mark.parametrize("share", [-0.1, 1.1, "0.1", True, None])
def test_a_share_is_a_number(share: object) -> None:
    with pytest.raises(ValueError, match="skip_bad_rows is the share"):
        check_share(share)


@pytest.mark.parametrize("ending", ["\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_marks_are_no_text(tmp_path: Path, ending: str, mark: str) -> None:
    wanted = [{"q": "a\nb", "n": 1}]
    line = json.dumps({"q": f"a{ending}b", "n": 1})
    for name, text in (
        ("a.jsonl", f"{mark}{line}\r\n"),
        ("a.json", f"{mark}[{line}]"),
        ("a.csv", f'{mark}q,n\r\n"a{ending}b",1\r\n'),
    ):
        (tmp_path / name).write_bytes(text.encode())
        assert read_rows(str(tmp_path / name), COLUMNS) == wanted
    datasets.Dataset.from_list([json.loads(line)]).to_parquet(str(tmp_path / "a.parquet"))
    assert read_rows(str(tmp_path / "a.parquet"), COLUMNS) == wanted
