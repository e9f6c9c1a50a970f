"""Programs run by a service: any endpoint with the interface of SandboxFusion's ``/run_code``."""

from __future__ import annotations

import http.client
import json
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from egspo.sandbox.processes import IMPORTER, MAX_RESULTS, inside_sources, read_verdict
from egspo.sandbox.verdict import Limits, SandboxError, SandboxUnavailable, Verdict

_PROBE = "from solution import f\n\n\ndef test_probe():\n    assert f() == 1\n"


class HttpSandbox:
    """Posts each program with its tests as one Python script, and reads the verdict it prints.

    The request is ``{"code", "language": "python", "run_timeout", "compile_timeout",
    "memory_limit_MB"}``, the reply ``{"status": "Success" | "Failed" | "SandboxError", "message",
    "run_result": {"status", "stdout", "stderr"}}``.

    The service protects the machine. The verdict is protected less well than in bubblewrap: program
    and tests have separate processes, and the tests neither lie in a file nor can be read from
    memory while the program runs, but both have one user, so that a program could kill the tests,
    or, with a kernel that lets it, look for them.

    Args:
        url: the endpoint, such as ``http://localhost:8080/run_code``.
        retries: how often to ask again where the service is unreachable or overloaded.
        timeout: seconds to wait for an answer beyond ``limits.wall_seconds``.
    """

    name = "http"

    def __init__(
        self, url: str, limits: Limits | None = None, *, retries: int = 3, timeout: float = 30.0
    ) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        if retries < 0:
            raise ValueError(f"retries must be >= 0, got {retries}")
        self._url, self._limits = url, limits or Limits()
        self._retries, self._timeout = retries, timeout

    @property
    def identity(self) -> str:
        return f"{self.name} {self._url} {self._limits}"

    def check(self) -> None:
        try:
            verdict = self.run("def f():\n    return 1\n", _PROBE)
        except SandboxError as error:
            raise SandboxUnavailable(
                f"the sandbox at {self._url} cannot be used: {error}"
            ) from error
        if verdict.passed != 1:
            raise SandboxUnavailable(
                f"the sandbox at {self._url} answers, but a correct program fails in it: "
                f"{verdict.error or verdict.cases[0].error}"
            )

    def run(self, code: str, tests: str) -> Verdict:
        token = secrets.token_hex(16)
        job = {
            "token": token,
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
        return self._verdict(self._post(request), token)

    def _post(self, request: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(request).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2 ** (attempt - 1), 10.0))
            try:
                wanted = urllib.request.Request(self._url, data, headers, method="POST")
                wait = self._limits.wall_seconds + self._timeout
                with urllib.request.urlopen(wanted, timeout=wait) as answer:
                    return _parsed(answer.read(4 * MAX_RESULTS + 1), self._url)
            except urllib.error.HTTPError as error:
                reason = (
                    f"HTTP {error.code} {error.reason}: {error.read(500).decode(errors='replace')}"
                )
                if error.code < 500 and error.code != 429:  # asking again would change nothing
                    break
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
        raise SandboxError(f"{self._url}, attempt {attempt + 1} of {self._retries + 1}: {reason}")

    def _verdict(self, answer: dict[str, Any], token: str) -> Verdict:
        result = answer.get("run_result") or {}
        if answer.get("status") not in ("Success", "Failed") or not isinstance(result, dict):
            raise SandboxError(f"{self._url} did not run the program: {str(answer)[:500]}")
        output = str(result.get("stdout") or "")
        lines = [line.removeprefix(token) for line in output.split("\n") if line.startswith(token)]
        if not lines:
            said = str(result.get("stderr"))[-500:]
            raise SandboxError(f"{self._url} ran no test: {result.get('status')}, {said}")
        return read_verdict([json.loads(line) for line in lines][1:], self._limits)


def _parsed(data: bytes, url: str) -> dict[str, Any]:
    try:
        answer = json.loads(data)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise SandboxError(f"{url} answered with what is no JSON object: {data[:200]!r}")
    return answer


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
