"""Process 1 of a sandbox: limits itself, starts the program or the tests, and ends with its host.

Standard
input is the lifeline: when the host closes it, or ends, this process exits, and with it, as it is
process 1 of its namespace, every process in the sandbox.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO

_PR_SET_DUMPABLE = 4


def main(stream: BinaryIO) -> None:
    """Do the job that ``stream`` holds, as JSON."""
    with stream:
        job = json.loads(stream.read())
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(*[job["uid"]] * 3)
        os.setresuid(*[job["uid"]] * 3)
    if job["hide"]:
        hide_memory()
    set_limits(job["limits"])
    wakeup_read, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    child = os.fork()
    if child == 0:
        os.close(wakeup_read)
        os.close(wakeup_write)
        _start(job)
        os._exit(0)
    # The host has learned that this works; the rest must not hold its pipes open.
    for descriptor in (job["control"], job.get("results")):
        if descriptor is not None:
            os.close(descriptor)
    _reap_until_the_end(child, wakeup_read)
    if os.getpid() != 1:  # without a namespace nothing else would end what the program started
        os.killpg(0, signal.SIGKILL)


def hide_memory() -> None:
    """Other processes of the same user cannot read or trace this one, nor what it forks."""
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def set_limits(limits: dict[str, Any]) -> None:
    """Hard limits, for this process and all that it starts. Sizes in bytes."""
    for name, value in (
        ("RLIMIT_CPU", limits["cpu_seconds"]),
        ("RLIMIT_AS", limits["memory"]),
        ("RLIMIT_FSIZE", limits["file_size"]),
        ("RLIMIT_NPROC", limits["processes"]),
        ("RLIMIT_NOFILE", limits["open_files"]),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MEMLOCK", 0),
        ("RLIMIT_MSGQUEUE", 0),
    ):
        if value is not None and hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (value, value))


def _start(job: dict[str, Any]) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    control = socket.socket(fileno=job["control"])
    if job["role"] == "candidate":
        from . import candidate

        control.sendall(b"S")
        candidate.run(job["code"], control)
    else:
        from . import checker

        checker.run(job["tests"], control, job["results"], job["limits"]["test_seconds"])


def _reap_until_the_end(child: int, wakeup: int) -> None:
    """Until the child ends or the lifeline does; orphans are reaped as they end."""
    while True:
        readable, _, _ = select.select([0, wakeup], [], [])
        if 0 in readable and not os.read(0, 1):
            return
        if wakeup in readable:
            os.read(wakeup, 512)
        while True:
            try:
                ended, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if ended == child:
                return
            if ended == 0:
                break
