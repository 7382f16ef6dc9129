"""The system calls that a program in the sandbox is refused, as a seccomp filter.

Namespaces do not cover everything: sockets of the hypervisor, shared memory that no limit of memory
counts, tracing, keys, and the parts of the kernel in which most of its faults are found.
"""

from __future__ import annotations

import errno
import platform
import struct

# Numbers on x86_64 and aarch64; newer calls have the same number on both.
DENIED: dict[str, tuple[int, int]] = {
    "socket": (41, 198), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272), "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "fanotify_init": (300, 262), "personality": (135, 92),
}  # fmt: skip
CLONE, PRLIMIT = (56, 220), (302, 261)
CLONE3 = 435  # its flags are in memory, where a filter cannot read them
NAMESPACES = 0x7E020000  # the flags of clone that make a namespace of any kind
X32 = 0x40000000  # system calls of another ABI of x86_64 have this bit
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_*, column

# Instructions of classic BPF and offsets in struct seccomp_data.
LOAD, EQUAL, ABOVE, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST = 0, 4, 16
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def supported() -> bool:
    """Whether the numbers of this processor's system calls are known."""
    return platform.machine() in ARCHITECTURES


def seccomp_filter() -> bytes:
    """The filter as bubblewrap's `--seccomp` reads it.

    A refused call fails with EPERM; clone3 with ENOSYS, so that libraries use clone.
    """
    architecture, column = ARCHITECTURES[platform.machine()]
    code = [
        (LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER), (ABOVE, 0, 1, X32), (RETURN, 0, 0, KILL),
        (EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ERROR | errno.ENOSYS),
        # clone of a namespace, and limits of another process
        (EQUAL, 0, 3, CLONE[column]), (LOAD, 0, 0, FIRST), (ANY_BIT, 0, 5, NAMESPACES),
        (RETURN, 0, 0, ERROR | errno.EPERM),
        (EQUAL, 0, 4, PRLIMIT[column]), (LOAD, 0, 0, FIRST), (EQUAL, 1, 0, 0),
        (RETURN, 0, 0, ERROR | errno.EPERM), (RETURN, 0, 0, ALLOW),
    ]  # fmt: skip
    for numbers in DENIED.values():
        code += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ERROR | errno.EPERM)]
    code.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
