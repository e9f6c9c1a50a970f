"""The sandbox proper: bubblewrap (``bwrap``), which makes Linux namespaces.

One sandbox serves one run after the other: its first process, :mod:`.inside.server`, may mount and
change its user, and gives each run namespaces of processes and mounts of its own, with nothing
that the last one left.

As root no user namespace is made: each run becomes a user that no one else is, because the kernel
does not count the processes of root, under whatever name a namespace knows it. Any other user
needs a kernel of 5.14 or newer, which counts processes by namespace.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import sys
from pathlib import Path

from egspo.sandbox.files import interpreter_files, pytest_packages
from egspo.sandbox.processes import ENVIRONMENT, Command, Servers, run_tests
from egspo.sandbox.seccomp import clone_number, filter_program
from egspo.sandbox.verdict import (
    PROBE,
    Limits,
    SandboxError,
    SandboxUnavailable,
    Verdict,
    check_runner,
)

INSTALL_HINT = (
    "install it (Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap), or "
    "use sandbox: http with a url; sandbox: unsafe runs programs without protection"
)
_LINKS = {"/lib": "usr/lib", "/lib64": "usr/lib64"}
_DEVICES = ("null", "zero", "full", "random", "urandom")
# Users for root to become: an empty part of the whole range, or, where a container has only 65536,
# those that systemd sets aside for services without a user of their own.
_WIDE_UIDS = (0x6000_0000, 2**28)
_NARROW_UIDS = (61184, 4336)
# Processes that are not the program's, where the kernel counts them: by user and namespace.
_OWN_PROCESSES = {"separate": 1, "pytest": 1}
_OWN_PROCESSES_OF_USER = {"separate": 4, "pytest": 2}


class Bubblewrap:
    """Runs programs in bubblewrap; see :mod:`egspo.sandbox` for what it guarantees.

    Args:
        limits: of each run.
        runner: ``separate`` or ``pytest``.
    """

    name = "bubblewrap"

    def __init__(self, limits: Limits | None = None, *, runner: str = "separate") -> None:
        self.runner = check_runner(runner)
        self._limits = limits or Limits()
        self._bwrap = shutil.which("bwrap")
        self._root = os.geteuid() == 0
        self._uids = _uid_range() if self._root else None
        self._servers = Servers()

    @property
    def identity(self) -> str:
        return f"{self.name} {self.runner} {sys.version} {self._limits}"

    def check(self) -> None:
        if sys.platform != "linux":
            raise SandboxUnavailable(f"bubblewrap needs Linux, this is {platform.system()}")
        if self._bwrap is None:
            raise SandboxUnavailable(f"bubblewrap (bwrap) is not installed: {INSTALL_HINT}")
        try:
            verdict = self.run(*PROBE)
        except SandboxUnavailable:
            raise
        except SandboxError as error:
            raise SandboxUnavailable(
                f"bubblewrap cannot run here: {error}. It needs permission to make namespaces: "
                "look at the sysctls user.max_user_namespaces, kernel.unprivileged_userns_clone "
                "and kernel.apparmor_restrict_unprivileged_userns, and in a container at its "
                "seccomp profile"
            ) from error
        if verdict.passed != 1:
            reason = verdict.error or verdict.cases[0].error
            raise SandboxUnavailable(
                f"bubblewrap runs, but a correct program fails in it: {reason}"
            )

    def run(self, code: str, tests: str) -> Verdict:
        uids: list[int | None] = [None, None]
        if self._uids is not None:
            first, count = self._uids
            one, other = secrets.randbelow(count), 1 + secrets.randbelow(count - 1)
            uids = [first + one, first + (one + other) % count]
        return run_tests(self._servers, self._command(), {"uids": uids}, code, tests, self._limits)

    def close(self) -> None:
        """End the sandboxes that wait for runs."""
        self._servers.close()

    def _command(self) -> Command:
        if self._bwrap is None:
            raise SandboxUnavailable(f"bubblewrap (bwrap) is not installed: {INSTALL_HINT}")
        shown, hidden = interpreter_files()
        packages, folders = pytest_packages() if self.runner == "pytest" else ((), ())
        settings = {
            "runner": self.runner,
            "packages": folders,
            "seccomp": filter_program().hex(),
            "namespaces": {
                "clone": clone_number(),
                "tmp_bytes": self._limits.tmp_mb * 2**20,
                "tmp_inodes": self._limits.tmp_files,
            },
            "own_processes": (_OWN_PROCESSES if self._root else _OWN_PROCESSES_OF_USER)[
                self.runner
            ],
        }
        arguments = [*self._namespaces(), *_mounts([*shown, *packages], hidden)]
        return Command([self._bwrap, *arguments, "--", os.path.realpath(sys.executable)], settings)

    def _namespaces(self) -> list[str]:
        arguments = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        arguments += ["--unshare-cgroup-try", "--as-pid-1", "--new-session"]
        arguments += ["--clearenv", "--hostname", "sandbox", "--cap-add", "CAP_SYS_ADMIN"]
        for name, value in ENVIRONMENT.items():
            arguments += ["--setenv", name, value]
        if not self._root:
            return [*arguments, "--unshare-user"]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
            arguments += ["--cap-add", capability]
        return arguments


def _mounts(shown: list[str], hidden: tuple[str, ...]) -> list[str]:
    """Options that show these files, and nothing else that is there."""
    links = {link: target for link, target in _LINKS.items() if os.path.islink(link)}
    # Before what may lie in it, as an environment of somebody's in /tmp does.
    arguments = ["--size", "1048576", "--tmpfs", "/tmp"]
    made = {Path("/tmp")}
    for place in shown:
        for parent in reversed(Path(place).parents[:-1]):  # bwrap would close them to others
            if parent not in made and str(parent) not in links:
                arguments += ["--perms", "0755", "--dir", str(parent)]
                made.add(parent)
        arguments += ["--ro-bind", place, place]
    for folder in hidden:
        arguments += ["--tmpfs", folder, "--remount-ro", folder]
    for link, target in links.items():
        arguments += ["--symlink", target, link]
    arguments += ["--perms", "0755", "--dir", "/dev"]
    for device in _DEVICES:  # no terminals: `--dev` would need a second namespace of users
        arguments += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    arguments += ["--symlink", "/proc/self/fd", "/dev/fd"]
    return [*arguments, "--proc", "/proc", "--remount-ro", "/"]


def _uid_range() -> tuple[int, int]:
    try:
        inside, _, count = Path("/proc/self/uid_map").read_text().split()[:3]
    except (OSError, ValueError):
        return _NARROW_UIDS
    whole = int(inside) == 0 and int(count) >= sum(_WIDE_UIDS)
    return _WIDE_UIDS if whole else _NARROW_UIDS
