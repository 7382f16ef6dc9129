"""A sandbox for programs that a model wrote: bubblewrap around a bare Python interpreter.

A program has no network, no files but the standard library's and the system's libraries, 16 MB of
scratch, one process without threads, and a clock. What it may do inside is limited further by
`supervisor.py`, which runs there, and `syscalls.py`.
"""

from __future__ import annotations

import ctypes
import functools
import hmac
import inspect
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import Ar2DiffError, shortened
from . import attempts, supervisor
from .syscalls import seccomp_filter, supported
from .workers import Raised, Stopped, Worker

SCRATCH = 16 << 20  # bytes of files that a program may write
STARTING = 60.0  # seconds in which a sandbox has to start, however busy the machine is
NOBODY = 65534  # user and group of the program
HOLD = "/sys"  # where root's worker, in its own mount namespace, shows Python to another user
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x00020000, 0x1000, 0x4000, 1 << 18
INSTALL = "install bubblewrap 0.8 or newer, for example with 'apt-get install bubblewrap'"


@dataclass(frozen=True)
class Job:
    """A program and how it is tested.

    Attributes:
        program: sources, run one after the other in one namespace.
        tests: Python that raises unless the program is right; it calls the program's functions.
        setup: Python to run before the tests.
        entry: the function that the tests may call; None for whatever they name.
        inputs, expected: texts for standard input, and what the program has to print for each; in
            place of tests.
    """

    program: Sequence[str]
    tests: str = ""
    setup: str = ""
    entry: str | None = None
    inputs: Sequence[str] | None = None
    expected: Sequence[str] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed, and if not, why."""

    passed: bool
    why: str = ""


def judge(job: Job, seconds: float) -> Verdict:
    """Run a program and its tests in a sandbox of their own.

    Args:
        seconds: how long they may take.

    Raises:
        ValueError: the tests are at fault, whatever the program does.
        Ar2DiffError: there is no sandbox.
    """
    token = secrets.token_hex(16)
    public = {"program": list(job.program), "inputs": job.inputs, "seconds": seconds}
    private = {
        "token": token, "setup": job.setup, "tests": job.tests, "entry": job.entry,
        "expected": list(job.expected),
    }  # fmt: skip
    output, errors = _run(_message(public) + _message(private), seconds)
    ready, begun, answer = output.partition(supervisor.READY)
    if ready or not begun or (errors and not answer):
        raise _broken(errors)
    try:
        found = json.loads(answer)
        theirs = found["token"]
    except (ValueError, KeyError, TypeError):
        return Verdict(False, f"took longer than {seconds:g} seconds, or ended the sandbox")
    if not hmac.compare_digest(theirs.encode(), token.encode()):
        return Verdict(False, "no verdict")
    if "fault" in found:
        raise ValueError(found["fault"])
    return Verdict(found["passed"] is True, found.get("why", ""))


def check_sandbox() -> None:
    """Try to escape from the sandbox, as the programs of a model might.

    Raises:
        Ar2DiffError: there is no sandbox, or an attempt succeeded.
    """
    if not sys.platform.startswith("linux") or not supported():
        raise Ar2DiffError(
            "the sandbox of code rewards needs Linux on x86_64 or aarch64", "use another reward"
        )
    _bubblewrap()
    worker = Worker(_attempted, prepare=enter)
    found = worker.call(4 * STARTING, {})
    if isinstance(found, (Raised, Stopped)):
        why = found.why if isinstance(found, Stopped) else f"raised {found.kind}: {found.message}"
        raise Ar2DiffError(f"the check of the sandbox of code rewards {why}", INSTALL)
    if found:
        raise Ar2DiffError(
            f"the sandbox of code rewards does not hold on this machine: a program {found}",
            f"{INSTALL}, or run on a machine whose kernel lets it isolate programs",
        )


def enter() -> None:
    """Prepare a worker whose calls run sandboxes. As root, it shows Python, which may lie in a
    folder of root's, at a place that another user can reach."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None)
    if libc.unshare(CLONE_NEWNS) == 0:  # without the right to do so, Python has to be readable
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        libc.mount(sys.base_prefix.encode(), HOLD.encode(), None, MS_BIND, None)


