"""Runs pytest over a program and its tests, in one process, and passes on what that reports.

Nothing that comes from that process is believed: :mod:`egspo.sandbox.exam` holds the key to it.
This side sees that a test that hangs, or ends its process, takes no other test with it: the rest
runs in a new process.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import sys
import time

from . import isolate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

PROGRAM, TESTS = "solution.py", "test_solution.py"
_GRACE_SECONDS = 0.5
_MAX_SESSIONS = 64
_MAX_LINE = 65536


_prepared: Any = None


def prepare(packages: list[str], folder: str | None) -> None:
    """Import pytest, once for all runs, and make it ready for those in ``folder``."""
    global _prepared
    sys.path += packages
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import unittest.mock  # noqa: F401

    import pytest_asyncio.plugin  # noqa: F401

    from . import session

    session.warm_up()
    if folder is not None:
        os.chdir(folder)
        _prepared = session.Prepared()


def run(job: dict[str, Any], results: int, prefix: str = "") -> None:
    """Write what is reported of ``job`` to ``results``, as lines of JSON, until all tests ran.

    Lines of this process begin with ``=``: ``{"started"}``, ``{"lost": "ended" | "timeout"}``
    where a process of the program's did not get through, at last ``{"end"}``. Between them stands
    what such processes wrote, which should be what :class:`.session.Reporter` writes; these lines
    begin with ``-``. ``prefix`` stands before all.

    Args:
        job: ``code``, ``tests`` and ``limits``. Works in the current folder.
    """

    def write(mark: str, line: str) -> None:
        os.write(results, f"{prefix}{mark}{line}\n".encode())

    seconds = job["limits"]["test_seconds"]
    write("=", '{"started": true}')
    begun: list[str] = []
    for _ in range(_MAX_SESSIONS):
        count, lost = len(begun), None
        for line in _session(job, begun, seconds + _GRACE_SECONDS, results):
            if line in ("ended", "timeout"):
                lost = line
                break
            write("-", line)
            name = _started(line)
            if name is not None:
                begun.append(name)
        if lost is None:
            break
        write("=", json.dumps({"lost": lost}))
        if len(begun) == count:  # not even one test began: another try would end the same
            break
    write("=", '{"end": null, "timeout": false}')


def _started(line: str) -> str | None:
    try:
        name = json.loads(line).get("start")
    except (ValueError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def _session(job: dict[str, Any], done: list[str], patience: float, results: int) -> Iterator[str]:
    """Lines of one process; ``ended`` or ``timeout`` if it did not say that it was through."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(results)
            os.close(read_end)
            os.setpgid(0, 0)
            isolate.become_ordinary()
            from . import session

            _write_files(job)
            session.main(done, write_end, job["limits"]["test_seconds"], _prepared)
        finally:
            os._exit(0)
    with contextlib.suppress(OSError):  # whoever comes first: the group must exist to be killed
        os.setpgid(child, child)
    os.close(write_end)
    try:
        yield from _lines(read_end, patience)
    finally:
        os.close(read_end)
        _kill(child)


def _write_files(job: dict[str, Any]) -> None:
    """The folder as it was before any program ran."""
    for name in os.listdir("."):
        shutil.rmtree(name) if os.path.isdir(name) and not os.path.islink(name) else os.unlink(name)
    for name, text in ((PROGRAM, job["code"]), (TESTS, job["tests"])):
        with open(name, "wb") as file:
            file.write(text.encode("utf-8", "surrogatepass"))


def _lines(descriptor: int, patience: float) -> Iterator[str]:
    pending = b""
    deadline = time.monotonic() + patience
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            yield "timeout"
            return
        part = os.read(descriptor, _MAX_LINE)
        *lines, pending = (pending + part).split(b"\n")
        for line in lines:
            text = line.decode("utf-8", "replace")
            if text == '{"through": true}':
                return
            if text.startswith(('{"start"', '{"end"')):
                deadline = time.monotonic() + patience
            yield text
        if not part or len(pending) > _MAX_LINE:
            yield "ended"
            return


def _kill(child: int) -> None:
    """The process and all that it started: of the namespace, or, without one, of its group."""
    alone = os.getpid() == 1
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1 if alone else -child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1 if alone else child, 0)[0] != child or alone:
            pass
