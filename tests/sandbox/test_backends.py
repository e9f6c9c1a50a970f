"""Choosing a backend, the pool, the endpoint, and what happens where something is missing."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import egspo.sandbox.bubblewrap as bubblewrap_module
from egspo.sandbox import (
    Bubblewrap,
    CaseResult,
    HttpSandbox,
    Limits,
    SandboxError,
    SandboxPool,
    SandboxUnavailable,
    Unsafe,
    Verdict,
    make_backend,
)
from egspo.sandbox.files import pytest_packages
from egspo.sandbox.inside import alone
from tests.sandbox.attacks import FORGERIES
from tests.sandbox.conftest import LIMITS, require_bubblewrap
from tests.sandbox.forgeries import COMMON, HONEST
from tests.sandbox.forgeries import FORGERIES as EXAM_FORGERIES
from tests.sandbox.forgeries import TESTS as EXAM_TESTS
from tests.sandbox.test_escapes import TESTS as FORGED_TESTS
from tests.sandbox.test_verdicts import PROGRAM, TESTS

RIGHT, WRONG = "def f(x): return x", "def f(x): return 7"
SIMPLE = "from solution import f\ndef test_a(): assert f(1) == 1\ndef test_b(): assert f(7) == 7\n"


# --- Choosing


def test_the_default_is_bubblewrap() -> None:
    assert isinstance(make_backend(), Bubblewrap)
    assert isinstance(make_backend("unsafe"), Unsafe)
    assert isinstance(make_backend("http", url="http://localhost/run_code"), HttpSandbox)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "bubblewarp"}, "did you mean 'bubblewrap'"),
        ({"name": "docker"}, "must be one of"),
        ({"name": "http"}, "url goes with sandbox: http"),
        ({"name": "bubblewrap", "url": "http://x"}, "url goes with sandbox: http"),
        ({"name": "http", "url": "localhost:80"}, "must begin with http://"),
        ({"name": "http", "url": "http:///x"}, "and a host"),
        ({"runner": "nose"}, "runner must be one of"),
        ({"limits": {"wall_second": 1}}, "limits has no 'wall_second'"),
        ({"limits": {"processes": 0}}, "limit processes"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_backend(**options)


def test_without_bubblewrap_it_refuses_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    backend = Bubblewrap()
    for attempt in (backend.check, lambda: backend.run(RIGHT, SIMPLE)):
        with pytest.raises(SandboxUnavailable, match="apt-get install bubblewrap"):
            attempt()


def test_a_bubblewrap_that_may_not_make_namespaces_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxUnavailable, match=r"No permissions .* user.max_user_namespaces"):
        Bubblewrap().check()
    with pytest.raises(SandboxError, match="did not start"):
        Bubblewrap().run(RIGHT, SIMPLE)


def test_an_unknown_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bubblewrap_module.filter_program.cache_clear()
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(SandboxUnavailable, match="not of riscv64"):
        bubblewrap_module.filter_program()


# --- Unsafe


def test_what_lies_in_tmp_is_not_hidden_by_its_own() -> None:
    """An environment may be there."""
    options = bubblewrap_module._mounts(["/tmp/env/bin/python"], ("/tmp/env/lib/site-packages",))
    places = [options.index(place) for place in ("/tmp", "/tmp/env", "/tmp/env/bin/python")]
    assert places == sorted(places) and options[places[0] - 1] == "--tmpfs"
    assert options.count("/tmp") == 1


def test_unsafe_reaches_the_same_verdicts() -> None:
    backend = Unsafe(LIMITS)
    verdict = backend.run(PROGRAM, TESTS)
    assert (verdict.total, verdict.score) == (11, 1.0), verdict
    for name in ("exit code in the test", "equal to everything", "frames", "gc", "busy"):
        assert backend.run(FORGERIES[name], FORGED_TESTS).passed == 0
    backend.close()


@pytest.mark.slow
def test_unsafe_runs_pytest() -> None:
    backend = Unsafe(LIMITS, runner="pytest")
    verdict = backend.run(HONEST, EXAM_TESTS)
    assert (verdict.total, verdict.score) == (15, 1.0), verdict
    assert backend.run(COMMON + EXAM_FORGERIES["tests that are not run"], EXAM_TESTS).tampered
    backend.close()


# --- Fork servers


def test_a_server_that_is_gone_is_replaced() -> None:
    backend = Unsafe(LIMITS)
    assert backend.run(RIGHT, SIMPLE).score == 1.0
    (server,) = backend._servers._idle
    server._process.kill()
    server._process.wait()
    assert backend.run(RIGHT, SIMPLE).score == 1.0
    assert backend._servers._idle != [server]
    backend.close()


def test_a_fork_of_the_host_has_servers_of_its_own() -> None:
    backend = Unsafe(LIMITS)
    assert backend.run(RIGHT, SIMPLE).score == 1.0
    child = os.fork()
    if child == 0:
        try:
            good = backend.run(WRONG, SIMPLE).score == 0.5 and len(backend._servers._idle) == 1
            backend.close()
            os._exit(0 if good else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert backend.run("def f(x): return 1", SIMPLE).score == 0.5
    backend.close()


@pytest.mark.parametrize("kind", [Bubblewrap, Unsafe])
def test_without_pytest_its_runner_refuses(
    kind: type[Bubblewrap | Unsafe], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is Bubblewrap:
        require_bubblewrap()
    pytest_packages.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SandboxUnavailable, match=r"pip install 'egspo\[code\]'"):
        kind(runner="pytest").check()
    pytest_packages.cache_clear()


# --- Pool


class Counting:
    """A backend that counts its runs; each waits for ``gate``."""

    name = identity = "counting"
    runner = "separate"

    def __init__(self, verdict: Verdict | Exception) -> None:
        self.verdict, self.runs, self.gate = verdict, 0, threading.Event()
        self.gate.set()

    def check(self) -> None: ...

    def close(self) -> None: ...

    def run(self, code: str, tests: str) -> Verdict:
        self.runs += 1
        assert self.gate.wait(10)
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict


PASSED = Verdict((CaseResult("a", True),), 1)


def test_equal_programs_run_once() -> None:
    backend = Counting(PASSED)
    with SandboxPool(backend, workers=4) as pool:
        assert pool.run_many([("a", "t")] * 5 + [("b", "t"), ("a", "u")]) == [PASSED] * 7
        assert backend.runs == 3
        assert pool.run("a", "t") == PASSED
        assert backend.runs == 3
        assert pool.run("at", "") == PASSED  # the same characters, cut elsewhere
        assert backend.runs == 4


def test_a_program_that_runs_is_not_started_again() -> None:
    backend = Counting(PASSED)
    backend.gate.clear()
    with SandboxPool(backend, workers=4, cache_size=0) as pool:
        first, second = pool.submit("a", "t"), pool.submit("a", "t")
        backend.gate.set()
        assert first.result() == second.result() == PASSED
        assert backend.runs == 1


def test_the_cache_is_bounded_and_keeps_what_was_used() -> None:
    backend = Counting(PASSED)
    with SandboxPool(backend, workers=1, cache_size=2) as pool:
        for code in ("a", "b", "a", "c", "a"):
            pool.run(code, "t")
        assert backend.runs == 3
        pool.run("b", "t")
        assert backend.runs == 4


@pytest.mark.parametrize("verdict", [Verdict((), 1, "slow", True), SandboxError("gone")])
def test_time_limits_and_errors_are_not_cached(verdict: Verdict | Exception) -> None:
    backend = Counting(verdict)
    with SandboxPool(backend, workers=1) as pool:
        for _ in range(2):
            if isinstance(verdict, Exception):
                with pytest.raises(SandboxError, match="gone"):
                    pool.run_many([("a", "t"), ("b", "t")])
            else:
                assert pool.run("a", "t") == verdict
        assert backend.runs >= 2


def test_a_closed_pool_drops_what_waits() -> None:
    backend = Counting(PASSED)
    backend.gate.clear()
    pool = SandboxPool(backend, workers=1)
    first, second = pool.submit("a", "t"), pool.submit("b", "t")
    assert _wait_for(first.running)
    closing = threading.Thread(target=pool.close)
    closing.start()
    assert _wait_for(second.cancelled)
    backend.gate.set()
    closing.join()
    assert first.result() == PASSED
    assert backend.runs == 1
    with pytest.raises(RuntimeError, match="closed"):
        pool.run("c", "t")


@pytest.mark.slow
def test_an_interrupted_host_does_not_wait_for_what_is_queued() -> None:
    program = (
        "import time\n"
        "from egspo.sandbox import SandboxPool, Unsafe\n"
        "pool = SandboxPool(Unsafe(), workers=1)\n"
        "for n in range(50): pool.submit(f'import time; time.sleep(60)  # {n}', '')\n"
        "time.sleep(0.5)\n"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("options", [{"workers": 0}, {"cache_size": -1}])
def test_pool_options_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SandboxPool(Counting(PASSED), **options)


def test_many_at_once_from_several_threads() -> None:
    require_bubblewrap()
    programs = [(f"def f(x): return x if x != {n} else 0", SIMPLE) for n in range(8)]
    expected = [0.5 if n in (1, 7) else 1.0 for n in range(8)]
    scores: list[list[float]] = []
    with SandboxPool(Bubblewrap(Limits(test_seconds=10.0)), workers=4) as pool:
        threads = [
            threading.Thread(
                target=lambda: scores.append([v.score for v in pool.run_many(programs)])
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert scores == [expected] * 3


def test_the_sandbox_ends_with_its_host() -> None:
    require_bubblewrap()
    program = (
        "from egspo.sandbox import Bubblewrap\n"
        "print('begins', flush=True)\n"
        "Bubblewrap().run('import time\\ntime.sleep(1000)', 'def test_a(): pass')\n"
    )
    host = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert host.stdout is not None
    host.stdout.readline()
    started = _wait_for(lambda: _descendants(host.pid))
    time.sleep(0.3)
    started |= _descendants(host.pid)
    host.send_signal(signal.SIGKILL)
    host.wait()
    host.stdout.close()
    assert started
    assert _wait_for(lambda: not any(_alive(pid) for pid in started))


def _wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 10
    while not (result := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return result


def _descendants(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path("/proc").glob(f"{pid}/task/*/children"):
        try:
            children = {int(child) for child in task.read_text().split()}
        except OSError:
            continue
        found |= children.union(*map(_descendants, children))
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- Endpoint


class Endpoint(http.server.BaseHTTPRequestHandler):
    """A service that runs what it gets as SandboxFusion does, or answers as a test wants."""

    answers: ClassVar[list[Callable[[dict[str, Any]], tuple[int, Any]]]] = []
    requests: ClassVar[list[dict[str, Any]]] = []
    folder: Path
    interpreter: ClassVar[list[str]] = [sys.executable]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(request)
        code, answer = (self.answers.pop(0) if self.answers else self.execute)(request)
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def execute(self, request: dict[str, Any]) -> tuple[int, Any]:
        script = self.folder / f"{len(self.requests)}.py"
        script.write_text(request["code"])
        result: dict[str, Any] = {"status": "Finished"}
        try:
            done = subprocess.run(
                [*self.interpreter, str(script)],
                capture_output=True,
                timeout=request["run_timeout"],
                text=True,
                cwd=self.folder,
            )
            result |= {"return_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        except subprocess.TimeoutExpired as error:
            result |= {"status": "TimeLimitExceeded", "stdout": (error.stdout or b"").decode()}
        status = "Success" if result.get("return_code") == 0 else "Failed"
        return 200, {"status": status, "message": "", "run_result": result}

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    Endpoint.answers, Endpoint.requests, Endpoint.folder = [], [], tmp_path
    # A service runs as a user. Root is one in a namespace, whose files it can read.
    user = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    Endpoint.interpreter = [*(user if os.geteuid() == 0 else []), sys.executable]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/run_code"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_endpoint_reaches_the_same_verdicts(endpoint: str) -> None:
    backend = HttpSandbox(endpoint, LIMITS)
    backend.check()
    verdict = backend.run(PROGRAM, TESTS)
    assert (verdict.total, verdict.score, verdict.error) == (11, 1.0, None), verdict
    assert backend.run(WRONG, SIMPLE).score == 0.5
    request = Endpoint.requests[0]
    assert request["language"] == "python"
    assert request["run_timeout"] == LIMITS.wall_seconds


@pytest.mark.parametrize(
    "name",
    [
        *("exit code in the test", "printed verdict", "verdict into every descriptor", "frames"),
        *("gc", "memory", "files and other processes", "equal to everything", "atexit"),
        *("answers of its own making", "infinite output", "sys.modules"),
    ],
)
def test_forgeries_fail_at_an_endpoint(endpoint: str, name: str) -> None:
    assert HttpSandbox(endpoint, LIMITS).run(FORGERIES[name], FORGED_TESTS).passed == 0


@pytest.mark.slow
def test_an_endpoint_that_runs_out_of_time(endpoint: str) -> None:
    # In which the endpoint must have begun, on a busy machine too.
    limits = Limits(wall_seconds=5.0, test_seconds=20.0)
    verdict = HttpSandbox(endpoint, limits).run("", "def test_a():\n    while True: pass\n")
    assert verdict.timed_out
    assert verdict.score == 0.0


@pytest.mark.parametrize("failure", [(503, b"busy"), (429, b"slow down"), (500, b"")])
def test_an_overloaded_endpoint_is_asked_again(
    endpoint: str, failure: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    Endpoint.answers = [lambda request: failure] * 2
    assert HttpSandbox(endpoint, LIMITS).run(RIGHT, SIMPLE).score == 1.0
    assert len(Endpoint.requests) == 3
    Endpoint.answers = [lambda request: failure] * 9
    with pytest.raises(SandboxError, match=rf"attempt 3 of 3: HTTP {failure[0]}"):
        HttpSandbox(endpoint, LIMITS, retries=2).run(RIGHT, SIMPLE)
    assert len(Endpoint.requests) == 6


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, b"nothing here"), "HTTP 404 .*nothing here"),
        ((200, b"<html>"), "no JSON: b'<html>'"),
        ((200, [1]), "did not run the program"),
        (
            (200, {"status": "SandboxError", "message": "no disk"}),
            "did not run the program.*no disk",
        ),
        ((200, {"status": "Success", "run_result": None}), "did not run"),
        (
            (200, {"status": "Failed", "run_result": {"stderr": "no python"}}),
            "lacks any test.*no python",
        ),
        ((200, {"status": "Success", "run_result": {"stdout": '{"end": null}'}}), "lacks any"),
    ],
)
def test_other_answers_are_errors_at_once(endpoint: str, answer: Any, message: str) -> None:
    Endpoint.answers = [lambda request: answer] * 2
    with pytest.raises(SandboxError, match=message):
        HttpSandbox(endpoint, LIMITS).run(RIGHT, SIMPLE)
    with pytest.raises(SandboxUnavailable, match=r"sandbox at .* cannot be used"):
        HttpSandbox(endpoint, LIMITS).check()
    assert len(Endpoint.requests) == 2


def _said(request: dict[str, Any], *lines: str, status: str = "Finished") -> tuple[int, Any]:
    """What a script would have printed, with its token."""
    found = re.search("[0-9a-f]{32}", request["code"])
    assert found is not None
    text = "".join(f"{found[0]}{line}\n" for line in lines)
    return 200, {"status": "Success", "run_result": {"status": status, "stdout": text}}


BEGUN = '={"started": true}'
CASE = '={"name": "test_a", "of": 2, "passed": true, "error": null, "timeout": false}'
END = '={"end": null, "timeout": false}'


@pytest.mark.parametrize(
    "lines",
    [
        (BEGUN, CASE),  # cut off
        (BEGUN,),
        (BEGUN, CASE.replace("true", "5.0", 1), END),
        (BEGUN, CASE.replace("true", "1", 1), END),
        (BEGUN, CASE.replace('"of": 2', '"of": 0'), END),
        (BEGUN, CASE.replace('"of": 2', '"of": -2'), END),
        (BEGUN, CASE.replace('"of": 2', '"of": 0.5'), END),
        (BEGUN, CASE, CASE, CASE, END),  # more than there are
        (BEGUN, CASE, CASE.replace("2", "3"), END),
        (BEGUN, CASE.replace('"error": null, ', ""), END),
        (BEGUN, CASE.replace('"timeout": false', '"timeo": 1'), END),
        (BEGUN, "=[1]", END),
        (BEGUN, "={", END),
        (BEGUN, CASE, '={"end": 7, "timeout": false}'),
        (BEGUN, '={"failed": "no disk"}', END),
        ('={"failed": "no disk"}',),
        (CASE, END),
        ("=" + "[" * 100_000, END),
    ],
)
def test_a_report_that_is_none_is_no_verdict(endpoint: str, lines: tuple[str, ...]) -> None:
    Endpoint.answers = [lambda request: _said(request, *lines)]
    with pytest.raises(SandboxError):
        HttpSandbox(endpoint, LIMITS).run(RIGHT, SIMPLE)


@pytest.mark.parametrize("lines", [(BEGUN, "={", END), (BEGUN, "x", END), (BEGUN, "=[]", END)])
def test_nor_of_pytest(endpoint: str, lines: tuple[str, ...]) -> None:
    Endpoint.answers = [lambda request: _said(request, *lines)]
    with pytest.raises(SandboxError, match="nonsense"):
        HttpSandbox(endpoint, LIMITS, runner="pytest").run(RIGHT, SIMPLE)


def test_a_service_that_says_that_time_was_up_keeps_what_was_reached(endpoint: str) -> None:
    Endpoint.answers = [lambda request: _said(request, BEGUN, CASE, status="TimeLimitExceeded")]
    verdict = HttpSandbox(endpoint, LIMITS).run(RIGHT, SIMPLE)
    assert (verdict.passed, verdict.total, verdict.timed_out) == (1, 2, True)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\nX: "])
def test_dripping_bytes_have_no_more_time_than_others(head: bytes) -> None:
    stop = threading.Event()

    class Dripping(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.request.sendall(head)
                while not stop.wait(0.05):
                    self.request.sendall(b"x")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dripping) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        start = time.monotonic()
        try:
            with pytest.raises(SandboxError):
                HttpSandbox(url, Limits(wall_seconds=0.5), timeout=0.5).run(RIGHT, SIMPLE)
            assert time.monotonic() - start < 5
        finally:
            stop.set()
            server.shutdown()
            thread.join()


def test_slow_errors_are_asked_again_only_in_time(endpoint: str) -> None:
    def slow(request: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.7)
        return 500, b"later"

    Endpoint.answers = [slow] * 99
    start = time.monotonic()
    with pytest.raises(SandboxError):
        backend = HttpSandbox(endpoint, Limits(wall_seconds=1.0), timeout=1.0, retries=50)
        backend.run(RIGHT, SIMPLE)
    assert time.monotonic() - start < 6
    assert len(Endpoint.requests) <= 3


@pytest.mark.slow
def test_an_endpoint_runs_pytest(endpoint: str) -> None:
    backend = HttpSandbox(endpoint, LIMITS, runner="pytest")
    verdict = backend.run(HONEST, EXAM_TESTS)
    assert (verdict.total, verdict.score) == (15, 1.0), verdict
    forged = COMMON + EXAM_FORGERIES["outcomes in every descriptor"]
    assert backend.run(forged, EXAM_TESTS).tampered


@pytest.mark.parametrize("runner", ["separate", "pytest"])
def test_root_runs_programs_as_another_user_or_not_at_all(
    runner: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(uid: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(alone.isolate, "become", refuse)
    with pytest.raises(PermissionError, match="the service runs programs as root"):
        alone._other_user(str(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can serve as root")
def test_served_by_root_no_memory_can_be_read(endpoint: str) -> None:
    python = shutil.which("python3", path="/usr/bin")
    if python is None or subprocess.run([python, "-c", VERSION]).returncode:
        pytest.skip("there is no Python 3.11 that every user can read")
    Endpoint.interpreter = [python]
    os.chmod(Endpoint.folder, 0o755)
    program = """
