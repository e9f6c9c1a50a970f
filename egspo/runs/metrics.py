"""Metrics of a run: one JSON object per line and step, safe against a kill at any moment.

Names have the form ``group/name``. What depends on the machine begins with ``time/`` (seconds),
``speed/`` or ``memory/`` (bytes); the rest of a record is a function of recipe and seed. JSON has
no NaN and no infinity: such values, and those that do not apply, are ``null``.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from egspo.files import naming, replacing

logger = logging.getLogger("egspo")

_STEPS = 2**53
"""No run has more: beyond, not every step is a float, as plots need it."""
_CLOCK = ("time/", "speed/", "memory/")


class MetricsWriter:
    """Appends records to a file, each on disk before :meth:`write` returns.

    Args:
        path: JSONL file; None writes nothing (processes other than the main one).
        resume_after: keep the lines of an earlier run up to this step; None keeps none. Lines not
            kept, and those torn by a kill or damaged, are moved to ``<name>.dropped.jsonl`` beside
            it.
        history: the file of the run that is resumed, where that is another one: its lines up to
            ``resume_after`` come first, if there is no file at ``path`` yet.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        resume_after: int | None = None,
        history: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self._kept: set[int] = set()
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        last_step = -1 if resume_after is None else resume_after
        if self.path.exists():
            kept, dropped = self._split(self.path, last_step)
            if dropped:
                _append(self.path.with_suffix(".dropped.jsonl"), dropped)
            _replace(self.path, kept)
        elif history is not None and Path(history).exists():
            _replace(self.path, self._split(Path(history), last_step)[0])

    def warn_of_missing(self, expected: Iterable[int]) -> None:
        """Say in the log which steps of the run that is resumed have no record any more."""
        missing = [step for step in expected if step not in self._kept]
        if missing and self.path is not None:
            logger.warning(
                "%s has no record of %d earlier steps (the first is %d, the last %d): it was "
                "deleted, cut or damaged. The run goes on from its checkpoint; its curves have a "
                "hole there",
                *(self.path, len(missing), missing[0], missing[-1]),
            )

    def _split(self, path: Path, last_step: int) -> tuple[list[str], list[str]]:
        """The lines of steps up to ``last_step``, and the others, damaged ones among them."""
        kept: list[str] = []
        dropped: list[str] = []
        lines = _lines(path)
        for number, (line, record) in enumerate(lines, start=1):
            if record is not None and record["step"] <= last_step:
                kept.append(line)
                self._kept.add(record["step"])
            else:
                dropped.append(line)
            if record is None and number < len(lines):
                logger.warning("%s, line %d is damaged and set aside: %.80r", path, number, line)
        return kept, dropped

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
    lines = _lines(file)
    for number, (line, record) in enumerate(lines[:-1], start=1):
        if record is None:
            raise ValueError(f"{file}, line {number} is not a record with a step: {line[:80]!r}")
    return [record for _, record in lines if record is not None]


def deterministic(record: Mapping[str, Any]) -> dict[str, Any]:
    """``record`` without what depends on the clock."""
    return {name: value for name, value in record.items() if not name.startswith(_CLOCK)}


def _replace(path: Path, lines: Iterable[str]) -> None:
    with replacing(path) as temporary:
        _append(temporary, lines)


def _lines(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """Every line with its record, None for one that is none."""
    text = path.read_text("utf-8", errors="replace")
    return [(line, _parse(line)) for line in text.split("\n") if line]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    sound = 0 <= record["step"] < _STEPS and all(map(_is_value, record, record.values()))
    return record if sound else None


def _is_value(name: str, value: Any) -> bool:
    """Whether a metric called ``name`` can be ``value``."""
    if isinstance(value, list):
        return name.endswith("histogram")
    return value is None or isinstance(value, int | float)


def _append(path: Path, lines: Iterable[str]) -> None:
    with naming(path), path.open("a", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
