"""One command line in a child of the warmed process: its limits, what it may touch, how it ended.

The child shares the modules of its parent, so that a case costs a fraction of a second. It may
write below the case's folder alone: an audit hook refuses the rest, and writes down what was asked.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 20  # of CPU time: a busy machine makes no hangs. Who sleeps has as many on the clock
MEMORY = 3 << 30  # bytes of address space beyond what the parent has
FILE = 64 << 20  # bytes of a file; the models here have a hundred kilobytes
NATIVE = {".cache/huggingface"}  # what libraries may write in a home, but for modules
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {  # audit events whose arguments at these places are paths that change
    "os.remove": (0,), "os.rename": (0, 1), "os.rmdir": (0,), "os.mkdir": (0,), "os.link": (1,),
    "os.symlink": (1,), "os.truncate": (0,), "os.chmod": (0,), "os.utime": (0,),
    "shutil.rmtree": (0,), "shutil.move": (0, 1), "shutil.copyfile": (1,),
}  # fmt: skip


@dataclass
class Outcome:
    """How a command line ended.

    Attributes:
        code: exit status; None where a signal ended it. hang: it was killed for its time.
        foreign: files of the case whose Python was run. refused: places outside that it asked for.
        stack: of a hang, as faulthandler prints it.
        problem: why what it wrote cannot be loaded, if so.
    """

    code: int | None
    signal: int
    hang: bool
    out: str
    err: str
    seconds: float
    foreign: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    stack: str = ""
    problem: str = ""


def run(
    root: Path,
    arguments: list[str],
    stdin: bytes = b"",
    after: Any = None,
    seconds: float = SECONDS,
) -> Outcome:
    """Run `ar2diff <arguments>` in a child, whose folder is root/case/work.

    Args:
        seconds: of CPU time, after which it is killed.
        after: called in the child once the command has exited with 0; returns a problem or "".
    """
    logs = root / "logs"
    logs.mkdir(exist_ok=True)
    for name in ("stdin", "stdout", "stderr", "report", "stack"):
        (logs / name).write_bytes(stdin if name == "stdin" else b"")
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            _child(root, logs, arguments, after)
        finally:
            os._exit(70)
    status, hang = _wait(child, started, seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started
    report = {}
    with contextlib.suppress(ValueError):
        report = json.loads((logs / "report").read_text())
    text = {name: _text(logs / name) for name in ("stdout", "stderr", "stack")}
    return Outcome(
        os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        hang,
        text["stdout"],
        text["stderr"],
        time.monotonic() - started,
        stack=text["stack"],
        **report,
    )


def _text(file: Path) -> str:
    with file.open("rb") as stream:
        return stream.read(4 << 20).decode("utf-8", "replace")


def _wait(child: int, started: float, seconds: float) -> tuple[int, bool]:
    """Status, and whether the child had to be killed: for its CPU time, or because it sleeps on."""
    pause, told, used, moved = 0.002, 0.0, 0.0, started
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status, bool(told)
        now = time.monotonic()
        if now - moved > 0.5 and (spent := _cpu(child)) != used:
            used, moved = spent, now
        late = used > seconds or (now - started > seconds and now - moved > seconds / 2)
        if late and not told:
            told = now
            os.kill(child, signal.SIGUSR1)  # faulthandler writes its stack
        elif told and now > told + 1:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1], True
        time.sleep(pause)
        pause = min(pause * 1.2, 0.05)


def _cpu(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _child(root: Path, logs: Path, arguments: list[str], after: Any) -> None:
    os.setsid()
    for number, name, flags in (
        (0, "stdin", os.O_RDONLY),
        (1, "stdout", os.O_WRONLY),
        (2, "stderr", os.O_WRONLY),
    ):
        os.dup2(os.open(logs / name, flags | os.O_APPEND), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, errors="backslashreplace")
    stack = (logs / "stack").open("w")
    faulthandler.enable(stack)
    faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
    os.chdir(root / "case" / "work")
    sys.argv = ["ar2diff", *arguments]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    space = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    known = set(sys.modules)
    watch = Watch(root)
    sys.addaudithook(watch)
    code = _main()
    problem = ""
    if code == 0 and after is not None:
        watch.active = False
        problem = after()
    report = {
        "foreign": watch.foreign,
        "refused": watch.refused,
        "modules": sorted(set(sys.modules) - known),
        "problem": problem,
    }
    watch.active = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    (logs / "report").write_text(json.dumps(report))
    os._exit(code)


def _main() -> int:
    """The command line's exit status, as Python would give it."""
    from ar2diff.cli.main import main

    try:
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 255
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # also those that are no Exception
        traceback.print_exc()
        return 1
    return 0


class Watch:
    """An audit hook: refuses changes outside the case, and sees code of the case being run."""

    def __init__(self, root: Path):
        self.case = f"{root / 'case'}/"
        self.allowed = (self.case, f"{root / 'tmp'}/")
        self.models = tuple(f"{self.case}work/{name}" for name in ("model", "base", "adapter"))
        self.active, self.foreign, self.refused = True, [], []

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.active:
            return
        if event == "exec":
            name = getattr(arguments[0], "co_filename", "")
            if isinstance(name, str) and name.startswith((*self.models, f"{self.case}home")):
                self.foreign.append(name.removeprefix(self.case))
        elif event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING:
                self.check(path)
        elif event in CHANGES:
            for place in CHANGES[event]:
                self.check(arguments[place])

    def check(self, path: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        full = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        if not f"{full}/".startswith(self.allowed) and full != os.devnull:
            self.active = False
            self.refused.append(full)
            self.active = True
            raise PermissionError(13, "Permission denied", full)


def snapshot(folder: Path) -> dict[str, tuple]:
    """What lies below a folder: by path, kind, size, time and target of each."""
    seen: dict[str, tuple] = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(place, name)  # noqa: PTH118
            told = os.lstat(path)
            directory = os.path.isdir(path) and not os.path.islink(path)  # noqa: PTH112, PTH114
            target = os.readlink(path) if os.path.islink(path) else ""  # noqa: PTH114, PTH115
            size = () if directory else (told.st_size, told.st_mtime_ns, told.st_ino)
            seen[os.path.relpath(path, folder)] = (directory, target, size)
    return seen


def changed(before: dict[str, tuple], after: dict[str, tuple]) -> list[str]:
    """Paths that are new, gone or different."""
    return sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))


def freeze() -> None:
    """Leave the parent's objects to no collection of a child's, which would copy their pages."""
    gc.collect()
    gc.freeze()
