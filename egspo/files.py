"""Files that appear whole, and old ones that are kept."""

from __future__ import annotations

import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

PARTIAL = ".egspo-partial-"
"""How the names of what is not finished begin; nothing else has such names."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete or damaged."""


def partial_path(path: Path) -> Path:
    """A new name beside ``path`` for what is to become it, that no other process has."""
    return path.with_name(f"{PARTIAL}{path.name}-{uuid.uuid4().hex[:12]}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an error of the system that names no file, as that of a full disk, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; at the end what was written takes the place of ``path``.

    A kill or an error before that leaves ``path`` as it was. What took its place is on disk.
    """
    temporary = partial_path(path)
    try:
        with naming(path):
            yield temporary
            sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_partial(folder: Path, *, of: str = "", older_than: float = 0.0) -> None:
    """Delete what killed processes left half-written in ``folder``.

    Args:
        folder: where.
        of: only what was to become this; empty for all.
        older_than: seconds since the last change, where other processes may be writing.
    """
    for path in folder.glob(f"{PARTIAL}{escape(of)}-*" if of else f"{PARTIAL}*"):
        if older_than and time.time() - path.stat().st_mtime < older_than:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_user_text(path: str | Path) -> str:
    r"""The text of a file that a user wrote, ``-`` for standard input.

    In UTF-8, with or without a byte order mark; every end of line becomes ``\n``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8.
    """
    if str(path) == "-":
        text = sys.stdin.read().removeprefix("\ufeff")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def set_aside(path: Path) -> Path:
    """Rename ``path`` to ``NAME.old-TIMESTAMP`` beside it; returns the new path.

    Of a link what it leads to is renamed: the link stays, and a folder that it leads to is there
    again, empty.
    """
    linked, path = path.is_symlink(), path.resolve()
    stamp = f"{path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"
    old, number = path.with_name(stamp), 1
    while os.path.lexists(old):
        number += 1
        old = path.with_name(f"{stamp}-{number}")
    path.rename(old)
    if linked and old.is_dir():
        path.mkdir()
    return old


def sync(path: Path) -> None:
    """Wait until the file, or what the folder lists, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
