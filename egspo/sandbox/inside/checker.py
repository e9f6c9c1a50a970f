"""Runs the tests against the program in the other sandbox, and writes the verdict."""

from __future__ import annotations

import json
import linecache
import os
import signal
import socket
import sys
import types

from .remote import TESTS_MODULE, Session
from .wire import Channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_MAX_TEXT = 300
_FILE = "<tests>"


class _Timeout(BaseException):
    """The test has had its time."""


class _Deadline:
    """Interrupts what runs in it after ``seconds``, again and again should that be caught."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self.passed, self._running = seconds, False, True

    def __enter__(self) -> _Deadline:
        signal.signal(signal.SIGALRM, self._interrupt)
        signal.setitimer(signal.ITIMER_REAL, self._seconds, 0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _interrupt(self, *_: object) -> None:
        if not self._running:
            return
        self.passed = True
        raise _Timeout


def run(
    tests: str, control: socket.socket, results: int, test_seconds: float, prefix: str = ""
) -> None:
    """Every test in ``tests``, each with a fresh process of the program.

    A test is a function whose name begins with ``test`` and that has no parameters.

    Writes to ``results`` lines of JSON, after ``=``: ``{"started"}`` once both sides run, for each
    test ``{"name", "of": number of tests, "passed", "error", "timeout"}``, and at last ``{"end":
    why there are no more, or None, "timeout"}``. ``prefix`` begins each.
    """
    linecache.cache[_FILE] = (len(tests), None, tests.splitlines(keepends=True), _FILE)
    if control.recv(1) != b"S":
        return  # the other sandbox could not be set up, and says why

    def write(line: dict[str, Any]) -> None:
        os.write(results, f"{prefix}={json.dumps(line)}\n".encode())

    write({"started": True})
    write(_run_all(tests, control, test_seconds, write))


def _run_all(
    tests: str,
    control: socket.socket,
    test_seconds: float,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Write a line for every test, and return the last one."""
    control.settimeout(test_seconds)
    try:
        if control.recv(1) != b"L":
            return {"end": "the program ended while it loaded", "timeout": False}
    except TimeoutError:
        return {"end": f"loading took longer than {test_seconds:g} s", "timeout": True}
    except ConnectionError:
        return {"end": "the program ended while it loaded", "timeout": False}
    number = 0
    while True:
        case = _run_case(tests, number, control, test_seconds)
        if case["name"] is None:
            return {"end": case["error"], "timeout": case["timeout"]}
        write(case)
        number += 1
        if number == case["of"]:
            return {"end": None, "timeout": False}


def _run_case(
    tests: str, number: int, control: socket.socket, test_seconds: float
) -> dict[str, Any]:
    """The line about test ``number``; its ``name`` is None if there is no such test."""
    name, count, problem = None, 0, None
    ours, theirs = socket.socketpair()
    session = Session(Channel(ours))
    deadline = _Deadline(test_seconds)
    try:
        with deadline:
            socket.send_fds(control, [b"T"], [theirs.fileno()])
            theirs.close()
            cases = _load(tests, session)
            count = len(cases)
            name, case = cases[number] if cases else (None, _no_test)
            case()
    except BaseException as raised:
        problem = raised
    # Whatever the test made of these, it has not passed.
    error = session.broken
    if deadline.passed:
        error = f"took longer than {test_seconds:g} s"
    theirs.close()
    ours.close()  # so that no message of an exception can ask the program any more
    if error is None and problem is not None:
        error = _describe(problem)
    return {
        "name": name,
        "of": count,
        "passed": error is None,
        "error": error,
        "timeout": deadline.passed,
    }


def _no_test() -> None:
    raise LookupError("there is no test")


def _load(tests: str, session: Session) -> list[tuple[str, Callable[[], None]]]:
    sys.modules["solution"] = _RemoteModule(session)
    module = types.ModuleType(TESTS_MODULE)
    sys.modules[TESTS_MODULE] = module
    exec(compile(tests, _FILE, "exec", dont_inherit=True), module.__dict__)
    return [
        (name, value)
        for name, value in module.__dict__.items()
        if isinstance(value, types.FunctionType) and name.startswith("test")
    ]


class _RemoteModule(types.ModuleType):
    """What ``import solution`` gives the tests."""

    def __init__(self, session: Session) -> None:
        super().__init__("solution")
        self.__dict__["_egspo_session"] = session

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":  # `import *` must not give the tests another `len`
            names = self._egspo_session.request("names")
            own = ("solution", *dir(sys.modules["builtins"]))
            return [str(name) for name in names if name not in own]
        if name.startswith("__"):
            raise AttributeError(name)
        return self._egspo_session.request("get", 0, name)

    def __setattr__(self, name: str, value: Any) -> None:
        session = self._egspo_session
        session.request("set", 0, name, session.encode(value))


def _describe(problem: BaseException) -> str:
    """Class and message; for a bare assertion the line that failed."""
    try:
        text = str(problem)
    except BaseException:
        text = ""
    line, trace = 0, problem.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    if not text and line:
        text = linecache.getline(_FILE, line).strip()
    return f"{type(problem).__name__}: {text}"[:_MAX_TEXT]
