"""Inside of the program's process: real pytest, and the checks that asserts were rewritten to.

The program can read and replace all of this. That gains it nothing but what guessing does: which of
the candidates of a check is the expected value, and whether a condition should hold, is known
outside alone (:mod:`egspo.sandbox.exam`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import types

import pytest
from _pytest.config import _prepareconfig  # as pytest-xdist does

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

CHECKS = "_checks"
"""The name by which rewritten tests know :class:`Checks`."""
OPTIONS = (
    *("-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:junitxml", "-p", "no:pastebin"),
    *("-p", "no:doctest", "-p", "no:faulthandler", "-p", "no:stepwise", "-p", "no:setuponly"),
    *("-p", "no:setupplan", "-p", "pytest_asyncio.plugin"),
    *("-p", "no:unraisableexception", "-p", "no:threadexception", "-p", "no:warnings"),
    *("--assert=plain", "--capture=sys", "-c", os.devnull, "--rootdir", "."),
    *("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"),
)
_MAX_TEXT = 300


class Choice:
    """Values of which one is expected, in an order that says nothing."""

    def __init__(self, number: int, values: Sequence[Any]) -> None:
        self.number, self.values = number, values


class Checks:
    """What asserts became: each tells what it found, and the test goes on."""

    def __init__(self, write: Callable[[dict[str, Any]], None]) -> None:
        self._write = write

    choice = staticmethod(Choice)

    def true(self, number: int, value: Any) -> None:
        self._write({"check": number, "found": str(int(bool(value)))})

    def each(self, number: int, value: Any, expected: Any, relation: Callable[..., Any]) -> None:
        """Which of the candidates ``expected`` are in ``relation`` with ``value``."""
        if not isinstance(expected, Choice):
            self.true(number, relation(value, expected))
            return
        found = "".join(map(str, (_holds(relation, value, each) for each in expected.values)))
        self._write({"check": number, "choice": expected.number, "found": found})

    def equal(self, number: int, value: Any, expected: Any) -> None:
        """Whether they are equal, and whether ``value`` equals what ``expected`` is not."""
        same = int(bool(value == expected))
        other = _holds(lambda v, e: v == e, value, _another(expected))
        self._write({"check": number, "found": f"{same}{other}"})

    def raises(self, number: int, expected: Choice, match: str | None = None) -> _Raises:
        return _Raises(lambda found: self._write({**found, "check": number}), expected, match)

    def star(self, namespace: dict[str, Any], names: Sequence[str]) -> None:
        """``from solution import *``, of the names that the tests use and do not define."""
        program = vars(sys.modules["solution"])
        namespace.update({name: program[name] for name in names if name in program})


def _holds(relation: Callable[..., Any], value: Any, expected: Any) -> int:
    try:
        return int(bool(relation(value, expected)))
    except Exception:  # as with a value of another type: it is not the expected one
        return 0


def _another(value: Any) -> Any:
    """A value of the same type, if it is a plain one, that is not equal to it."""
    kind: Any = type(value)
    if kind in (int, float, complex, bool):
        return not value if kind is bool else -value - 1
    for plain, more in ((str, "x"), (bytes, b"x"), (list, [0]), (tuple, (0,))):
        if kind is plain:
            return value + (value[:1] or more)
    if kind in (set, frozenset):
        return value ^ {0}
    if kind is dict:
        return {**value, 0: object()}
    return object()


class _Raises:
    """``pytest.raises``, for an exception that is one of several."""

    def __init__(self, write: Callable[..., None], expected: Choice, match: str | None) -> None:
        self._write, self._expected, self._match = write, expected, match
        self._info: pytest.ExceptionInfo[BaseException] = pytest.ExceptionInfo.for_later()

    def __enter__(self) -> pytest.ExceptionInfo[BaseException]:
        return self._info

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> bool:
        fits = kind is None or self._match is None or re.search(self._match, str(error))
        found = [int(kind is not None and issubclass(kind, k)) for k in self._expected.values]
        shown = "".join(map(str, found)) if fits else "0" * len(found)
        self._write({"choice": self._expected.number, "found": shown})
        if kind is None or error is None or trace is None or not any(found):
            return False
        self._info.fill_unfilled((kind, error, trace))
        return True


class Reporter:
    """A plugin that says what pytest does, and interrupts tests that have had their time."""

    def __init__(self) -> None:
        self._outcomes: dict[str, tuple[str, str]] = {}

    def begin(
        self, write: Callable[[dict[str, Any]], None], done: Sequence[str], seconds: float
    ) -> None:
        self._write, self._done, self._seconds = write, frozenset(done), seconds

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid not in self._done]

    def pytest_collection_finish(self, session: Any) -> None:
        self._write({"collected": [item.nodeid for item in session.items]})

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._write({"broken": _shorten(report.longrepr)})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self._write({"start": item.nodeid})
        signal.setitimer(signal.ITIMER_REAL, self._seconds, 0.1)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            outcome, error = self._outcomes.get(item.nodeid, ("failed", "there is no outcome"))
            self._write({"end": item.nodeid, "outcome": outcome, "error": error})

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.passed and report.when != "call":
            return
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if report.skipped else "xpassed"
        earlier, _ = self._outcomes.get(report.nodeid, ("", ""))
        if earlier != "failed":
            error = "" if outcome == "passed" else _shorten(report.longrepr)
            self._outcomes[report.nodeid] = (outcome, error)


def _shorten(representation: Any) -> str:
    """Of a traceback the line that says what was raised."""
    crash = getattr(representation, "reprcrash", None)
    text = str(representation if crash is None else crash.message)
    lines = [line.removeprefix("E").strip() for line in text.splitlines() if line.strip()] or [""]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Failed)\b", line)]
    place = -1 if crash is None else 0
    return (named or lines)[place][:_MAX_TEXT]


class Prepared:
    """Pytest, ready to collect the tests of this folder: most of what a run of it costs."""

    def __init__(self) -> None:
        self.reporter = Reporter()
        self._config = _prepareconfig([*OPTIONS, "test_solution.py"], [self.reporter])
        self._config.option.tbstyle = "native"  # others read and parse the source of every frame
        self._config._do_configure()
        self._session = pytest.Session.from_config(self._config)
        self._config.hook.pytest_sessionstart(session=self._session)

    def run(self) -> None:
        try:
            self._config.hook.pytest_collection(session=self._session)
            self._config.hook.pytest_runtestloop(session=self._session)
        except pytest.Session.Interrupted:  # the tests could not be collected
            pass


def main(
    done: Sequence[str], descriptor: int, seconds: float, prepared: Prepared | None = None
) -> None:
    """Run the tests of this folder but those in ``done``, and report to ``descriptor``.

    ``prepared`` was made in this folder, before this process was forked.
    """

    def write(found: dict[str, Any]) -> None:
        os.write(descriptor, f"{json.dumps(found)}\n".encode())

    def interrupt(*_: object) -> None:
        pytest.fail(f"took longer than {seconds:g} s", pytrace=False)

    module = types.ModuleType(CHECKS)
    module.__dict__[CHECKS] = Checks(write)
    sys.modules[CHECKS] = module
    prepared = prepared or Prepared()
    prepared.reporter.begin(write, done, seconds)
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)  # for loading; then for each test
    prepared.run()
    write({"through": True})


def warm_up() -> None:
    """Run pytest once, so that forks find all that it imports on its way in memory."""
    import tempfile

    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with open("test_solution.py", "w") as file:
            file.write("async def test_a(): assert 1 == 1\ndef test_b(): assert 1 == 2\n")
        try:
            main((), os.open(os.devnull, os.O_WRONLY), 60.0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.chdir(here)
    del sys.modules[CHECKS], sys.modules["test_solution"]
    sys.path.remove(folder)
