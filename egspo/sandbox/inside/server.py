"""The fork server: process 1 of a sandbox, which has imported what runs need and forks them.

It talks with the host over one socket, its standard input, and runs one job at a time: a job comes,
its processes are forked, ``E`` comes and everything of the job is killed, ``D`` goes back. When the
host closes the socket, or ends, so does the server, and with it, as it is process 1 of its
namespace, every process in the sandbox.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket

from . import isolate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, BinaryIO

_MAX_TEXT = 500


def main(stream: BinaryIO) -> None:
    """Serve with the settings that ``stream`` holds, as JSON, until the host is through.

    ``runner``: ``separate`` or ``pytest``; ``namespaces``: see :func:`.isolate.fork`;
    ``seccomp``: a filter in hexadecimal; ``packages``: folders to import pytest from.
    """
    with stream:
        settings = json.loads(stream.read())
    isolate.hide_memory()
    host = socket.socket(fileno=os.dup(0))
    _silence()
    _import(settings)
    host.sendall(b"R")
    while True:
        job, descriptors = _receive(host)
        if job is None:
            return
        children = _start(settings, job, descriptors[0], host)
        os.close(descriptors[0])
        ended = host.recv(1)
        _end(children, settings["namespaces"] is None)
        if not ended:
            return
        host.sendall(b"D")


def _silence() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _import(settings: dict[str, Any]) -> None:
    """What every run needs is in memory before the first one is forked."""
    import gc

    if settings["runner"] == "pytest":
        from . import runner

        runner.prepare(settings["packages"], "/tmp" if settings["namespaces"] else None)
    else:
        from . import candidate, checker  # noqa: F401
    gc.collect()
    gc.freeze()  # the collector of a fork must not touch, and so copy, these pages


def _receive(host: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    head, descriptors, _, _ = socket.recv_fds(host, 4, 1)
    if len(head) < 4:
        return None, []
    remaining = int.from_bytes(head, "big")
    parts = []
    while remaining:
        part = host.recv(min(remaining, 2**20))
        if not part:
            return None, []
        parts.append(part)
        remaining -= len(part)
    return json.loads(b"".join(parts).decode("utf-8", "surrogatepass")), descriptors


def _start(
    settings: dict[str, Any], job: dict[str, Any], results: int, host: socket.socket
) -> list[int]:
    """Fork the processes of a job; each is process 1 of its own namespace where there are any."""
    if settings["runner"] == "pytest":
        from . import runner

        return [
            _fork(settings, job, job["uids"][0], results, host, lambda: runner.run(job, results))
        ]
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def program() -> None:
            ours.close()
            os.close(results)
            _supervise(_run_candidate, job, theirs)

        def tests() -> None:
            theirs.close()
            _supervise(_run_checker, job, ours, results)

        roles = (program, tests)
        return [
            _fork(settings, job, uid, results, host, role)
            for uid, role in zip(job["uids"], roles, strict=True)
        ]


def _fork(
    settings: dict[str, Any],
    job: dict[str, Any],
    uid: int | None,
    results: int,
    host: socket.socket,
    role: Callable[[], None],
) -> int:
    namespaces, seccomp = settings["namespaces"], settings["seccomp"]
    child = isolate.fork(namespaces)
    if child:
        return child
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that has a handler here
        host.close()
        os.dup2(0, 2)
        if namespaces:
            isolate.mount_own(namespaces)
        limits = {**job["limits"]}
        if limits["processes"] is not None:
            limits["processes"] += settings["own_processes"]
        isolate.restrict(uid, limits, seccomp and bytes.fromhex(seccomp))
        os.chdir("/tmp" if namespaces else job["folder"])
        role()
    except BaseException as error:
        with contextlib.suppress(OSError):
            text = f"{type(error).__name__}: {error}"[:_MAX_TEXT]
            os.write(results, f"={json.dumps({'failed': text})}\n".encode())
    finally:
        os._exit(0)


def _run_candidate(job: dict[str, Any], control: socket.socket) -> None:
    from . import candidate

    isolate.become_ordinary()
    control.sendall(b"S")
    candidate.run(job["code"], control)


def _run_checker(job: dict[str, Any], control: socket.socket, results: int) -> None:
    from . import checker

    checker.run(job["tests"], control, results, job["limits"]["test_seconds"])


def _supervise(role: Any, *args: Any) -> None:
    """Run ``role`` in a process of its own, and reap what it leaves, until it ends."""
    child = os.fork()
    if child == 0:
        try:
            role(*args)
        finally:
            os._exit(0)
    for argument in args[1:]:
        argument.close() if isinstance(argument, socket.socket) else os.close(argument)
    while os.wait()[0] != child:
        pass


def _end(children: list[int], by_group: bool) -> None:
    """Kill what a job started. The end of process 1 of a namespace ends all others in it."""
    for child in children:
        if by_group:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        else:
            os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    with contextlib.suppress(ChildProcessError):  # what a program without a namespace left
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
