"""Attempts to escape from the sandbox, which run in it before a run begins.

Each function returns whether it succeeded. The file is a program like a model's: it imports the
standard library only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import threading
from pathlib import Path

PLACES = ("/", "/dev", "/dev/shm", "/etc", "/home", "/python", "/root", "/usr/lib", "/var/tmp")
MUCH = 2 << 30  # bytes

# What a program has done if the function returns True.
NAMES = {
    "is_root": "runs as root",
    "reads_home": "reads files outside of the sandbox",
    "sees_processes": "sees other processes",
    "writes_outside": "writes files outside of its scratch folder",
    "fills_disk": "writes more than 16 MB",
    "connects": "opens a network connection",
    "forks": "starts processes",
    "starts_threads": "starts threads",
    "takes_memory": "takes 2 GB of memory",
    "traces": "traces another process",
    "makes_namespaces": "makes a user namespace",
    "has_secrets": "sees environment variables of the run",
}


def is_root() -> bool:
    """Whether the program has root's rights."""
    return os.getuid() == 0 or os.geteuid() == 0


def reads_home() -> bool:
    """Whether there is a file or folder that is none of the sandbox's."""
    own = {"dev", "lib", "lib64", "proc", "python", "tmp", "usr"}
    return bool({place.name for place in Path("/").iterdir()} - own)


def sees_processes() -> bool:
    """Whether there is a /proc, which shows processes and their memory."""
    return Path("/proc/self").exists() or os.getppid() > 1


def writes_outside() -> bool:
    """Whether a file can be written anywhere but in /tmp."""
    return any(_does(Path(place, "written").write_text, "a") for place in PLACES)


def fills_disk() -> bool:
    """Whether more than the scratch folder holds can be written."""
    names = [Path(f"/tmp/{number}") for number in range(3)]
    filled = all(_does(name.write_bytes, bytes(8 << 20)) for name in names)
    for name in names:
        name.unlink(missing_ok=True)
    return filled


def connects() -> bool:
    """Whether a socket of any family can be made."""
    families = ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_VSOCK")
    return any(
        _does(socket.socket, getattr(socket, family), socket.SOCK_STREAM) for family in families
    )


def forks() -> bool:
    """Whether another process can be started."""
    try:
        process = os.fork()
    except OSError:
        return False
    if not process:
        os._exit(0)
    return True


def starts_threads() -> bool:
    """Whether a thread can be started."""
    return _does(threading.Thread(target=int).start)


def takes_memory() -> bool:
    """Whether memory has no limit."""
    return _does(mmap.mmap, -1, MUCH)


def traces() -> bool:
    """Whether the parent, which knows the tests, can be traced."""
    return ctypes.CDLL(None).ptrace(16, os.getppid(), None, None) == 0


def makes_namespaces() -> bool:
    """Whether the program can have more rights in a namespace of its own."""
    return ctypes.CDLL(None).unshare(0x10000000) == 0


def has_secrets() -> bool:
    """Whether an environment variable is set that is none of the sandbox's."""
    return bool({*os.environ} - {"LD_LIBRARY_PATH", "LC_CTYPE", "PWD"})


def _does(function, *args) -> bool:
    try:
        function(*args)
    except (OSError, MemoryError, RuntimeError, AttributeError):
        return False
    return True
