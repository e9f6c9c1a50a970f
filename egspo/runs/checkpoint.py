"""Atomic checkpoints: a folder appears under its name only when all of it is on disk."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from egspo.files import CheckpointError, partial_path
from egspo.runs.published import (
    MANIFEST,
    clear,
    is_intact,
    publish,
    verify_published,
)

logger = logging.getLogger("egspo")

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds them."""
_PREFIX = "step-"


def save_checkpoint(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep_last: int,
    keep: int | None = None,
) -> Path:
    """Write ``folder/step-<step>`` and delete all but the newest ``keep_last`` and ``keep``.

    Args:
        folder: parent of the checkpoints.
        step: training step the state belongs to.
        write: called with an empty folder, puts the files there.
        keep_last: checkpoints to keep, this one included.
        keep: step of one that is kept besides, and does not count.

    A kill at any moment leaves either the old checkpoints or the old and the new one: the files
    are written elsewhere, synced, and renamed. An intact checkpoint of the step is left as it is.
    """
    target = folder / f"{_PREFIX}{step:06d}"
    if not is_intact(target):
        clear(target)
        publish(target, write)
    others = [path for path in list_checkpoints(folder) if step_of(path) != keep]
    for old in others[:-keep_last]:
        clear(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (path for path in folder.glob(f"{_PREFIX}*") if (path / MANIFEST).is_file())
    return sorted((path for path in found if step_of(path) >= 0), key=step_of)


def has_checkpoints(folder: Path) -> bool:
    """Whether there are checkpoints, damaged ones without a manifest among them."""
    return any(step_of(path) >= 0 for path in folder.glob(f"{_PREFIX}*"))


def check_unclaimed(folder: Path, resumed: Path | None) -> None:
    """Refuse to mix checkpoints of two runs.

    Args:
        folder: where a run is to put its checkpoints.
        resumed: the checkpoint it goes on from, if any.

    Raises:
        CheckpointError: ``folder`` has checkpoints that do not belong to the run of ``resumed``.
    """
    if resumed is not None and resumed.resolve().parent == folder.resolve():
        return
    if list_checkpoints(folder):
        raise CheckpointError(
            f"{folder} has the checkpoints of another run: resume that run, or choose another "
            "output_dir"
        )


def remove_later(folder: Path, step: int) -> None:
    """Delete checkpoints of steps after ``step``: a run that goes on from there makes them anew."""
    for path in folder.glob(f"{_PREFIX}*"):
        if step_of(path) > step:
            clear(path)


def find_checkpoint(where: Path) -> Path:
    """The verified checkpoint at ``where``, or the newest one of the run at ``where``.

    Raises:
        CheckpointError: if there is none, or it is damaged; names an older intact one if any.
    """
    if (where / MANIFEST).is_file():
        chosen = where
    else:
        found = list_checkpoints(where / CHECKPOINTS)
        if not found:
            raise CheckpointError(f"no checkpoint in {where / CHECKPOINTS}: nothing to resume from")
        chosen = found[-1]
    try:
        verify_published(chosen)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{intact_hint(chosen)}") from error
    return chosen


def newest_intact(run: Path) -> Path | None:
    """The newest checkpoint of ``run`` without damage; the damaged ones are named in the log."""
    for path in reversed(list_checkpoints(run / CHECKPOINTS)):
        try:
            verify_published(path)
            return path
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
    return None


def intact_hint(damaged: Path) -> str:
    """The end of a sentence that names an intact checkpoint beside ``damaged``, if there is one."""
    others = [path for path in list_checkpoints(damaged.parent) if step_of(path) < step_of(damaged)]
    intact = next((path for path in reversed(others) if is_intact(path)), None)
    return f"; {intact} is intact: resume from it with --resume {intact}" if intact else ""


def check_writable(folder: Path, needed_bytes: int, *, name: str = "output_dir") -> None:
    """Create ``folder``, which the user knows as ``name``.

    Raises:
        OSError: it cannot be written, or its disk has less than ``needed_bytes`` free.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = partial_path(folder / "probe")
        probe.write_bytes(b"egspo")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{name} {folder} cannot be written: {error}") from error
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(
            f"{name} {folder} has {free / 1e9:.3g} GB free, what this run saves there needs "
            f"{needed_bytes / 1e9:.3g} GB: free some space or lower checkpoint.keep_last"
        )


def step_of(path: Path) -> int:
    """Of ``step-000050``, 50; -1 where it is no name of a checkpoint."""
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if digits.isdecimal() else -1
