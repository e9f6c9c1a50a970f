"""Files and folders that appear whole, and old ones that are kept."""

from __future__ import annotations

import os
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


def set_aside(path: Path) -> Path:
    """Rename ``path`` to ``NAME.old-TIMESTAMP`` beside it; returns the new path."""
    old = path.with_name(f"{path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
    path.rename(old)
    return old


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete or damaged."""
