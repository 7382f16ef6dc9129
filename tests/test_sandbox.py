"""The sandbox for programs of models: nothing escapes, and a sandbox that does not hold is refused.

What a reward gives for programs is in `test_code_rewards.py`."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from escapes import EFFECTS, ENDLESS, FORGERS, KINDS
from test_rewards import ended, gone

from ar2diff.config.rl import Reward
from ar2diff.core.errors import Ar2DiffError
from ar2diff.rewards import sandbox
from ar2diff.rewards.loading import make_rewards
from ar2diff.rewards.sandbox import STARTING, Job, check_sandbox, enter, judge
from ar2diff.rewards.syscalls import ALLOW
from ar2diff.rewards.workers import Raised, Worker

needs_bubblewrap = pytest.mark.usefixtures("sandboxed")
OFTEN = (
    "reads_a_file", "connects_to_the_host", "makes_a_vsock", "forks", "starts_a_thread",
    "fills_the_scratch", "takes_memory", "reads_memory", "kills_everything",
    "equals_everything", "patches_its_judge", "reads_the_heap",
)  # fmt: skip


def judged(job, seconds):
    """What a worker says of a job: passed, why, seconds that it took, processes that it left."""
    began = time.monotonic()
    verdict = judge(job, seconds)
    took = time.monotonic() - began
    try:
        left = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        left = None
    return verdict.passed, verdict.why, took, left


@pytest.fixture(scope="module")
def ask(sandboxed):
    """Function: whether a program passes, and why not."""
    worker = Worker(judged, enter)

    def passes(job, seconds=20.0):
        found = worker.call(2 * STARTING, {"job": job, "seconds": seconds})
        if isinstance(found, Raised):
            raise ValueError(found.message)
        passed, why, took, left = found
        assert took < STARTING + seconds and left is None
        return passed, why

    return passes


class Host:
    """What there is to reach: a folder with a file and a socket, and an open port."""

    def __init__(self, home):
        home.chmod(0o755)
        (home / "canary").write_text("untouched")
        (home / "canary.py").touch()
        self.home = home
        self.doors = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        self.doors[1].bind(str(home / "door"))
        self.doors[1].listen()

    def told(self, code):
        """A program with the names of these places in it."""
        port = self.doors[0].getsockname()[1]
        return code.replace("HOME", str(self.home)).replace("PORT", str(port))

    def traces(self):
        """What a program left behind; the doors are closed."""
        found = {path.name for path in self.home.iterdir()} - {"canary", "canary.py", "door"}
        if (self.home / "canary").read_text() != "untouched":
            found.add("canary")
        for door in self.doors:
            door.setblocking(False)
            with door, contextlib.suppress(BlockingIOError):
                door.accept()
                found.add(door.family.name)
        return found


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A host on which nobody may leave a trace."""
    host = Host(tmp_path_factory.mktemp("home"))
    yield host
    assert not host.traces()


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def marked(names):
    """The attempts as parameters, of which a dozen is made every time."""
    return [name if name in OFTEN else slow(name) for name in names]


@needs_bubblewrap
@pytest.mark.parametrize("name", marked(EFFECTS))
def test_no_program_gets_out(name, ask, host):
    tests = "assert answer() == 'escaped'"
    passed, why = ask(Job([host.told(EFFECTS[name][0])], tests), 1.0 if name in ENDLESS else 20.0)
    assert not passed and why


@needs_bubblewrap
@pytest.mark.parametrize("name", marked(FORGERS))
def test_no_program_passes_tests_that_it_does_not_solve(name, ask):
    secret = int.from_bytes(os.urandom(6), "big") + 2
    tests = (
        "def check(candidate):\n    import math\n"
        f"    assert abs(candidate() - {secret}) == 0 and math.isclose(candidate(), SECRET)\n"
        f"SECRET = {secret}\nassert answer() == {secret}"
    )
    for entry in (None, "answer"):
        job = Job([FORGERS[name]], tests, entry=entry)
        passed, why = ask(job, 1.0 if name in ENDLESS else 20.0)
        assert not passed and why


def test_at_least_sixty_attempts_are_made():
    assert len(EFFECTS) + len(FORGERS) == len(KINDS) >= 60
    assert {*ENDLESS, *OFTEN} <= {*KINDS}


