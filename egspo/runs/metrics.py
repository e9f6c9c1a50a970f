"""Metrics of a run: one JSON object per line and step, safe against a kill at any moment.

Names have the form ``group/name``. What depends on the machine begins with ``time/`` (seconds),
``speed/`` or ``memory/`` (bytes); the rest of a record is a function of recipe and seed. JSON has
no NaN and no infinity: such values, and those that do not apply, are ``null``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from egspo.files import replacing

_CLOCK = ("time/", "speed/", "memory/")


class MetricsWriter:
    """Appends records to a file, each on disk before :meth:`write` returns.

    Args:
        path: JSONL file; None writes nothing (processes other than the main one).
        resume_after: keep the lines of an earlier run up to this step; None keeps none. Lines not
            kept, and a last line torn by a kill, are moved to ``<name>.dropped.jsonl`` beside it.
        history: the file of the run that is resumed, where that is another one: its lines up to
            ``resume_after`` come first, if there is no file at ``path`` yet.

    Raises:
        ValueError: an earlier file has an invalid line other than its last.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        resume_after: int | None = None,
        history: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        last_step = -1 if resume_after is None else resume_after
        if self.path.exists():
            kept, dropped = _split(self.path, last_step)
            if dropped:
                _append(self.path.with_suffix(".dropped.jsonl"), dropped)
            _replace(self.path, kept)
        elif history is not None and Path(history).exists():
            _replace(self.path, _split(Path(history), last_step)[0])

    def write(self, record: Mapping[str, Any]) -> None:
        """Append ``record``; raises ValueError without an integer ``step`` of at least 0."""
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"a record needs an integer step >= 0, got {step!r}")
        if self.path is not None:
            _append(self.path, [json.dumps(_finite(record), allow_nan=False)])


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics file, or of the run in a folder; a torn last line is left out.

    Raises:
        FileNotFoundError: there are no metrics.
        ValueError: another line than the last is invalid.
    """
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no metrics at {file}: is {path} the output_dir of a run?")
    return [record for _, record in _lines(file) if record is not None]


def deterministic(record: Mapping[str, Any]) -> dict[str, Any]:
    """``record`` without what depends on the clock."""
    return {name: value for name, value in record.items() if not name.startswith(_CLOCK)}


def _split(path: Path, last_step: int) -> tuple[list[str], list[str]]:
    """The lines of steps up to ``last_step``, and the others."""
    kept: list[str] = []
    dropped: list[str] = []
    for line, record in _lines(path):
        (kept if record is not None and record["step"] <= last_step else dropped).append(line)
    return kept, dropped


def _replace(path: Path, lines: Iterable[str]) -> None:
    with replacing(path) as temporary:
        temporary.unlink(missing_ok=True)
        _append(temporary, lines)


def _lines(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """Every line with its record, None for a torn last line."""
    text = path.read_text("utf-8", errors="replace")
    lines = [line for line in text.split("\n") if line]
    parsed = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None and number < len(lines):
            raise ValueError(f"{path}, line {number} is not a record with a step: {line[:80]!r}")
        parsed.append((line, record))
    return parsed


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _append(path: Path, lines: Iterable[str]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