import os, re
needle = "".join(reversed(" detcepxe eht")).encode()
def f(x):
    pid, found = os.getpid(), []
    while pid > 0:
        pid = int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
        try:
            for line in open(f"/proc/{pid}/maps"):
                low, high = (int(n, 16) for n in line.split()[0].split("-"))
                with open(f"/proc/{pid}/mem", "rb", 0) as memory:
                    memory.seek(low)
                    match = re.search(needle + b"[a-z]+", memory.read(high - low))
                if match: return match[0].decode()
        except OSError: pass
    return os.getuid()
"""
    verdict = HttpSandbox(endpoint, LIMITS).run(program, FORGED_TESTS)
    assert verdict.score == 0.0
    assert "expected words" in str(verdict.cases[0].error)  # the test ran, and failed
    other = "import os\ndef f(x): return 'the expected words' if os.getuid() > 60000 else 0"
    assert HttpSandbox(endpoint, LIMITS).run(other, FORGED_TESTS).score == 1.0


SERVICE = """
import ctypes, os, sys
from egspo.sandbox.inside import isolate
folder, protected = sys.argv[1], sys.argv[2] == "protected"
if os.geteuid() == 0:
    isolate.become(12345)  # a service runs as a user
isolate.become_ordinary()
program = os.fork()
if program == 0:
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # no new privileges
    if protected and not isolate.leave_others_alone():
        print("no Landlock")
        sys.exit()
    for name in ("mem", "maps", "environ"):
        try: open(f"/proc/{os.getppid()}/{name}", "rb")
        except OSError: continue
        print("reached", name)
    os.mkdir(f"{folder}/a")
    open(f"{folder}/b", "w").write("renamed")
    os.rename(f"{folder}/b", f"{folder}/a/b")
    print(open(f"{folder}/a/b").read())
    sys.stdout.flush()
    os._exit(0)
os.waitpid(program, 0)
"""


def test_the_memory_of_the_service_is_out_of_reach_of_its_own_user() -> None:
    said = {}
    for kind in ("protected", "not"):
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o777)
            command = [sys.executable, "-c", SERVICE, folder, kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
            said[kind] = done.stdout.split("\n")[:-1]
    if said["protected"] == ["no Landlock"]:
        pytest.skip("the kernel has no Landlock")
    assert said["protected"] == ["renamed"]
    if not Path("/proc/sys/kernel/yama/ptrace_scope").exists():  # which has a say of its own
        assert said["not"] == ["reached mem", "reached maps", "reached environ", "renamed"]


VERSION = "import sys; sys.exit(sys.version_info < (3, 11))"


def test_an_unreachable_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(SandboxUnavailable, match="attempt 4 of 4: URLError"):
        HttpSandbox("http://127.0.0.1:9/run_code", LIMITS).check()