@pytest.mark.slow
def test_the_attempts_succeed_without_a_sandbox(tmp_path):
    """Otherwise they would prove nothing."""
    host = Host(tmp_path)
    for name, (code, succeeds) in EFFECTS.items():
        if succeeds:
            command = [sys.executable, "-c", f"{host.told(code)}print(answer())"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert "escaped" in done.stdout, (name, done)
    assert host.traces() == {"written", "AF_INET", "AF_UNIX"}


def child_of(process):
    """A child of the process; None if it has none."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return int(found[0]) if found else None


@needs_bubblewrap
def test_the_sandboxes_of_a_worker_end_with_it():
    def waits():
        """Judge a program without end in a thread; once it runs, give the processes of bubblewrap
        and of the supervisor in its sandbox. A bubblewrap that is still starting does not yet
        end with its parent."""
        started, processes = subprocess.Popen, []

        def noted(*args, **named):
            processes.append(started(*args, **named))
            return processes[0]

        subprocess.Popen = noted
        job = Job(["while True: pass"], "f()")
        thread = threading.Thread(target=judge, args=(job, 99))
        thread.start()
        supervisor = program = None
        while program is None:
            for outer in [process.pid for process in processes]:
                supervisor = child_of(outer)
                program = supervisor and child_of(supervisor)
        yield [outer, supervisor]
        thread.join()

    calls = Worker(waits, enter).values(STARTING, {})
    processes = next(calls)
    assert not any(map(ended, processes))
    calls.close()
    assert all(map(gone, processes))


# The check before a run


def replaced(monkeypatch, change):
    """Have the command of the sandbox be what `change` makes of its words."""
    given = sandbox._command
    monkeypatch.setattr(sandbox, "_command", lambda seccomp: change(given(seccomp)))


def without(option, values):
    """A fault: the command lacks an option and its values."""

    def change(words):
        at = words.index(option)
        return words[:at] + words[at + 1 + values :]

    return lambda monkeypatch: replaced(monkeypatch, change)


def supervised(old, new):
    """A fault of the supervisor."""
    text = sandbox._supervisor().replace(old, new)
    assert text != sandbox._supervisor()
    return lambda monkeypatch: monkeypatch.setattr(sandbox, "_supervisor", lambda: text)


def every_call(monkeypatch):
    """A fault: a filter that allows every system call."""
    allow = struct.pack("=HBBI", 6, 0, 0, ALLOW)
    monkeypatch.setattr(sandbox, "seccomp_filter", lambda: allow)


def also(*more):
    """A fault: the sandbox has something else in it."""

    def change(words):
        at = words.index("--remount-ro")
        return [*words[:at], *more, *words[at:]]

    return lambda monkeypatch: replaced(monkeypatch, change)


@needs_bubblewrap
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (without("--remount-ro", 1), "writes files outside of its scratch folder"),
        (every_call, "opens a network connection"),
        (also("--proc", "/proc"), "sees other processes"),
        (supervised('("NPROC", 0), ', ""), "starts processes"),
        slow(without("--size", 1), "writes more than 16 MB"),
        slow(also("--ro-bind", "/etc", "/etc"), "reads files outside of the sandbox"),
        slow(also("--setenv", "TOKEN", "a"), "sees environment variables of the run"),
        slow(supervised("MEMORY = 1 << 30", "MEMORY = 1 << 40"), "takes 2 GB of memory"),
        slow(supervised('verdict["passed"] = True', "pass"), "that is right does not pass"),
    ],
)
def test_a_sandbox_that_does_not_hold_is_refused(monkeypatch, fault, says):
    fault(monkeypatch)
    with pytest.raises(Ar2DiffError) as error:
        make_rewards([Reward(name="code")])
    assert says in error.value.what and "bubblewrap" in error.value.fix


@pytest.mark.slow
@needs_bubblewrap
def test_secrets_are_read_if_they_come_before_the_program(monkeypatch):
    """The order of the supervisor is what keeps them: with another one, a forger passes."""
    text, early = sandbox._supervisor(), "    secret = receive(0, None)"
    late = next(line for line in text.splitlines() if line.startswith(early))
    fork = "    children = [Child("
    text = text.replace(late, "").replace(fork, f"{early}\n{fork}")
    job = Job([FORGERS["reads_frames"]], "SECRET = 7\nassert answer() == 7")
    assert not Worker(judged, enter).call(STARTING, {"job": job, "seconds": 20})[0]
    monkeypatch.setattr(sandbox, "_supervisor", lambda: text)
    assert Worker(judged, enter).call(STARTING, {"job": job, "seconds": 20})[0]


def test_without_bubblewrap_the_run_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Ar2DiffError) as error:
        make_rewards([Reward(name="code")])
    assert "needs bubblewrap, which is not installed" in error.value.what
    assert "apt-get install bubblewrap" in error.value.fix


def test_a_bubblewrap_that_cannot_work_is_refused(monkeypatch):
    """As on hosts that forbid user namespaces."""
    said = "bwrap: No permissions to create new namespace"
    failing = ["/bin/sh", "-c", f"echo {said} >&2; exit 1"]
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda: "/bin/sh")
    monkeypatch.setattr(sandbox, "_command", lambda seccomp: failing)
    with pytest.raises(Ar2DiffError) as error:
        check_sandbox()
    assert said in error.value.what
    assert error.value.fix.startswith("allow user namespaces")
