"""Fork servers on this machine, and one run after the other in each."""

from __future__ import annotations

import contextlib
import functools
import json
import marshal
import os
import select
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egspo.sandbox.exam import judge, set_exam
from egspo.sandbox.verdict import CaseResult, Limits, SandboxError, Verdict

INSIDE = Path(__file__).parent / "inside"
# Nothing of the user's or of installed packages, and no folder of the program's, is imported from.
INTERPRETER_OPTIONS = ("-P", "-s", "-S", "-B")
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""The same order of sets in every run: a verdict that is asked for again is the same."""

MAX_RESULTS = 2**22
"""Bytes of results that are read."""

_GRACE_SECONDS = 2.0
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Command:
    """How to start an interpreter that runs the fork server."""

    argv: Sequence[str]
    """The interpreter and its options; what it runs is appended."""
    settings: dict[str, Any]
    """Of :func:`egspo.sandbox.inside.server.main`."""


# Finds the modules of the package ``inside`` in the dictionary ``codes``.
IMPORTER = """
import sys
from importlib.machinery import ModuleSpec
class Importer:
    def find_spec(self, name, path=None, target=None):
        if name in codes:
            return ModuleSpec(name, self, is_package=name == "inside")
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        exec(codes[module.__name__], module.__dict__)
sys.meta_path.insert(0, Importer())
"""
_BOOTSTRAP = f"""
import marshal, sys
stream = open(int(sys.argv[1]), "rb")
codes = marshal.load(stream)
{IMPORTER}
from inside import server
server.main(stream)
"""


def inside_sources() -> dict[str, str]:
    """The modules of the package ``inside`` by name."""
    files = sorted(INSIDE.glob("*.py"))
    names = ["inside" if f.stem == "__init__" else f"inside.{f.stem}" for f in files]
    return {name: file.read_text("utf-8") for name, file in zip(names, files, strict=True)}


@functools.cache
def bundle() -> bytes:
    """The package ``inside``, compiled: the sandbox runs the same interpreter."""
    return marshal.dumps(
        {
            name: compile(source, name, "exec", dont_inherit=True)
            for name, source in inside_sources().items()
        }
    )


class ForkServer:
    """A process that forks runs, one at a time. Not safe to use from several threads.

    Raises:
        SandboxError: it does not start.
    """

    def __init__(self, command: Command) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as payload:
            payload.write(bundle())
            payload.write(json.dumps(command.settings).encode())
            payload.seek(0)
            self._process = subprocess.Popen(
                [*command.argv, *INTERPRETER_OPTIONS, "-c", _BOOTSTRAP, str(payload.fileno())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[payload.fileno()],
                start_new_session=True,
                env=ENVIRONMENT,
                cwd="/",
            )
        self._socket.settimeout(_START_SECONDS)
        try:
            ready = self._socket.recv(1)
        except TimeoutError:
            ready = b""
        if ready != b"R":
            reason = self._last_words()
            self.close()
            raise SandboxError(f"the sandbox did not start: {reason or 'no message'}")

    def run(self, job: dict[str, Any], seconds: float) -> list[str]:
        """What the processes of a job report until they say that it is all, or time is up.

        Raises:
            SandboxError: they could not be set up. OSError: the server is gone.
        """
        read_end, write_end = os.pipe()
        with os.fdopen(read_end, "rb") as results:
            try:
                data = json.dumps(job).encode("utf-8", "surrogatepass")
                self._socket.settimeout(_START_SECONDS)
                socket.send_fds(self._socket, [len(data).to_bytes(4, "big")], [write_end])
                self._socket.sendall(data)
            finally:
                os.close(write_end)
            lines = list(_lines(results.fileno(), time.monotonic() + seconds))
            self._socket.sendall(b"E")
            if self._socket.recv(1) != b"D":
                raise ConnectionError(self._last_words() or "the fork server ended")
        return lines

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        if self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_SECONDS)
        os.set_blocking(self._process.stderr.fileno(), False)
        text = self._process.stderr.read(65536) or b""
        return text.decode("utf-8", "replace").strip()[-1000:]

    def close(self) -> None:
        """End it by its lifeline; by force if that fails."""
        self._socket.close()
        with self._process as process:
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _lines(descriptor: int, deadline: float) -> Iterator[str]:
    """Lines as they come, until the end, the deadline or ``MAX_RESULTS`` bytes."""
    pending, size = b"", 0
    while size < MAX_RESULTS:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([descriptor], [], [], remaining)[0]:
            return
        part = os.read(descriptor, 65536)
        if not part:
            return
        size += len(part)
        *lines, pending = (pending + part).split(b"\n")
        for line in lines:
            text = line.decode("utf-8", "replace")
            yield text
            if text.startswith('={"end"'):
                return


class Servers:
    """Fork servers that wait for work; more are started as more is asked of them at once.

    A process that was forked from this one has none of them, and starts its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[ForkServer] = []
        self._owner = os.getpid()

    def run(self, command: Command, job: dict[str, Any], seconds: float) -> list[str]:
        """See :meth:`ForkServer.run`; a server that is gone is replaced, once."""
        for attempt in range(2):
            server = self._take() if attempt == 0 else None
            if server is None:
                server = ForkServer(command)
            try:
                lines = server.run(job, seconds)
            except OSError as error:
                server.close()
                reason = error
                continue
            except BaseException:
                server.close()
                raise
            with self._lock:
                self._idle.append(server)
            return lines
        raise SandboxError(f"the sandbox ended during a run: {reason}")

    def _take(self) -> ForkServer | None:
        with self._lock:
            if self._owner != os.getpid():
                self._idle, self._owner = [], os.getpid()
            return self._idle.pop() if self._idle else None

    def close(self) -> None:
        """End those that wait."""
        with self._lock:
            waiting, self._idle = self._idle, []
        for server in waiting if self._owner == os.getpid() else ():
            server.close()


