"""Every attempt is contained, scores 0, ends in time and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from egspo.sandbox import Bubblewrap, Limits
from tests.helpers.marks import slow_but
from tests.sandbox.attacks import FORGERIES, PROBES
from tests.sandbox.conftest import LIMITS, require_bubblewrap

TESTS = """
from solution import f

def test_it():
    assert f(3) == "the expected words"
"""
PROBE_TESTS = """
from solution import f

def test_contained():
    assert f() == []
"""


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def owner_of(process: int) -> int:
    """Who started the sandbox that it is in; 1 where that one is gone."""
    ours = os.readlink("/proc/self/ns/pid")
    while (process := parent_of(process)) > 1:
        outside = os.readlink(f"/proc/{process}/ns/pid") == ours
        if outside and Path(f"/proc/{process}/comm").read_text().strip() != "bwrap":
            break
    return max(process, 1)


def sandboxed_processes() -> set[int]:
    """Our children, and processes of our sandboxes or of nobody's, zombies included."""
    ours, mine, found = os.readlink("/proc/self/ns/pid"), (os.getpid(), 1), set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            inside = os.readlink(f"/proc/{entry}/ns/pid") != ours
            if parent_of(int(entry)) == os.getpid() or (inside and owner_of(int(entry)) in mine):
                found.add(int(entry))
        except OSError:  # ended, or another user's
            continue
    return found


@pytest.fixture(autouse=True)
def leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No process, no file and no descriptor more than before, once the sandbox is closed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    processes, descriptors = sandboxed_processes(), len(os.listdir("/proc/self/fd"))
    yield
    assert sandboxed_processes() <= processes
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert not list(tmp_path.iterdir())
    for folder in (
        "/",
        "/dev",
        "/dev/shm",
        "/root",
        "/tmp",
    ):  # where attacks write, and their names
        assert not [p for p in os.listdir(folder) if p.isdigit() or p == "egspo-escaped"]


QUICK = {"exit code in the test", "equal to everything", "frames", "busy", "a daemon"}


@pytest.mark.parametrize("name", slow_but(QUICK, FORGERIES))
def test_a_forgery_scores_nothing(sandbox: Bubblewrap, name: str) -> None:
    start = time.monotonic()
    verdict = sandbox.run(FORGERIES[name], TESTS)
    assert (verdict.passed, verdict.score) == (0, 0.0), verdict
    assert verdict.error or verdict.cases[0].error
    assert time.monotonic() - start < 12


@pytest.fixture
def patient() -> Iterator[Bubblewrap]:
    """A probe is an honest program, which a busy machine must not fail."""
    require_bubblewrap()
    backend = Bubblewrap(replace(LIMITS, test_seconds=10.0))
    yield backend
    backend.close()


@pytest.mark.parametrize("name", slow_but({"network", "limits"}, PROBES))
def test_a_probe_reaches_nothing(patient: Bubblewrap, name: str) -> None:
    verdict = patient.run(PROBES[name], PROBE_TESTS)
    assert verdict.passed == verdict.total == 1, verdict


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("exit code at import", "exit code in the test", "SystemExit", "atexit", "frames", "gc"),
        *("memory", "equal to everything", "a string that is equal to everything"),
    ],
)
def test_the_same_attack_succeeds_where_one_process_does_all(tmp_path: Path, name: str) -> None:
    """The table has teeth: judged by an exit code, program and tests in one process, it passes."""
    together = FORGERIES[name] + TESTS.replace("from solution import f", "") + "\ntest_it()\n"
    command = [sys.executable, "-I", "-c", together]
    assert subprocess.run(command, cwd=tmp_path, timeout=60, capture_output=True).returncode == 0


def test_locks_are_not_taken_and_asynchronous_input_is_denied(sandbox: Bubblewrap) -> None:
    program = """
import ctypes, fcntl, os, sqlite3
def f():
    libc, reached = ctypes.CDLL(None, use_errno=True), []
    context = ctypes.c_ulong(0)
    if libc.syscall(206, 1024, ctypes.byref(context)) == 0: reached.append("io_setup")
    for path, mode in ((os.__file__, "rb"), ("/tmp/own", "ab+")):
        with open(path, mode) as file:
            for lock in (fcntl.flock, fcntl.lockf):
                kind = fcntl.LOCK_SH if mode == "rb" else fcntl.LOCK_EX
                lock(file, kind)  # nobody waits for it:
                if os.fork() == 0:
                    try:
                        with open("/tmp/own" if mode != "rb" else path, mode) as other:
                            lock(other, kind | fcntl.LOCK_NB)
                            if lock is fcntl.lockf and mode != "rb":
                                asked = __import__("struct").pack("hhqqi4x", 1, 0, 0, 0, 0)
                                answer = fcntl.fcntl(other, fcntl.F_GETLK, asked)
                                assert answer[:2] == b"\\x02\\x00", answer  # F_UNLCK
                    except BaseException: os._exit(1)
                    os._exit(0)
                if os.wait()[1]: reached.append((path, lock.__name__))
            fcntl.fcntl(file, fcntl.F_GETFL)
            try: fcntl.fcntl(file, 1024, 0)
            except OSError: continue
            reached.append((path, "lease"))
    for number in range(2):
        with sqlite3.connect("/tmp/data.db") as data:
            data.execute("create table if not exists t (x)")
            data.execute("insert into t values (?)", (number,))
    found = sqlite3.connect("/tmp/data.db").execute("select x from t order by x").fetchall()
    return reached + [x for x in found if x not in ((0,), (1,))] + [len(found)][len(found) == 2:]
"""
    assert sandbox.run(program, PROBE_TESTS).score == 1.0


def test_files_are_those_that_python_needs(sandbox: Bubblewrap) -> None:
    program = """
import ctypes, importlib, os, sys, zoneinfo
def f():
    for name in ("ssl", "sqlite3", "lzma", "bz2", "zlib", "decimal", "curses", "ctypes", "asyncio",
                 "multiprocessing", "hashlib", "pyexpat", "readline", "uuid"):
        importlib.import_module(name)
    sqlite3 = sys.modules["sqlite3"]
    assert sqlite3.connect(":memory:").execute("select 1 + 1").fetchone() == (2,)
    assert str(zoneinfo.ZoneInfo("Europe/Vienna")) == "Europe/Vienna"
    found = [name for name in ("/usr/bin", "/usr/lib/git-core", "/usr/lib/ssl", "/usr/include",
                               "/usr/share/doc", "/dev/tty", "/dev/ptmx") if os.path.exists(name)]
    packages = [path for path in sys.path if path.endswith("packages") and os.path.isdir(path)]
    return found + [name for path in packages for name in os.listdir(path)]
"""
    verdict = sandbox.run(program, PROBE_TESTS)
    assert verdict.score == 1.0, verdict


def test_files_in_tmp_are_counted() -> None:
    require_bubblewrap()
    sandbox = Bubblewrap(Limits(tmp_files=100))
    program = """
import os
def f():
    made = 0
    try:
        while made < 10000:
            os.mkdir(f"/tmp/{made}")
            made += 1
    except OSError: pass
    return made < 100
"""
    tests = "from solution import f\ndef test_it(): assert f() is True\n"
    assert sandbox.run(program, tests).score == 1.0
    sandbox.close()
