"""Samples of an evaluation on disk: a JSON line each, safe against a kill at any moment.

Every process appends to a part of its own; the main process joins the parts before and after.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from egspo.files import naming, replacing

Record = dict[str, Any]


class SampleFile:
    """The samples of a task at one length: ``NAME.jsonl``, and while it runs ``NAME.part-N.jsonl``.

    A sample is known by its ``index``, the place of its prompt, and ``sample``, which of the
    completions of that prompt it is.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.jsonl"
        self._parts = f"{name}.part-*.jsonl"

    def part(self, process: int) -> Path:
        return self.path.with_name(self._parts.replace("*", str(process)))

    def append(self, process: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Add samples, on disk before this returns."""
        part = self.part(process)
        with naming(part), part.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
            stream.flush()
            os.fsync(stream.fileno())

    def join(self) -> None:
        """Bring all parts into one file, in the order of the prompts; torn last lines are dropped.

        Raises:
            ValueError: another line than the last is no sample.
        """
        parts = sorted(self.path.parent.glob(self._parts))
        if not parts:
            return
        known = {
            (record["index"], record["sample"]): record
            for file in (self.path, *parts)
            for record in _read(file)
        }
        with replacing(self.path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            for key in sorted(known):
                stream.write(json.dumps(known[key], allow_nan=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        for part in parts:
            part.unlink()

    def read(self) -> list[Record]:
        """The samples that :meth:`join` has brought together."""
        return _read(self.path)


def _read(file: Path) -> list[Record]:
    """Every sample of the file; none if there is no file."""
    if not file.is_file():
        return []
    lines = file.read_text("utf-8", errors="replace").split("\n")
    # What follows the last line break, if anything, was cut short.
    return [_parse(line, number, file) for number, line in enumerate(lines[:-1], start=1)]


def _is_sample(record: Any) -> bool:
    """Whether all that is counted is there and can be."""
    if not isinstance(record, dict) or not isinstance(record.get("rewards"), dict):
        return False
    counts = [record.get(name) for name in ("index", "sample", "tokens", "steps")]
    score = record.get("score", "missing")
    values = [*record["rewards"].values(), *([] if score is None else [score])]
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
        and isinstance(record.get("finish_reason"), str)
    )


def _parse(line: str, number: int, file: Path) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not _is_sample(record):
        raise ValueError(f"{file}, line {number} is no sample of an evaluation: {line[:80]!r}")
    return dict(record)
