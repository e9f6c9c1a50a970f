"""One run on this machine: the program's process, the tests' process, and their end."""

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
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from egspo.sandbox.verdict import CaseResult, Limits, SandboxError, Verdict

INSIDE = Path(__file__).parent / "inside"
# Nothing of the user's or of installed packages, and no folder of the program's, is imported from.
INTERPRETER_OPTIONS = ("-P", "-s", "-S", "-B")
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""The same order of sets in every run: a verdict that is asked for again is the same."""
MAX_RESULTS = 2**20
"""Bytes of results that are read: about a thousand tests."""

_GRACE_SECONDS = 2.0


@dataclass(frozen=True)
class Command:
    """How to start an interpreter that runs the launcher."""

    argv: Sequence[str]
    """The interpreter and its options; what it runs is appended."""
    files: Sequence[IO[bytes]] = ()
    """Inherited by the process, closed here once it runs."""
    uid: int | None = None
    """User to become, inside."""
    hide: bool = False
    """Whether both sides have one user, so that the tests must hide from the program."""


class CommandMaker(Protocol):
    def __call__(self) -> contextlib.AbstractContextManager[Command]: ...


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
from inside import launcher
launcher.main(stream)
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


def run_tests(command: CommandMaker, code: str, tests: str, limits: Limits) -> Verdict:
    """Run ``tests`` in one process and ``code`` in another, for ``limits.wall_seconds`` at most.

    Raises:
        SandboxError: one of them could not be set up.
    """
    deadline = time.monotonic() + limits.wall_seconds
    common = {"limits": limits.for_launcher()}
    with contextlib.ExitStack() as stack:
        control = [stack.enter_context(end) for end in socket.socketpair()]
        read_end, write_end = os.pipe()
        results = stack.enter_context(os.fdopen(read_end, "rb"))
        written = stack.enter_context(os.fdopen(write_end, "wb"))
        job: dict[str, Any] = {**common, "role": "candidate", "code": code}
        program = stack.enter_context(_process(command, job, {"control": control[0].fileno()}))
        job = {**common, "role": "checker", "tests": tests}
        descriptors = {"control": control[1].fileno(), "results": write_end}
        checker = stack.enter_context(_process(command, job, descriptors))
        written.close()  # now only the processes hold these
        for end in control:
            end.close()
        lines = list(_lines(results.fileno(), deadline))
        if not lines:
            ended = time.monotonic() < deadline
            for process in (program, checker):
                _end(process)
            reason = "ended at once" if ended else f"no sign of life in {limits.wall_seconds:g} s"
            errors = "; ".join(filter(None, map(_errors, (program, checker))))
            raise SandboxError(f"the sandbox did not start ({reason}): {errors or 'no message'}")
    return read_verdict(lines[1:], limits)


@contextlib.contextmanager
def _process(
    command: CommandMaker, job: dict[str, Any], descriptors: dict[str, int]
) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher at work; when the block ends, so have it and all that it started."""
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(command())
        files = [stack.enter_context(file) for file in made.files]
        payload = stack.enter_context(tempfile.TemporaryFile())
        text = json.dumps({**job, **descriptors, "uid": made.uid, "hide": made.hide})
        payload.write(bundle())
        payload.write(text.encode("utf-8", "surrogatepass"))
        payload.seek(0)
        kept = [*descriptors.values(), payload.fileno(), *(file.fileno() for file in files)]
        process = subprocess.Popen(
            [*made.argv, *INTERPRETER_OPTIONS, "-c", _BOOTSTRAP, str(payload.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=kept,
            start_new_session=True,
            env=ENVIRONMENT,
            cwd="/",
        )
    with process:
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher by its lifeline, so that its parent reaps it; by force if that fails."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _errors(process: subprocess.Popen[bytes]) -> str:
    """The last thing that bubblewrap or the launcher wrote before it ended."""
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    text = process.stderr.read(65536) or b""
    return text.decode("utf-8", "replace").strip()[-1000:]


def _lines(descriptor: int, deadline: float) -> Iterator[dict[str, Any]]:
    """Lines of JSON as they come, until the end, the deadline or ``MAX_RESULTS`` bytes."""
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
            result: dict[str, Any] = json.loads(line)
            yield result
            if "end" in result:
                return


def read_verdict(lines: list[dict[str, Any]], limits: Limits) -> Verdict:
    results = [line for line in lines if "name" in line]
    cases = tuple(CaseResult(line["name"], line["passed"], line["error"]) for line in results)
    total = results[0]["of"] if results else 0
    timed_out = any(line["timeout"] for line in lines)
    if not lines or "end" not in lines[-1]:
        error = f"no result for every test within {limits.wall_seconds:g} s"
        return Verdict(cases, total, error, timed_out=True)
    return Verdict(cases, total, lines[-1]["end"], timed_out)