def run_tests(
    servers: Servers,
    command: Command,
    job: dict[str, Any],
    code: str,
    tests: str,
    limits: Limits,
) -> Verdict:
    """Run ``tests`` against ``code``, for ``limits.wall_seconds`` at most.

    Raises:
        SandboxError: there is no verdict, for a reason that is not the program's.
    """
    job = {"limits": limits.for_launcher(), **job, "code": code, "tests": tests}
    if command.settings["runner"] == "separate":
        lines = servers.run(command, job, limits.wall_seconds)
        return read_verdict(started(lines), limits)
    try:
        exam = set_exam(tests, code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Verdict((), 0, f"{type(error).__name__}: {error}")
    lines = servers.run(command, {**job, "tests": exam.source}, limits.wall_seconds)
    return judge(exam, started(lines))


def started(lines: list[str]) -> list[str]:
    """Lines after the first, which says that the run began.

    Raises:
        SandboxError: it is another, or one of them says that the run could not go on.
    """
    first = lines[0] if lines else ""
    failed = [line for line in lines if line.startswith('={"failed"')]
    if failed or not first.startswith('={"started"'):
        reason = (failed or [first])[0][1:]
        raise SandboxError(f"the sandbox did not start: {reason or 'no sign of life'}")
    return lines[1:]


def read_verdict(lines: list[str], limits: Limits) -> Verdict:
    """The verdict that :mod:`egspo.sandbox.inside.checker` wrote.

    Raises:
        SandboxError: it wrote none of this.
    """
    try:
        events = [json.loads(line.removeprefix("=")) for line in lines]
        results = [_result(event) for event in events if "name" in event]
        totals = {event["of"] for event in events if "name" in event}
        last = events[-1] if events and "end" in events[-1] else None
        timed_out = any(event["timeout"] is True for event in events)
        total = totals.pop() if totals else 0
        error = None if last is None else last["end"]
        if totals or len(results) > total or not isinstance(error, str | None):
            raise ValueError(f"{len(results)} of {total} tests, {error!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise SandboxError(f"the sandbox reported nonsense: {problem!r:.300}") from None
    if last is None:
        error = f"no result for every test within {limits.wall_seconds:g} s"
        return Verdict(tuple(results), total, error, timed_out=True)
    return Verdict(tuple(results), total, error, timed_out)


def _result(event: dict[str, Any]) -> CaseResult:
    name, passed, error = event["name"], event["passed"], event["error"]
    if not isinstance(name, str) or not isinstance(passed, bool):
        raise ValueError(f"{name!r} has the result {passed!r}")
    if not isinstance(error, str | None) or type(event["of"]) is not int or event["of"] < 1:
        raise ValueError(f"{name!r} of {event['of']!r} has the error {error!r}")
    return CaseResult(name, passed, error)
