"""Atomic checkpoints: a folder appears under its name only when all of it is on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"
_PREFIX = "step-"
_PARTIAL = ".partial-"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete or damaged."""


def save_checkpoint(
    folder: Path, step: int, write: Callable[[Path], None], *, keep_last: int
) -> Path:
    """Write ``folder/step-<step>`` and delete all but the newest ``keep_last``.

    Args:
        folder: parent of the checkpoints.
        step: training step the state belongs to.
        write: called with an empty folder, puts the files there.
        keep_last: checkpoints to keep, this one included.

    A kill at any moment leaves either the old checkpoints or the old and the new one: the files
    are written elsewhere, synced, and renamed.
    """
    target = folder / f"{_PREFIX}{step:06d}"
    publish(target, write)
    for old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return target


def publish(target: Path, write: Callable[[Path], None]) -> None:
    """Fill ``target`` by ``write`` so that it exists complete, with checksums, or not at all."""
    partial = target.parent / f"{_PARTIAL}{target.name}-{os.getpid()}"
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
            shutil.rmtree(target)
        partial.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / MANIFEST).is_file())


def remove_partial(folder: Path) -> None:
    """Delete what killed runs left half-written."""
    for path in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path)


def verify_checkpoint(path: Path) -> None:
    """Compare every file with its checksum; raises :class:`CheckpointError` naming the file."""
    manifest_file = path / MANIFEST
    if not manifest_file.is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST}")
    for name, expected in json.loads(manifest_file.read_text()).items():
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
    found = list_checkpoints(where / "checkpoints")
    if not found:
        raise CheckpointError(f"no checkpoint in {where / 'checkpoints'}: nothing to resume from")
    try:
        verify_checkpoint(found[-1])
    except CheckpointError as error:
        intact = next((path for path in reversed(found[:-1]) if _intact(path)), None)
        hint = f"; {intact} is intact: resume from it with --resume {intact}" if intact else ""
        raise CheckpointError(f"{error}{hint}") from error
    return found[-1]


def check_writable(folder: Path, needed_bytes: int) -> None:
    """Create ``folder``; raises OSError where it cannot be written or the disk is too full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{_PARTIAL}probe-{os.getpid()}"
        probe.write_bytes(b"egspo")
        probe.unlink()
    except OSError as error:
        raise OSError(f"output_dir {folder} cannot be written: {error}") from error
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(
            f"output_dir {folder} has {free / 1e9:.2f} GB free, the checkpoints of this run need "
            f"{needed_bytes / 1e9:.2f} GB: free some space or lower checkpoint.keep_last"
        )


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
