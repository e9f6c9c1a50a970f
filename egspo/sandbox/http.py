"""Programs run by a service: any endpoint with the interface of SandboxFusion's ``/run_code``."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import secrets
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from egspo.sandbox.exam import judge, set_exam
from egspo.sandbox.processes import (
    IMPORTER,
    MAX_RESULTS,
    inside_sources,
    read_verdict,
    started,
)
from egspo.sandbox.verdict import (
    PROBE,
    Limits,
    SandboxError,
    SandboxUnavailable,
    Verdict,
    check_runner,
)

_MAX_ANSWER = 2 * MAX_RESULTS
_MAX_TEXT = 500


class HttpSandbox:
    """Posts each program with its tests as one Python script, and reads the verdict it prints.

    The request is ``{"code", "language": "python", "run_timeout", "compile_timeout",
    "memory_limit_MB"}``, the reply ``{"status": "Success" | "Failed" | "SandboxError", "message",
    "run_result": {"status", "stdout", "stderr"}}``.

    The service protects the machine. Of the verdict, with ``runner="pytest"``, the key stays here.
    With ``separate``, program and tests have separate processes, and separate users where the
    service runs as root (without a way to change users it is refused). Of a service that runs as
    another user the program cannot read the memory, where the kernel has Landlock (Linux 5.13);
    where it has not, give each script a container.

    Args:
        url: the endpoint, such as ``http://localhost:8080/run_code``.
        limits: of each run.
        runner: ``separate`` or ``pytest``, which the service then must have, with pytest-asyncio.
        retries: how often to ask again where the service is unreachable or overloaded.
        timeout: seconds that all attempts together may take beyond ``limits.wall_seconds``.
    """

    name = "http"

    def __init__(
        self,
        url: str,
        limits: Limits | None = None,
        *,
        runner: str = "separate",
        retries: int = 3,
        timeout: float = 30.0,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must begin with http:// or https://, and a host, got {url!r}")
        if retries < 0:
            raise ValueError(f"retries must be >= 0, got {retries}")
        self.runner = check_runner(runner)
        self._url, self._limits = url, limits or Limits()
        self._retries, self._timeout = retries, timeout

    @property
    def identity(self) -> str:
        return f"{self.name} {self.runner} {self._url} {self._limits}"

    def check(self) -> None:
        try:
            verdict = self.run(*PROBE)
        except SandboxError as error:
            raise SandboxUnavailable(
                f"the sandbox at {self._url} cannot be used: {error}"
            ) from error
        if verdict.passed != 1:
            raise SandboxUnavailable(
                f"the sandbox at {self._url} answers, but a correct program fails in it: "
                f"{verdict.error or verdict.cases[0].error}"
            )

    def close(self) -> None:
        """There is nothing that waits."""

    def run(self, code: str, tests: str) -> Verdict:
        if self.runner == "separate":
            return read_verdict(self._lines(code, tests), self._limits)
        try:
            exam = set_exam(tests, code)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return Verdict((), 0, f"{type(error).__name__}: {error}")
        return judge(exam, self._lines(code, exam.source))

    def _lines(self, code: str, tests: str) -> list[str]:
        token = secrets.token_hex(16)
        job = {
            "token": token,
            "runner": self.runner,
            "code": code,
            "tests": tests,
            "limits": {**self._limits.for_launcher(), "processes": None},  # others have our user
        }
        request = {
            "code": _script(job),
            "language": "python",
            "run_timeout": self._limits.wall_seconds,
            "compile_timeout": self._limits.wall_seconds,
            "memory_limit_MB": self._limits.memory_mb * 2,
        }
        return started(self._output(self._post(request), token))

    def _post(self, request: dict[str, Any]) -> Any:
        data = json.dumps(request).encode()
        deadline = time.monotonic() + self._limits.wall_seconds + self._timeout
        for attempt in range(self._retries + 1):
            pause = 0.0 if attempt == 0 else min(0.5 * 2 ** (attempt - 1), 10.0)
            if attempt and time.monotonic() + pause >= deadline:
                break
            time.sleep(pause)
            tried = attempt + 1
            try:
                status, answer = self._ask(data, deadline)
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return self._parsed(answer)
            said = answer[:_MAX_TEXT].decode(errors="replace")
            reason = f"HTTP {status} {http.client.responses.get(status, '')}: {said}"
            if status < 500 and status != 429:  # asking again would change nothing
                break
        raise SandboxError(f"{self._url}, attempt {tried} of {self._retries + 1}: {reason}")

    def _ask(self, data: bytes, deadline: float) -> tuple[int, bytes]:
        """Status and body. A service that sends a byte now and then has no more time than others.

        Raises:
            OSError, http.client.HTTPException: there is no whole answer by then.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self._url, data, headers, method="POST")
        timer = _Timer(deadline)
        opener = urllib.request.build_opener(_Handler(timer), _SecureHandler(timer))
        try:
            with timer, opener.open(request, timeout=_left(deadline)) as answer:
                status, body = answer.status, answer.read(_MAX_ANSWER + 1)
        except urllib.error.HTTPError as error:
            with timer, error:
                status, body = error.code, error.read(_MAX_TEXT)
        if timer.passed:
            raise TimeoutError("no whole answer in time")
        if len(body) > _MAX_ANSWER:
            raise http.client.HTTPException(f"an answer of more than {_MAX_ANSWER} bytes")
        return status, body

    def _parsed(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise SandboxError(
                f"{self._url} answered with what is no JSON: {data[:200]!r}"
            ) from None

    def _output(self, answer: Any, token: str) -> list[str]:
        """The lines that the script printed."""
        result = answer.get("run_result") if isinstance(answer, dict) else None
        if not isinstance(result, dict) or answer.get("status") not in ("Success", "Failed"):
            raise SandboxError(f"{self._url} did not run the program: {str(answer)[:500]}")
        output = result.get("stdout")
        lines = output.split("\n") if isinstance(output, str) else []
        # What comes after the last line break was cut off.
        found = [line.removeprefix(token) for line in lines[:-1] if line.startswith(token)]
        whole = bool(found) and found[-1].startswith('={"end"')
        if not found or not (whole or result.get("status") == "TimeLimitExceeded"):
            missing = "the rest of what the tests said" if found else "any test"
            said = str(result.get("stderr"))[-_MAX_TEXT:]
            raise SandboxError(f"{self._url} lacks {missing}: {result.get('status')}, {said}")
        return found


class _Timer:
    """Shuts the connections that it is shown when time is up, whatever they are doing."""

    def __init__(self, deadline: float) -> None:
        self._deadline, self.passed = deadline, False
        self._sockets: list[socket.socket] = []

    def watch(self, opened: socket.socket) -> None:
        self._sockets.append(opened)

    def _end(self) -> None:
        self.passed = True
        for opened in self._sockets:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> None:
        self._timer = threading.Timer(_left(self._deadline), self._end)
        self._timer.daemon = True
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


class _Connection(http.client.HTTPConnection):
    def __init__(self, timer: _Timer, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._egspo_timer = timer

    def connect(self) -> None:
        super().connect()
        self._egspo_timer.watch(self.sock)


class _SecureConnection(http.client.HTTPSConnection):
    def __init__(self, timer: _Timer, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._egspo_timer = timer

    def connect(self) -> None:
        super().connect()
        self._egspo_timer.watch(self.sock)


class _Handler(urllib.request.HTTPHandler):
    def __init__(self, timer: _Timer) -> None:
        super().__init__()
        self._connect = functools.partial(_Connection, timer)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connect, req)


class _SecureHandler(urllib.request.HTTPSHandler):
    def __init__(self, timer: _Timer) -> None:
        super().__init__()
        self._connect = functools.partial(_SecureConnection, timer)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connect, req)


def _left(deadline: float) -> float:
    return max(0.01, deadline - time.monotonic())


def _script(job: dict[str, Any]) -> str:
    """One file of Python that does the job."""
    prelude = (
        f"sources = {inside_sources()!r}\n"
        "codes = {name: compile(text, name, 'exec') for name, text in sources.items()}\n"
        f"{IMPORTER}"
    )
    return (
        f"import json\nprelude = {prelude!r}\nexec(prelude)\nfrom inside import alone\n"
        f"alone.main(__file__, prelude, json.loads({json.dumps(job)!r}))\n"
    )
