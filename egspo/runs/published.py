"""Folders that appear complete, with checksums, or not at all; and whose a folder is.

The manifest of such a folder names every file with its size and checksum. It is also the mark by
which a folder is known as this project's: nothing else is ever deleted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from egspo.files import CheckpointError, naming, partial_path, set_aside, sync
from egspo.runs.lock import exclusive

logger = logging.getLogger("egspo")

MANIFEST = "manifest.json"
_FULL = (
    "No space left",
    "os error 28",
    "file write failed",
    "PytorchStreamWriter",
    "inline_container",
    "File too large",
)


class NotOursError(ValueError):
    """Something that egspo did not write is where it is to write."""


def publish(target: Path, write: Callable[[Path], object], *, replace: bool = True) -> None:
    """Fill ``target`` by ``write`` so that it exists complete, with checksums, or not at all.

    Args:
        target: a folder. What was published there before is deleted.
        write: called with an empty folder, puts the files there.
        replace: False keeps an intact one that another process has published meanwhile.

    Raises:
        NotOursError: there is something else at ``target``; nothing is touched.
    """
    if replace:
        check_ours(target)
    partial = partial_path(target)
    partial.mkdir(parents=True)
    try:
        with naming(target), _full_disk_said(target):
            write(partial)
            (partial / MANIFEST).write_text(json.dumps(_inventory(partial), indent=1))
        for path in (*partial.rglob("*"), partial):
            sync(path)
        with nullcontext() if replace else exclusive(target.parent):
            if not replace and is_intact(target):
                return
            if not replace:
                clear(target)
            elif os.path.lexists(target):
                check_ours(target)
                delete_published(target)
            partial.rename(target)
            sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _full_disk_said(target: Path) -> Iterator[None]:
    """Libraries that write tensors say in errors of their own that the disk is full, and the copy
    of a folder says it once for each file."""
    try:
        yield
    except shutil.Error as error:
        *_, reason = error.args[0][0]
        raise OSError(f"{target} could not be saved: {reason}") from error
    except OSError:
        raise
    except Exception as error:
        if not any(sign in str(error) for sign in _FULL):
            raise
        raise OSError(f"{target} could not be saved: {error}") from error


def check_ours(target: Path) -> None:
    """Raises :class:`NotOursError` where :func:`publish` would have to delete what it did not
    write: the folder has no manifest, or a file that is not in it."""
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise NotOursError(f"{target} is in the way, and egspo did not write it: move it away")
    try:
        names = set(read_manifest(target))
    except CheckpointError:
        names = set()
    others = sorted({str(f.relative_to(target)) for f in _files(target)} - names)
    if others:
        listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise NotOursError(
            f"{target} has what egspo did not write ({listed}), and nothing of that is deleted: "
            "move it away, or choose another folder"
        )


def delete_published(path: Path) -> None:
    """At once: a kill halfway leaves a partial folder, not a damaged one."""
    partial = partial_path(path)
    path.rename(partial)
    shutil.rmtree(partial)


def clear(path: Path) -> None:
    """Delete what was published at ``path``; what is there instead, or was added, is kept beside
    it under another name."""
    if not os.path.lexists(path):
        return
    try:
        check_ours(path)
    except NotOursError as error:
        logger.warning("%s; it is kept in %s", error, set_aside(path))
    else:
        delete_published(path)


def verify_published(path: Path) -> None:
    """Compare every file with its checksum; raises :class:`CheckpointError` naming the file."""
    for name, expected in read_manifest(path).items():
        file = path / name
        try:
            if not file.is_file():
                raise CheckpointError(f"{path} is damaged: {name} is missing")
            same = file.stat().st_size == expected["bytes"] and _digest(file) == expected["sha256"]
        except OSError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if not same:
            raise CheckpointError(f"{path} is damaged: {name} does not match its checksum")


def is_intact(path: Path) -> bool:
    """Whether :func:`verify_published` accepts it."""
    try:
        verify_published(path)
    except CheckpointError:
        return False
    return True


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """``bytes`` and ``sha256`` of every file of the folder ``path``, by relative name.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or not manifest:
        raise CheckpointError(f"{path} is damaged: {MANIFEST} lists no files")
    for name, entry in manifest.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path} is damaged: {MANIFEST} lists what is elsewhere: {name}")
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise CheckpointError(f"{path} is damaged: {MANIFEST} has no size and checksum: {name}")
    return manifest


def _inventory(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _digest(file)}
        for file in _files(folder)
    }


def _files(folder: Path) -> list[Path]:
    """All but the manifest, and no folders."""
    found = (f for f in sorted(folder.rglob("*")) if f.is_symlink() or not f.is_dir())
    return [f for f in found if f != folder / MANIFEST]


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
