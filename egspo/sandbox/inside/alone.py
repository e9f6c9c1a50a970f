"""Both sides in one place, for an endpoint that takes a single script and gives its output back."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile

from . import checker
from .launcher import hide_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def main(script: str, prelude: str, job: dict[str, Any]) -> None:
    """Test ``job["code"]``, and print what :func:`.checker.run` writes after ``job["token"]``.

    The program gets an interpreter of its own that never held the tests or the token, and nobody
    but this process can print: but the two have one user and one file system.

    Args:
        script: the file that holds them, removed before the program starts.
        prelude: Python source that makes the package ``inside`` importable.
    """
    os.unlink(script)
    hide_memory()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as payload:
        descriptors = {"control": theirs.fileno(), "uid": None, "hide": False}
        own = {"role": "candidate", "code": job["code"], "limits": job["limits"], **descriptors}
        payload.write(json.dumps(own).encode())
        payload.seek(0)
        source = (
            f"{prelude}\nfrom inside import launcher\nlauncher.main(open({payload.fileno()}, 'rb'))"
        )
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
    results = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the tests print is no result
    checker.run(job["tests"], ours, results, job["limits"]["test_seconds"], job["token"])
    assert program.stdin is not None
    program.stdin.close()
    program.wait()