def version() -> str:
    """The version of bubblewrap.

    Raises:
        Ar2DiffError: it is not installed.
    """
    said = subprocess.run([_bubblewrap(), "--version"], capture_output=True, text=True, check=False)
    return said.stdout.removeprefix("bubblewrap").strip()


def _attempted() -> str:
    """What an attempt to escape did; empty if none succeeded."""
    right = Job(["def answer(): return 6 * 7"], "assert answer() == 42")
    if not judge(right, STARTING).passed:
        return "that is right does not pass"
    tests = "".join(f"assert not {name}(), {what!r}\n" for name, what in attempts.NAMES.items())
    verdict = judge(Job([inspect.getsource(attempts)], tests), STARTING)
    return "" if verdict.passed else verdict.why.removeprefix("AssertionError: ")


def _bubblewrap() -> str:
    found = shutil.which("bwrap")
    if found is None:
        raise Ar2DiffError(
            "the sandbox of code rewards needs bubblewrap, which is not installed", INSTALL
        )
    return found


def _broken(errors: str) -> Ar2DiffError:
    """The error for a sandbox that did not start."""
    said = (errors.strip().splitlines() or ["it did not start in time"])[-1]
    fix = INSTALL
    if re.search("namespace|uid map|Operation not permitted", said):
        fix = "allow user namespaces on this machine (in a container: its seccomp profile)"
    return Ar2DiffError(f"the sandbox of code rewards cannot be used: {shortened(said)}", fix)


def _message(content: dict[str, Any]) -> bytes:
    data = json.dumps(content).encode()
    return len(data).to_bytes(8, "big") + data


def _run(messages: bytes, seconds: float) -> tuple[bytes, str]:
    """What a sandbox writes to its output and to its errors."""
    reading, writing = os.pipe()
    with open(writing, "wb") as file:
        file.write(seccomp_filter())
    another = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if not os.geteuid() else {}
    try:
        process = subprocess.Popen(
            [*_command(reading), "-c", _supervisor()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            pass_fds=[reading], cwd="/", env={}, **another,
        )  # fmt: skip
    finally:
        os.close(reading)
    with process:
        try:
            output, errors = process.communicate(messages, timeout=STARTING + seconds)
        except BaseException as error:
            process.kill()
            output, errors = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    return output, errors.decode(errors="replace")


def _command(seccomp: int) -> list[str]:
    """A bare Python interpreter in a sandbox."""
    base = Path(HOLD if Path(HOLD, "lib").is_dir() else sys.base_prefix)  # see `enter`
    python = Path(os.path.realpath(sys._base_executable)).name
    command = [
        _bubblewrap(), "--unshare-all", "--unshare-user", "--disable-userns",
        "--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL", "--hostname", "sandbox",
        "--die-with-parent", "--new-session", "--as-pid-1", "--seccomp", str(seccomp),
        "--clearenv", "--setenv", "LD_LIBRARY_PATH", "/python/lib",
    ]  # fmt: skip
    for folder in ("/usr/lib", "/usr/lib64"):
        command += ["--ro-bind-try", folder, folder]
    for folder in ("/lib", "/lib64"):
        if Path(folder).is_symlink():
            command += ["--symlink", f"usr{folder}", folder]
        else:
            command += ["--ro-bind-try", folder, folder]
    for folder in ("lib", "lib64"):
        command += ["--ro-bind-try", str(base / folder), f"/python/{folder}"]
    # no /proc, and of /dev what programs commonly open; / itself would be writable
    return [
        *command, "--ro-bind", str(base / "bin" / python), "/python/bin/python3",
        "--dev-bind", "/dev/null", "/dev/null", "--size", str(SCRATCH), "--tmpfs", "/tmp",
        "--remount-ro", "/", "--chdir", "/tmp", "/python/bin/python3", "-I", "-S",
    ]  # fmt: skip


@functools.cache
def _supervisor() -> str:
    return inspect.getsource(supervisor)
