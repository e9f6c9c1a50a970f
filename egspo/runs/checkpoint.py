"""Atomic checkpoints: a folder appears under its name only when all of it is on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from egspo.files import CheckpointError

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds them."""
MANIFEST = "manifest.json"
_PREFIX = "step-"
PARTIAL = ".partial-"
"""How the names of what is not finished begin."""


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
    if not _intact(target):
        publish(target, write)
    others = [path for path in list_checkpoints(folder) if step_of(path) != keep]
    for old in others[:-keep_last]:
        _delete(old)
    return target


def publish(target: Path, write: Callable[[Path], object]) -> None:
    """Fill ``target`` by ``write`` so that it exists complete, with checksums, or not at all."""
    partial = target.parent / f"{PARTIAL}{target.name}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        manifest = {
            str(file.relative_to(partial)): {"bytes": file.stat().st_size, "sha256": _digest(file)}
            for file in sorted(partial.rglob("*"))
            if file.is_file()
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        if target.exists():
            _delete(target)
        partial.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (path for path in folder.glob(f"{_PREFIX}*") if (path / MANIFEST).is_file())
    return sorted(found, key=step_of)


def remove_partial(folder: Path) -> None:
    """Delete what killed runs left half-written."""
    for path in folder.glob(f"{PARTIAL}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
            _delete(path)


def verify_checkpoint(path: Path) -> None:
    """Compare every file with its checksum; raises :class:`CheckpointError` naming the file."""
    manifest_file = path / MANIFEST
    if not manifest_file.is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(manifest_file.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {MANIFEST} cannot be read: {error}") from error
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        if file.stat().st_size != expected["bytes"] or _digest(file) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: {name} does not match its checksum")


def find_checkpoint(where: Path) -> Path:
    """The verified checkpoint at ``where``, or the newest one of the run at ``where``.

    Raises:
        CheckpointError: if there is none, or it is damaged; names an older intact one if any.
    """
    if (where / MANIFEST).is_file():
        verify_checkpoint(where)
        return where
    found = list_checkpoints(where / CHECKPOINTS)
    if not found:
        raise CheckpointError(f"no checkpoint in {where / CHECKPOINTS}: nothing to resume from")
    try:
        verify_checkpoint(found[-1])
    except CheckpointError as error:
        intact = next((path for path in reversed(found[:-1]) if _intact(path)), None)
        hint = f"; {intact} is intact: resume from it with --resume {intact}" if intact else ""
        raise CheckpointError(f"{error}{hint}") from error
    return found[-1]


def check_writable(folder: Path, needed_bytes: int, *, name: str = "output_dir") -> None:
    """Create ``folder``, which the user knows as ``name``.

    Raises:
        OSError: it cannot be written, or its disk has less than ``needed_bytes`` free.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{PARTIAL}probe-{os.getpid()}"
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


def _delete(path: Path) -> None:
    """At once: a kill halfway leaves a partial folder, not a damaged checkpoint."""
    partial = path.with_name(f"{PARTIAL}old-{path.name}-{os.getpid()}")
    path.rename(partial)
    shutil.rmtree(partial)


def step_of(path: Path) -> int:
    """Of ``step-000050``, 50; -1 where it is no name of a checkpoint."""
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if digits.isdecimal() else -1


def _intact(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
