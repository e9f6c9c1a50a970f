"""A new process with namespaces, limits and a user of its own, from a process that may make them.

The fork server keeps the right to mount (``CAP_SYS_ADMIN`` over its own namespaces) so that each
run gets a process table, a /proc and a /tmp of its own in milliseconds; what is forked gives it up
before it does anything else. Numbers are those of the Linux headers.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CLONE_NEWNS, _CLONE_NEWPID = 0x00020000, 0x20000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 16384, 1 << 18
# Of Landlock: system calls, which have the same number everywhere, and rights.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_MAKE_BLOCK_DEVICES, _REFER = 1 << 11, 1 << 13
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522


def fork(namespaces: dict[str, Any] | None) -> int:
    """``os.fork``, into new namespaces of processes and mounts where ``namespaces`` is given.

    ``namespaces["clone"]`` is the number of that system call. Raises: OSError: it is refused.
    """
    if namespaces is None:
        child = os.fork()
        if child == 0:
            os.setsid()
        return child
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _CLONE_NEWNS | _CLONE_NEWPID | signal.SIGCHLD
    child = libc.syscall(namespaces["clone"], flags, 0, 0, 0, 0)
    if child < 0:
        raise OSError(ctypes.get_errno(), "no new namespace of processes")
    return int(child)


def mount_own(namespaces: dict[str, Any]) -> None:
    """A /proc of the new namespace, and a /tmp of ``tmp_bytes`` and ``tmp_inodes``."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = f"size={namespaces['tmp_bytes']},nr_inodes={namespaces['tmp_inodes']},mode=1777"
    _mount(libc, "none", "/", None, _MS_REC | _MS_PRIVATE, None)
    _mount(libc, "proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)
    _mount(libc, "tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, size)


def _mount(
    libc: Any, source: str, target: str, kind: str | None, flags: int, options: str | None
) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    data = None if options is None else options.encode()
    if libc.mount(*texts, ctypes.c_ulong(flags), data):
        raise OSError(ctypes.get_errno(), f"cannot mount {kind} at {target}")


def restrict(uid: int | None, limits: dict[str, Any], seccomp: bytes | None) -> None:
    """Give up every right, for good, and set hard limits: for this process and what it starts."""
    if uid is not None:
        become(uid)
    set_limits(limits)
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header, nothing = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, nothing) or libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot give up capabilities")
    if seccomp is not None:
        _set_filter(libc, seccomp)


class _Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _set_filter(libc: Any, seccomp: bytes) -> None:
    program = _Program(len(seccomp) // 8, seccomp)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "cannot set the filter of system calls")


def become(uid: int) -> None:
    """Be this user and group, alone, for good. Raises: OSError: not permitted."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def hide_memory() -> None:
    """Other processes of the same user cannot read or trace this one, nor what it forks."""
    _set_dumpable(0)


class _Beneath(ctypes.Structure):
    """``struct landlock_path_beneath_attr``."""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def leave_others_alone() -> bool:
    """This process, and what it forks, cannot read or trace what was started before: its memory is
    hidden even where the user is the same.

    By a Landlock domain (Linux 5.13), whose members trace none but each other. It restricts no
    access to files that a program without rights has.

    Returns:
        Whether the kernel does that. It needs ``PR_SET_NO_NEW_PRIVS``.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    # Something must be handled. Renaming to other folders is forbidden unless a rule allows it.
    handled = ctypes.c_uint64(_MAKE_BLOCK_DEVICES | (_REFER if version > 1 else 0))
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(handled), ctypes.sizeof(handled), 0)
    root = os.open("/", os.O_PATH)
    try:
        if version > 1:
            rule = _Beneath(_REFER, root)
            if libc.syscall(_ADD_RULE, ruleset, 1, ctypes.byref(rule), 0):
                return False
        return bool(libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        os.close(root)
        os.close(ruleset)


def become_ordinary() -> None:
    """What :func:`hide_memory` and ignored interrupts keep from programs is theirs again."""
    _set_dumpable(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _set_dumpable(value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, value, 0, 0, 0)


def set_limits(limits: dict[str, Any]) -> None:
    """Hard limits. Sizes in bytes; None leaves one as it is."""
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
