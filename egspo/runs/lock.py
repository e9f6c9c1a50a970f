"""One writer at a time in a folder or file: a lock that names its holder, and that a kill does not
leave.

The lock is a file that names its holder. On the same machine the holder is gone when its process
is; elsewhere, as on a shared file system, when the file was not touched for a while, which a thread
of the holder does.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any, Self

from egspo.files import naming, partial_path, remove_partial, sync

logger = logging.getLogger("egspo")

LOCK = ".egspo-lock"
"""File of a run that goes."""
BEAT, STALE = 10.0, 60.0
"""Seconds between two signs of life, and without one until a holder counts as gone."""


class RunLockedError(RuntimeError):
    """Another run has the folder, or has taken it."""


class RunLock:
    """The right to write to ``path``; a context manager.

    Args:
        path: a folder that exists, or a file, which need not, in one.
        name: as the user knows it.
        beat, stale: as :data:`BEAT` and :data:`STALE`, in seconds.

    Raises:
        OSError: the folder cannot be written.
        RunLockedError: another process has it; says which process, where and since when.
    """

    def __init__(
        self, path: Path, *, name: str = "output_dir", beat: float = BEAT, stale: float = STALE
    ) -> None:
        self._file = path / LOCK if path.is_dir() else path.with_name(f"{LOCK}-{path.name}")
        self._name, self._where, self._stale = name, f"{name} {path}", stale
        self._token = uuid.uuid4().hex
        self._take()
        stop = threading.Event()
        # A function of no lock, so that one that is dropped is let go.
        arguments = (self._file, self._token, beat, stop)
        threading.Thread(target=_keep_touching, args=arguments, daemon=True).start()
        self.release = weakref.finalize(self, _release, self._file, self._token, os.getpid(), stop)
        """Let the folder go; nothing where that was done."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Raises :class:`RunLockedError` where the folder is no longer this run's."""
        holder = _read(self._file)
        if holder is None:
            raise RunLockedError(
                f"{self._where} was deleted or emptied while the run went: what it had saved there "
                "is gone, and nothing more is written"
            )
        if holder.get("token") != self._token:
            raise RunLockedError(
                f"{self._where} was taken over by {_described(holder)}, as this run gave no sign "
                f"of life for {self._stale:g} s: nothing more is written"
            )

    def _take(self) -> None:
        holder = _read(self._file)
        if holder is not None:
            self._wait_until_gone(holder)
        mine = {"token": self._token, "host": socket.gethostname(), **_identity(os.getpid())}
        mine["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        with exclusive(self._file.parent):
            now = _read(self._file)
            if now is not None and now != holder:  # another one was faster
                raise self._held_by(now)
            partial = partial_path(self._file)
            with naming(self._file):
                partial.write_text(json.dumps(mine), "utf-8")
            sync(partial)
            partial.replace(self._file)
        self.check()

    def _wait_until_gone(self, holder: dict[str, Any]) -> None:
        """Raises :class:`RunLockedError` as soon as the holder is known to live."""
        own = _identity(os.getpid())
        if holder.get("machine") == own["machine"] and own["machine"] is not None:
            # What this process holds is of a run that it has given up, or notices at its next step.
            alive = _identity(holder.get("process"))["started"] == holder.get("started")
            if alive and holder.get("process") != os.getpid():
                raise self._held_by(holder)
            return
        logger.info(
            "%s has the lock of %s: waiting %g s for a sign of life",
            *(self._where, _described(holder), self._stale),
        )
        seen, deadline = _touched(self._file), time.monotonic() + self._stale
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._stale / 10))
            if _touched(self._file) not in (seen, None):
                raise self._held_by(holder)
        logger.warning("the lock of %s is stale and is taken over", _described(holder))

    def _held_by(self, holder: dict[str, Any]) -> RunLockedError:
        return RunLockedError(
            f"{self._where} is in use by {_described(holder)}: wait for that run, stop it, or "
            f"choose another {self._name}"
        )


@contextmanager
def alone(target: Path, *, name: str = "--output") -> Iterator[None]:
    """Inside, no other process writes to ``target``, and nothing half-written of it is left.

    Args:
        target: a file or folder, which need not exist; the folder that it is in is made. A pipe
            or a device is not locked.
        name: as the user knows it.

    Raises:
        OSError: the folder that it is in cannot be written.
        RunLockedError: another process does.
    """
    if target.exists() and not target.is_file() and not target.is_dir():
        yield
        return
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with RunLock(target, name=name):
        remove_partial(target.parent, of=target.name)
        yield


def _described(holder: dict[str, Any]) -> str:
    return (
        f"process {holder.get('process', '?')} on {holder.get('host', '?')} since "
        f"{holder.get('since', '?')}"
    )


def _identity(process: Any) -> dict[str, Any]:
    """Of a process of this machine: which it is, even if its number is used again."""
    unknown = {"machine": None, "process": process, "started": None}
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: signs of life decide
        return unknown
    try:
        # Behind the name, which may have spaces and brackets: the state, and 19 fields on the
        # start, in ticks since boot.
        fields = Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, TypeError, ValueError):
        return {**unknown, "machine": machine, "started": "never"}
    started = "never" if fields[0] in "ZX" else fields[19]
    return {"machine": machine, "process": process, "started": started}


def _read(file: Path) -> dict[str, Any] | None:
    """What the lock says; nothing is said by a damaged one, None where there is none."""
    try:
        if not S_ISREG(file.stat().st_mode):  # nor is a pipe waited for
            return {}
        holder = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _touched(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _keep_touching(file: Path, token: str, beat: float, stop: threading.Event) -> None:
    while not stop.wait(beat):
        with suppress(OSError):  # a shared file system may be away for a moment
            if (_read(file) or {}).get("token") != token:
                return
            os.utime(file)


def _release(file: Path, token: str, process: int, stop: threading.Event) -> None:
    stop.set()
    if os.getpid() == process:  # not in what was forked from it
        with suppress(OSError):
            if (_read(file) or {}).get("token") == token:
                file.unlink()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Inside, no other process of this machine is; none at all, if the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
