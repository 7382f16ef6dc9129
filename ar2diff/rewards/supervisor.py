"""What runs inside the sandbox: a supervisor that holds the tests, and children that run programs.

`sandbox.py` hands this file to a bare interpreter as text, so it imports the standard library only.
The supervisor forks a child for each run of a program before it learns the tests and the token of
its parent, and never runs a line of the program itself. The tests call the program through a pipe
that carries plain values, so whatever a program does to its own interpreter, it can only answer.

A message is a JSON text after its length in eight bytes. A value that JSON cannot hold is written
as [kind, content]; an object that is not a plain value stays with the child and gets a number.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import operator
import os
import resource
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

MEMORY = 1 << 30  # bytes of address space of each process
FILE = 16 << 20  # bytes of a file
FILES = 64  # open files of a program
OPEN = 4096  # open files of the supervisor: two for each input
MESSAGE = 16 << 20  # bytes of a message, or of what a program prints
SENTENCE = 200  # characters of a reason
READY = b"ready\n"
CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset,
    "dict": dict, "bytes": bytes.fromhex, "complex": lambda parts: complex(*parts),
}  # fmt: skip
# What tests do with an object that stays with the program.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **named: function(*args, **named),
    "attribute": getattr, "set": setattr, "list": list, "len": len, "bool": bool, "str": str,
    "item": operator.getitem,
}  # fmt: skip


class TestError(Exception):
    """The tests themselves are at fault, whatever the program does."""


# Messages


def send(to: int, message: Any) -> None:
    """Write a message."""
    data = json.dumps(message).encode()
    data = len(data).to_bytes(8, "big") + data
    while data:
        data = data[os.write(to, data) :]


def receive(source: int, most: int | None = MESSAGE) -> Any:
    """Read exactly one message: what follows it is not for this process yet.

    Raises:
        EOFError: the other end is closed. ValueError: the message is too long, or not JSON.
    """
    size = int.from_bytes(exactly(source, 8), "big")
    if most is not None and size > most:
        raise ValueError("the message is too long")
    return json.loads(exactly(source, size))


def exactly(source: int, size: int) -> bytes:
    """Read `size` bytes."""
    data = b""
    while len(data) < size:
        part = os.read(source, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return data


def packed(value: Any, refer: Callable[[Any], Any]) -> Any:
    """A value as JSON; `refer` turns what is not a plain value into a reference."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[packed(k, refer), packed(v, refer)] for k, v in value.items()]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [packed(part, refer) for part in value]]
    return ["object", refer(value)]


def unpacked(value: Any, found: Callable[[Any], Any]) -> Any:
    """The value that `packed` wrote; `found` gives what a reference stands for."""
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "object":
        return found(content)
    if kind in ("bytes", "complex"):
        return CONTAINERS[kind](content)
    if kind == "dict":
        return {unpacked(k, found): unpacked(v, found) for k, v in content}
    return CONTAINERS[kind]([unpacked(part, found) for part in content])


# The child, in which the program runs


class Child:
    """A process that waits for its parent's word and then runs a program.

    Args:
        program: sources to run one after the other in one namespace.
        text: what the program reads from its standard input. If it is None, the program prints
            nothing, and its functions can be called with `ask`.
    """

    def __init__(self, program: list[str], text: str | None, seconds: float):
        theirs, self._requests = os.pipe()
        self.answers, answers = os.pipe()
        self.process = os.fork()
        if not self.process:
            try:
                with contextlib.suppress(BaseException):
                    live(program, text, seconds, theirs, answers)
            finally:
                os._exit(1)
        os.close(theirs)
        os.close(answers)

    def start(self) -> None:
        """Let the program run."""
        os.write(self._requests, b"!")

    def ask(self, what: str, target: Any, *args: Any, **named: Any) -> Any:
        """Have the child do one of the `OPERATIONS` to a target: a name, or a `Remote`."""
        reference = ["name", target] if isinstance(target, str) else ["object", target._number]
        values = [packed([list(args), named], self._reference)]
        send(self._requests, [what, reference, *values])
        answer = receive(self.answers)
        if "raised" in answer:
            raise exception(*answer["raised"])
        return unpacked(answer["value"], lambda number: Remote(self, number))

    def _reference(self, value: Any) -> int:
        if isinstance(value, Remote):
            return value._number
        raise TestError(
            f"the tests hand the program a value of type {type(value).__name__}, "
            "but only plain values can be handed over"
        )

    def output(self) -> str | None:
        """All that the program prints; None if it fails or prints too much."""
        data = b""
        while part := os.read(self.answers, 1 << 16):
            data += part
            if len(data) > MESSAGE:
                return None
        status = os.waitpid(self.process, 0)[1]
        return None if status else data.decode(errors="replace")


def exception(kind: str, message: str) -> Exception:
    """An exception that the program raised, as one of Python's own."""
    found = getattr(builtins, kind, None)
    if isinstance(found, type) and issubclass(found, Exception):
        with contextlib.suppress(TypeError):
            return found(message)
    return RuntimeError(message)


