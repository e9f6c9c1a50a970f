"""Splits that leak nothing: rows that ask the same question never end up on two sides.

Two questions are the same if they are equal after :func:`normalise`. Which side a question is on
depends on the seed and the question alone: not on the order of the file, nor on other rows that
come or go (but for the few at the border).
"""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from egspo.tasks.columns import ColumnNames
from egspo.tasks.data import Row
from egspo.tasks.rows import check_share, read_rows

T = TypeVar("T")

logger = logging.getLogger("egspo")

_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
# Matches at every number's start, whether or not it has a fraction: linear on endless digits.
_NUMBER = re.compile(r"(?<![0-9])[0-9]+(?:\.[0-9]+)?")
_LONE_POINT = re.compile(r"(?<![0-9])\.|\.(?![0-9])")
_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
_AROUND_OPERATOR = re.compile(r" ?([-+*/^=<>%_|~]) ?")
_MEANINGFUL = set("+-*/^=<>%_|~.,")
_ASCII = {"\u2212": "-", "\u00d7": "*", "\u00f7": "/", "\u2044": "/"}


class _Characters(dict[int, str]):
    """For ``str.translate``: what to make of a character, decided when it is first seen."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Nd":
            kept = str(unicodedata.decimal(character))
        elif category[0] in "LMN" or character in _MEANINGFUL:
            kept = character
        elif category == "Sm":  # mathematical
            kept = _ASCII.get(character, character)
        else:
            kept = "" if category == "Cf" else " "
        self[code] = kept
        return kept


_CHARACTERS = _Characters()


def normalise(question: str) -> str:
    """What two spellings of one question have in common; linear in the length.

    * Unicode: NFKC, case folded, invisible characters (category Cf) dropped;
    * white space: one space between words, none around ``+ - * / ^ = < > %``;
    * numbers: digits of all scripts as ASCII, without thousands commas (``1,000`` is ``1000``) and
      without the zeros at the end of a fraction (``2.50`` is ``2.5``, ``3.0`` is ``3``);
    * punctuation and symbols are dropped, but for the mathematical ones, which tell questions
      apart; a hyphen inside a word is a space.

    Rather too much alike than too little: of two questions that differ in punctuation only, a split
    keeps both on one side.
    """
    text = unicodedata.normalize("NFKC", question).casefold()
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    text = _THOUSANDS.sub("", text).replace(",", " ")
    text = _NUMBER.sub(_plain_number, text)
    text = _HYPHEN.sub(" ", _LONE_POINT.sub(" ", text))
    return _AROUND_OPERATOR.sub(r"\1", " ".join(text.split())).strip()


def _plain_number(match: re.Match[str]) -> str:
    number = match[0]
    return number.rstrip("0").rstrip(".") if "." in number else number


def split_off(
    rows: Sequence[T], count: int, *, key: Callable[[T], str], seed: int
) -> tuple[list[T], list[T]]:
    """The rows that stay, in their order; and those of ``count`` distinct keys, shuffled.

    Args:
        rows: to divide.
        count: how many keys to take, >= 0; all rows of a key are on the same side.
        key: :func:`normalise` of the question, or what else must not be on both sides.
        seed: of the choice and of the order of what is taken.

    Raises:
        ValueError: there are not more than ``count`` keys.
    """
    if count < 0:
        raise ValueError(f"cannot hold out {count} examples")
    keys = [key(row) for row in rows]
    distinct = set(keys)
    if count >= len(distinct):
        raise ValueError(
            f"cannot hold out {count} of {len(distinct)} distinct questions ({len(rows)} rows): "
            "at least one must stay for training"
        )
    ranked = sorted(distinct, key=lambda text: (_rank(text, seed), text))
    place = {text: index for index, text in enumerate(ranked[:count])}
    kept = [row for row, text in zip(rows, keys, strict=True) if text not in place]
    taken = [(place[text], row) for row, text in zip(rows, keys, strict=True) if text in place]
    return kept, [row for _, row in sorted(taken, key=lambda pair: pair[0])]


def without(rows: Sequence[T], others: Sequence[T], *, key: Callable[[T], str]) -> list[T]:
    """``rows``, but for those whose key is one of ``others``."""
    taken = {key(row) for row in others}
    return [row for row in rows if key(row) not in taken]


@dataclass(frozen=True)
class Splits:
    """Rows of a data set. No question is in two of them."""

    train: list[Row]
    validation: list[Row]
    """For choosing checkpoints, so that the test split stays unseen until the end."""
    test: list[Row]


def load_splits(
    train: str,
    test: str | None,
    columns: Mapping[str, Any],
    *,
    key: Callable[[Row], str],
    read: Callable[[Row], Row] = lambda row: row,
    keep: Callable[[Row], bool] | None = None,
    names: ColumnNames | None = None,
    skip_bad_rows: float = 0.0,
    train_examples: int | None = None,
    validation_examples: int = 128,
    test_examples: int | None = None,
    seed: int = 0,
) -> Splits:
    """Rows for training, validation and test.

    Validation rows are taken out of the training source, as are test rows where there is no test
    source. Training rows that ask a question of the test source are left out, and counted in the
    log.

    Args:
        train, test: sources as :func:`egspo.tasks.data.load_rows` takes them.
        columns: those to read, with their types.
        key: as for :func:`split_off`.
        read, names, skip_bad_rows: as for :func:`egspo.tasks.rows.read_rows`.
        keep: rows for which it is false are not used.
        train_examples, test_examples: at most so many, drawn by ``seed``; None for all.
        validation_examples: distinct questions to validate on; 0 for none.
        seed: independent of the training seed.

    Raises:
        OSError, ValueError: as :func:`egspo.tasks.rows.read_rows` and :func:`split_off`.
    """
    for name, count, least in (
        ("train_examples", train_examples, 1),
        ("test_examples", test_examples, 1),
        ("validation_examples", validation_examples, 0),
    ):
        if count is not None and (type(count) is not int or count < least):
            raise ValueError(f"{name} must be a whole number >= {least}, got {count!r}")
    skip_bad_rows = check_share(skip_bad_rows)

    def kept(source: str) -> list[Row]:
        rows = read_rows(source, columns, names=names, read=read, skip_bad_rows=skip_bad_rows)
        chosen = rows if keep is None else [row for row in rows if keep(row)]
        if not chosen:
            raise ValueError(f"{source}: none of its {len(rows)} rows is of the kind asked for")
        return chosen

    rows, test_rows = kept(train), [] if test is None else kept(test)
    if names is not None:
        names.check_used()
    try:
        if test is not None:
            disjoint = without(rows, test_rows, key=key)
            if len(disjoint) < len(rows):
                logger.warning(
                    "%d of %d rows of %s are left out: their questions are in %s",
                    *(len(rows) - len(disjoint), len(rows), train, test),
                )
            if not disjoint:
                raise ValueError(f"all of its questions are in {test} as well")
            rows, test_rows = disjoint, sample(test_rows, test_examples, key, seed)
        elif test_examples is None:
            raise ValueError("without test data (test), test_examples says how many to hold out")
        else:
            rows, test_rows = split_off(rows, test_examples, key=key, seed=seed)
        rows, validation = split_off(rows, validation_examples, key=key, seed=seed)
    except ValueError as error:
        raise ValueError(f"{train}: {error}") from error
    return Splits(sample(rows, train_examples, key, seed), validation, test_rows)


def sample(rows: Sequence[T], count: int | None, key: Callable[[T], str], seed: int) -> list[T]:
    """At most ``count`` rows, which ones and in which order independent of the file's."""
    if count is None or count >= len(rows):
        return list(rows)
    return sorted(rows, key=lambda row: (_rank(key(row), seed), key(row)))[:count]


def _rank(text: str, seed: int) -> bytes:
    content = f"{seed}:{text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=8).digest()
