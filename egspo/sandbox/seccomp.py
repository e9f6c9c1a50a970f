"""System calls that programs of coding tasks have no use for, and sandboxes are broken with.

A classic BPF program in the kernel's layout. Denied are new
namespaces and mounts, tracing other processes, keys, BPF, io_uring, performance counters, sockets
other than local ones, and memory that belongs to no process and so is in no limit (shared memory
segments, memory files), and asynchronous input and output, of which a machine has one budget. Locks
on files are granted and not taken: those of the interpreter are the machine's, and the others
nobody else sees.
"""

from __future__ import annotations

import errno
import functools
import platform
import struct

from egspo.sandbox.verdict import SandboxUnavailable

# Number on x86_64, number on aarch64 (None: does not exist there).
_DENIED: dict[str, tuple[int, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_setup": (206, 0),
    "io_submit": (209, 2),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "shmat": (30, 196),
    "shmget": (29, 194),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vmsplice": (278, 75),
}
# Machine, AUDIT_ARCH, place in the tuples above, and the numbers of clone, clone3, fcntl, socket
# and socketpair.
_MACHINES = {
    "x86_64": (0xC000003E, 0, 56, 435, 72, 41, 53),
    "aarch64": (0xC00000B7, 1, 220, 435, 25, 198, 199),
}
_FLOCK = (73, 32)
# Commands of fcntl, and what they return.
_COMMANDS = {
    **dict.fromkeys((6, 7, 37, 38), 0),  # F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW
    **dict.fromkeys((1024, 1026), errno.ENOLCK),  # F_SETLEASE, F_NOTIFY
}
_NEW_NAMESPACES = 0x7E020080  # CLONE_NEW* of clone's flags; CLONE_NEWTIME is clone3's alone
_AF_UNIX = 1
_X32_CALLS = 0x40000000

_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_CALL, _ARCHITECTURE, _FIRST_ARGUMENT, _SECOND_ARGUMENT = (
    0,
    4,
    16,
    24,
)  # offsets in struct seccomp_data


def clone_number() -> int:
    """The number of the system call ``clone`` on this machine."""
    return _machine()[2]


def _machine() -> tuple[int, ...]:
    machine = platform.machine()
    if machine not in _MACHINES:
        raise SandboxUnavailable(
            f"the sandbox knows the system calls of {sorted(_MACHINES)}, not of {machine}"
        )
    return _MACHINES[machine]


@functools.cache
def filter_program() -> bytes:
    """The filter for this machine.

    Raises:
        SandboxUnavailable: for a machine that is neither x86_64 nor aarch64.
    """
    architecture, place, clone, clone3, fcntl, *sockets = _machine()
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQ, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),  # calls of another architecture have other numbers
        (_LOAD, 0, 0, _CALL),
        (_JUMP_GE, 0, 1, _X32_CALLS),
        (_RETURN, 0, 0, _KILL),
    ]
    for numbers in _DENIED.values():
        number = numbers[place]
        if number is not None:
            program += [(_JUMP_EQ, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    # The flags of clone3 are in memory, out of sight: without it libraries use clone.
    program += [(_JUMP_EQ, 0, 1, clone3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    program += [
        (_JUMP_EQ, 0, 4, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_JUMP_SET, 0, 1, _NEW_NAMESPACES),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_LOAD, 0, 0, _CALL),
    ]
    program += [(_JUMP_EQ, 0, 1, _FLOCK[place]), (_RETURN, 0, 0, _ERRNO | 0)]
    program += [
        (_JUMP_EQ, 0, 2 * len(_COMMANDS) + 2, fcntl),
        (_LOAD, 0, 0, _SECOND_ARGUMENT),
    ]
    for command, result in _COMMANDS.items():
        program += [(_JUMP_EQ, 0, 1, command), (_RETURN, 0, 0, _ERRNO | result)]
    program.append((_LOAD, 0, 0, _CALL))
    for number in sockets:
        program += [
            (_JUMP_EQ, 0, 4, number),
            (_LOAD, 0, 0, _FIRST_ARGUMENT),
            (_JUMP_EQ, 1, 0, _AF_UNIX),
            (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT),
            (_LOAD, 0, 0, _CALL),
        ]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