def live(program: list[str], text: str | None, seconds: float, requests: int, answers: int) -> None:
    """The life of a child."""
    limit(seconds)
    nothing = os.open("/dev/null", os.O_RDWR)
    source = nothing
    if text is not None:
        source = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
        with open(os.dup(source), "wb") as file:
            file.write(text.encode())
        os.lseek(source, 0, os.SEEK_SET)
    os.dup2(source, 0)
    os.dup2(nothing if text is None else answers, 1)
    os.dup2(nothing, 2)
    first = 3
    for file in sorted((requests, answers) if text is None else (requests,)):
        os.closerange(first, file)
        first = file + 1
    os.closerange(first, OPEN)
    exactly(requests, 1)
    module = types.ModuleType("__main__" if text is not None else "solution")
    sys.modules[module.__name__] = module
    try:
        for code in program:
            exec(compile(code, "solution.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit as end:
        if text is None or end.code not in (None, 0):
            raise
    if text is None:
        serve(module.__dict__, requests, answers)
    sys.stdout.flush()
    os._exit(0)


def serve(names: dict[str, Any], requests: int, answers: int) -> None:
    """Do what the tests ask for until they end."""
    objects: list[Any] = []

    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    while True:
        what, (kind, target), given = receive(requests, None)
        try:
            args, named = unpacked(given, objects.__getitem__)
            if kind == "name" and target not in names:
                raise NameError(f"name {target!r} is not defined")
            value = names[target] if kind == "name" else objects[target]
            if what != "get":
                value = OPERATIONS[what](value, *args, **named)
            answer = {"value": packed(value, keep)}
        except Exception as error:
            kinds = (k.__name__ for k in type(error).__mro__ if k.__module__ == "builtins")
            answer = {"raised": [next(kinds), str(error)[:SENTENCE]]}
        send(answers, answer)


def limit(seconds: float) -> None:
    """Limit this process for good: no other process or thread, little memory, few files."""
    for what, most in (
        ("NPROC", 0), ("FSIZE", FILE), ("NOFILE", FILES), ("CORE", 0), ("MEMLOCK", 0),
        ("MSGQUEUE", 0), ("CPU", int(seconds) + 1),
    ):  # fmt: skip
        resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most))


# The tests


class Remote:
    """An object of the program, which stays in its child. Comparisons never ask the child."""

    def __init__(self, child: Child, number: int):
        vars(self).update(_child=child, _number=number)

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Have the child call it."""
        return self._child.ask("call", self, *args, **named)

    def __getattr__(self, name: str) -> Any:
        return self._child.ask("attribute", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._child.ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._child.ask("item", self, key)

    def __iter__(self) -> Any:
        return iter(plain(list, self._child.ask("list", self)))

    def __len__(self) -> int:
        return plain(int, self._child.ask("len", self))

    def __bool__(self) -> bool:
        return plain(bool, self._child.ask("bool", self))

    def __str__(self) -> str:
        return plain(str, self._child.ask("str", self))


def plain(kind: type, value: Any) -> Any:
    """A value that must be of a kind."""
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} instead of {kind.__name__}")
    return value


class Names(dict):
    """The namespace of tests. What they do not define is Python's own, which the program cannot
    replace; then what the program defines, or of that only `entry`, if there is one."""

    def __init__(self, child: Child, entry: str | None):
        super().__init__(__name__="tests")
        self.child, self.entry = child, entry

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            return getattr(builtins, name)
        if name in sys.stdlib_module_names:
            return __import__(name)
        if self.entry not in (None, name):
            raise NameError(f"name {name!r} is not defined")
        return self.child.ask("get", name)


def tested(child: Child, setup: str, tests: str, entry: str | None) -> None:
    """Run tests of the program in a child.

    Raises:
        TestError: the tests are at fault. Exception: the program does not pass.
    """
    names = Names(child, entry)
    try:
        before, after = (compile(source, "tests.py", "exec") for source in (setup, tests))
    except (SyntaxError, ValueError) as error:
        raise TestError(f"the tests are not valid Python: {sentence(error)}") from None
    if entry is None:
        child.start()
        exec(before, names)
    else:
        try:
            exec(before, names)  # while the program cannot be at fault
        except Exception as error:
            raise TestError(f"the tests cannot be set up: {sentence(error)}") from None
        child.start()
        names[entry] = child.ask("get", entry)
    exec(after, names)
    if entry is not None and "check" in names:
        names["check"](names[entry])


def printed(children: list[Child], expected: list[str]) -> None:
    """Compare what programs print with what is expected, up to white space at the end of lines.

    Raises:
        AssertionError: they differ.
    """
    for number, (child, wanted) in enumerate(zip(children, expected, strict=True), 1):
        child.start()
        found = child.output()
        if found is None:
            raise AssertionError(f"the program fails on input {number}")
        if lines(found) != lines(wanted):
            raise AssertionError(f"the output for input {number} differs")


def lines(text: str) -> list[str]:
    """The lines of a text without white space at their ends, and without empty lines at its end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def sentence(error: BaseException) -> str:
    """An exception in one short line."""
    said = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {said}"[:SENTENCE]


def main() -> None:
    """Run a job from standard input and write the verdict."""
    sys.set_int_max_str_digits(0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.write(1, READY)
    job = receive(0, None)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))  # as process 1 it ignores the default
    signal.setitimer(signal.ITIMER_REAL, job["seconds"])
    inputs = [None] if job["inputs"] is None else job["inputs"]
    children = [Child(job["program"], text, job["seconds"]) for text in inputs]
    secret = receive(0, None)  # only now, so that no child holds a copy
    answer, nothing = os.dup(1), os.open("/dev/null", os.O_RDWR)
    for file in (0, 1, 2):  # the tests may print what they like
        os.dup2(nothing, file)
    verdict = {"token": secret["token"], "passed": False}
    try:
        if job["inputs"] is None:
            tested(children[0], secret["setup"], secret["tests"], secret["entry"])
        else:
            printed(children, secret["expected"])
        verdict["passed"] = True
    except TestError as error:
        verdict["fault"] = str(error)
    except BaseException as error:
        verdict["why"] = sentence(error)
    os.write(answer, json.dumps(verdict).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
