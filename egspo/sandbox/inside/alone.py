"""A run in one script, for an endpoint that takes one and gives its output back.

There are no namespaces here; what there is of protection are users. Served by root, the program
becomes another user than what judges it, or nothing is run. Served by anyone else, both are that
user: this process hides its memory, and the kernel keeps the program from that of the service that
started it, where it has Landlock (Linux 5.13).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile

from . import isolate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Users that systemd sets aside for services without one of their own.
_FIRST_UID, _UIDS = 61184, 4336


def main(script: str, prelude: str, job: dict[str, Any]) -> None:
    """Do ``job``, and print what it reports, each line after ``job["token"]``.

    Args:
        script: the file that holds all of this, removed before the program starts.
        prelude: Python source that makes the package ``inside`` importable.
        job: ``runner``, ``code``, ``tests``, ``limits`` and ``token``.
    """
    os.unlink(script)
    isolate.hide_memory()
    results = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the tests print is no result
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            uid = _other_user(folder)
            os.chdir(folder)
            if job["runner"] == "pytest":
                _run_pytest(job, results, uid)
            else:
                _run_separate(job, prelude, results, uid)
    except Exception as error:
        text = json.dumps({"failed": f"{type(error).__name__}: {error}"})
        os.write(results, f"{job['token']}={text}\n".encode())


def _other_user(folder: str) -> int | None:
    """A user for the program, who owns ``folder``; None where this is no root's process.

    Raises:
        PermissionError: root cannot, or may not, run a program as another user here.
    """
    if os.geteuid() != 0:
        return None
    uid = _FIRST_UID + int.from_bytes(os.urandom(4), "big") % _UIDS
    child = os.fork()
    if child == 0:
        try:
            os.chown(folder, uid, uid)
            isolate.become(uid)
            for path in (sys.executable, os.__file__, folder):
                os.stat(path)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise PermissionError(
            "the service runs programs as root, and none can be run as another user: let it change "
            f"users, with an interpreter that they can read ({sys.executable}), or run it as a user"
        )
    return uid


def _run_pytest(job: dict[str, Any], results: int, uid: int | None) -> None:
    """One process runs the programs as ``uid``, this one marks what it says as its own."""
    from . import runner

    runner.prepare([], None)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            os.close(results)
            os.setsid()
            _restrict(uid, job["limits"])
            runner.run(job, write_end)
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as lines:
        for line in lines:
            os.write(results, job["token"].encode() + line)
            if line.startswith(b'={"end"'):
                break
    os.waitpid(child, 0)


def _restrict(uid: int | None, limits: dict[str, Any]) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    isolate.restrict(uid, limits, None)
    isolate.leave_others_alone()
    isolate.hide_memory()


def _run_separate(job: dict[str, Any], prelude: str, results: int, uid: int | None) -> None:
    """The program gets an interpreter of its own, which never held the tests or the token."""
    from . import checker

    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as payload:
        own = {"code": job["code"], "limits": job["limits"], "control": theirs.fileno(), "uid": uid}
        payload.write(json.dumps(own).encode())
        payload.seek(0)
        source = f"{prelude}\nfrom inside import alone\nalone.serve(open({payload.fileno()}, 'rb'))"
        program = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", "-c", source],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), payload.fileno()),
            start_new_session=True,
            env={"PYTHONHASHSEED": "0"},
        )
    theirs.close()
    isolate.set_limits({**job["limits"], "processes": None, "cpu_seconds": None})
    checker.run(job["tests"], ours, results, job["limits"]["test_seconds"], job["token"])
    assert program.stdin is not None
    program.stdin.close()
    program.wait()


def serve(stream: Any) -> None:
    """The program's side of a run with separate processes; its standard input is its lifeline."""
    from . import candidate

    with stream:
        job = json.loads(stream.read())
    child = os.fork()
    if child == 0:
        try:
            _restrict(job["uid"], job["limits"])
            isolate.become_ordinary()
            control = socket.socket(fileno=job["control"])
            control.sendall(b"S")
            candidate.run(job["code"], control)
        finally:
            os._exit(0)
    os.close(job["control"])
    os.read(0, 1)
    os.killpg(0, 9)
