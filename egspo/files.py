"""Files and folders that appear whole, and old ones that are kept."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; at the end what was written takes the place of ``path``.

    A kill before that leaves ``path`` as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    yield temporary
    temporary.replace(path)


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
    """Rename ``path`` to ``NAME.old-TIMESTAMP`` beside it; returns the new path."""
    old = path.with_name(f"{path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
    path.rename(old)
    return old


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete or damaged."""
