"""The sandbox proper: bubblewrap (``bwrap``), which makes Linux namespaces.

As root no user namespace is made: the launcher becomes a user that no one else is, because the
kernel does not count the processes of root, under whatever name a namespace knows it. Any other
user needs a kernel of 5.14 or newer, which counts processes by namespace.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from egspo.sandbox.processes import ENVIRONMENT, Command, run_tests
from egspo.sandbox.seccomp import filter_program
from egspo.sandbox.verdict import Limits, SandboxError, SandboxUnavailable, Verdict

INSTALL_HINT = (
    "install it (Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap), or "
    "use sandbox: http with a url; sandbox: unsafe runs programs without protection"
)
_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/share/zoneinfo", "/etc/ld.so.cache")
_LINKS = {"/lib": "usr/lib", "/lib64": "usr/lib64"}
# Users for root to become: an empty part of the whole range, or, where a container has only 65536,
# those that systemd sets aside for services without a user of their own.
_WIDE_UIDS = (0x6000_0000, 2**28)
_NARROW_UIDS = (61184, 4336)


class Bubblewrap:
    """Runs programs in bubblewrap; see :mod:`egspo.sandbox` for what it guarantees."""

    name = "bubblewrap"

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._bwrap = shutil.which("bwrap")
        self._root = os.geteuid() == 0
        self._uids = _uid_range() if self._root else None

    @property
    def identity(self) -> str:
        return f"{self.name} {sys.version} {self._limits}"

    def check(self) -> None:
        if sys.platform != "linux":
            raise SandboxUnavailable(f"bubblewrap needs Linux, this is {platform.system()}")
        if self._bwrap is None:
            raise SandboxUnavailable(f"bubblewrap (bwrap) is not installed: {INSTALL_HINT}")
        try:
            verdict = self.run("def f():\n    return 1\n", _PROBE)
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
        return run_tests(self._command, code, tests, self._limits)

    @contextlib.contextmanager
    def _command(self) -> Iterator[Command]:
        if self._bwrap is None:
            raise SandboxUnavailable(f"bubblewrap (bwrap) is not installed: {INSTALL_HINT}")
        with tempfile.TemporaryFile() as seccomp:
            seccomp.write(filter_program())
            seccomp.seek(0)
            arguments = [*self._namespaces(), "--seccomp", str(seccomp.fileno()), *self._files()]
            argv = [self._bwrap, *arguments, "--", os.path.realpath(sys.executable)]
            uid = None
            if self._uids is not None:
                first, count = self._uids
                uid = first + secrets.randbelow(count)
            yield Command(argv, [seccomp], uid)

    def _namespaces(self) -> list[str]:
        arguments = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        arguments += ["--unshare-cgroup-try", "--as-pid-1", "--new-session", "--die-with-parent"]
        arguments += ["--clearenv", "--hostname", "sandbox"]
        for name, value in ENVIRONMENT.items():
            arguments += ["--setenv", name, value]
        if self._root:
            return [*arguments, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        return [*arguments, "--unshare-user", "--uid", "65534", "--gid", "65534"]

    def _files(self) -> list[str]:
        binds = [(path, path) for path in (*_SYSTEM, *_interpreter_paths()) if os.path.exists(path)]
        links = {link: target for link, target in _LINKS.items() if os.path.islink(link)}
        binds += [(link, link) for link in _LINKS if link not in links and os.path.exists(link)]
        arguments: list[str] = []
        for source, place in binds:
            for parent in reversed(Path(place).parents[:-1]):  # bwrap would close them to others
                arguments += ["--perms", "0755", "--dir", str(parent)]
            arguments += ["--ro-bind", source, place]
        for link, target in links.items():
            arguments += ["--symlink", target, link]
        size = str(self._limits.tmp_mb * 2**20)
        return [
            *arguments,
            *("--proc", "/proc", "--dev", "/dev"),
            *("--perms", "1777", "--size", size, "--tmpfs", "/tmp"),
            *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"),
        ]


def _interpreter_paths() -> list[str]:
    """What the interpreter of this process is made of, without the packages of a venv."""
    executable = os.path.realpath(sys.executable)
    prefix = Path(sys.base_prefix).resolve()
    if prefix in (Path("/usr"), Path("/usr/local")):  # of a whole system only these parts
        return [executable, *(str(prefix / "lib") for _ in [0] if prefix != Path("/usr"))]
    paths = [str(prefix)]
    return paths if Path(executable).is_relative_to(prefix) else [*paths, executable]


def _uid_range() -> tuple[int, int]:
    try:
        inside, _, count = Path("/proc/self/uid_map").read_text().split()[:3]
    except (OSError, ValueError):
        return _NARROW_UIDS
    whole = int(inside) == 0 and int(count) >= sum(_WIDE_UIDS)
    return _WIDE_UIDS if whole else _NARROW_UIDS


_PROBE = "from solution import f\n\n\ndef test_probe():\n    assert f() == 1\n"
