"""Attack a server: `python tests/fuzz/server.py --count 10000`, or `--case 17` to see one.

Each case is a client that is malformed, hostile or clumsy; a seed and a number make the same one.
Whatever it sends, the server has to answer it in the form of OpenAI's errors, or normally, or to
close the connection, within the time limit; never with a 500, with a path or with a traceback. In
between, and after all, a normal request has to get the text that it always gets. All else is a
finding, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]  # its own modules, and those of the tests

import wires  # noqa: E402
from served import chat_model  # noqa: E402

LIMIT = 90.0  # seconds after which a client has been left hanging
FLOOD = 64 << 20  # bytes of an answer
LONG = 2000  # characters of an error
CLIENTS = 16
LEAKS = re.compile(
    r"Traceback|File \"|site-packages|\.py\b|<[\w.]+ object at|" + re.escape(str(ROOT))
)
NORMAL = {"prompt": "Tom had 3 apples", "max_tokens": 6, "temperature": 0}
# The server with less patience than it has by default, so that slow clients are soon told off.
LAUNCHER = """
from dataclasses import dataclass
from ar2diff.cli.main import main
from ar2diff.core import index
from ar2diff.serving import limits

@dataclass(frozen=True)
class Impatient(limits.Limits):
    patience: float = 2.0
    headers: float = 2.0

limits.Limits = Impatient
index.SECONDS, index.MEMORY = 3, 1 << 30
main()
"""


@dataclass
class Server:
    """A server's process, and where it listens."""

    process: subprocess.Popen[Any]
    port: int
    log: Path

    def rss(self) -> int:
        """Bytes of memory that it holds."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def bugs(self) -> list[str]:
        """What its log holds that nobody has foreseen, each once."""
        lines = self.log.read_text().splitlines()
        told = [line for line in lines if line[:1] != "{" or '"level": "error"' in line]
        return sorted({line[line.find('"error": "') :] for line in told[1:]})

    def ask(self, body: Any = NORMAL, path: str = "/v1/completions") -> Any:
        """The JSON that a sound request is answered with."""
        data = wires.sent(path, json.dumps(body).encode(), "Connection: close")
        [(status, _, answer)] = answers_of(exchange(self.port, [data])[0])
        if status != 200:
            raise AssertionError(f"{status}: {answer[:500]!r}")
        return json.loads(answer)

    def text(self) -> str:
        """What the normal request is answered with."""
        return self.ask()["choices"][0]["text"]


@contextlib.contextmanager
def serving(model: str | Path, work: Path, *options: str) -> Iterator[Server]:
    """A server that answers; in a process of its own, as it may crash."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", LAUNCHER, "serve", str(model), "--port", str(port), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = work / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=work)
        try:
            began = time.monotonic()
            while not _answers(port):
                told = log.read_text()[-2000:]
                assert process.poll() is None and time.monotonic() - began < 120, told
                time.sleep(0.05)
            yield Server(process, port, log)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return (
            b" 200 "
            in exchange(port, [wires.head("/health", "Connection: close", method="GET")])[0]
        )
    return False


def exchange(port: int, steps: list[Any]) -> tuple[bytes, float]:
    """Do the steps of a client, and read until the server closes the connection.

    Returns:
        What was read, and the seconds that it took; more than `LIMIT` if the server never closed.
    """
    began, read = time.monotonic(), bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as client:
        try:
            for step in steps:
                if isinstance(step, float):
                    time.sleep(step)
                elif step == "half":
                    client.shutdown(socket.SHUT_WR)
                elif step == "read":
                    read += client.recv(65536)
                elif step in ("reset", "close"):
                    if step == "reset":
                        client.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                    return bytes(read), time.monotonic() - began
                else:
                    client.sendall(step)
            while (part := client.recv(1 << 16)) and len(read) < FLOOD:
                read += part
                if time.monotonic() - began > LIMIT:
                    break
        except TimeoutError:
            return bytes(read), LIMIT + 1
        except OSError:  # the server has closed the connection while we were sending
            pass
    return bytes(read), time.monotonic() - began


def answers_of(data: bytes, headless: bool = False) -> list[tuple[int, dict[str, str], bytes]]:
    """Status, headers and body of the answers that a connection carried; interim ones left out.

    Raises:
        ValueError: they are not whole, or no HTTP.
    """
    found = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.1 (\d{3})( .*)?", first)
        if match is None or not end:
            raise ValueError(f"no answer of HTTP: {head[:80]!r}")
        names = dict((part.lower() for part in line.split(": ", 1)) for line in lines)
        status = int(match[1])
        if status < 200:
            continue
        if headless or status in (204, 304):
            body = b""
        elif names.get("transfer-encoding") == "chunked":
            body, data = _unchunked(data)
        elif "content-length" in names:
            size = int(names["content-length"])
            body, data = data[:size], data[size:]
            if len(body) < size:
                raise ValueError(f"{len(body)} bytes of {size}")
        else:
            body, data = data, b""
        found.append((status, names, body))
    return found


def _unchunked(data: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size, end, data = data.partition(b"\r\n")
        count = int(size, 16)
        if not end or len(data) < count + 2:
            raise ValueError("a chunk is cut")
        body, data = body + data[:count], data[count + 2 :]
        if not count:
            return body, data


def judge(case: wires.Case, data: bytes, seconds: float) -> Iterator[str]:
    """What is wrong with what a client got."""
    if seconds > LIMIT:
        yield f"no end after {LIMIT:.0f} s"
        return
    if case.steps[-1:] in (["close"], ["reset"], ["half"]):
        return  # it has not read all of it
    try:
        answers = answers_of(data, case.headless)
    except ValueError as error:
        yield f"no answer: {error}"
        return
    if not answers and not case.silent:
        yield "no answer"
    if case.answers is not None and len(answers) > case.answers:
        yield f"{len(answers)} answers"
    for status, names, body in answers:
        kind = names.get("content-type", "").partition(";")[0]
        if status >= 500:
            yield f"status {status}: {body[:300]!r}"
        elif case.headless:
            continue
        elif status >= 400:
            yield from _error(status, kind, body)
        elif kind == "text/event-stream":
            yield from _events(body)
        elif kind == "application/json":
            yield from _json(body)


def _error(status: int, kind: str, body: bytes) -> Iterator[str]:
    try:
        error = json.loads(body)["error"]
        named = set(error) == {"message", "type", "param", "code"} and kind == "application/json"
    except (ValueError, KeyError, TypeError):
        named = False
    if not named:
        yield f"{status} not in OpenAI's form, {kind}: {body[:200]!r}"
        return
    told = error["message"]
    if not isinstance(told, str) or not told or len(told) > LONG:
        yield f"{status} with a message of {len(told or '')} characters: {str(told)[:200]!r}"
    elif LEAKS.search(told):
        yield f"{status} tells too much: {told[:300]!r}"
    if not isinstance(error["param"], str | None) or not isinstance(error["type"], str):
        yield f"{status} with odd fields: {error!r}"


def _events(body: bytes) -> Iterator[str]:
    events = body.decode().split("\n\n")
    if events[-2:] != ["data: [DONE]", ""]:
        yield f"a stream ends with {events[-2:]!r}"
    for event in events[:-2]:
        if event.startswith(":"):
            continue
        value = json.loads(event.removeprefix("data: "))
        if "error" in value:
            yield from _error(400, "application/json", event.removeprefix("data: ").encode())
            if value["error"]["type"] == "server_error":
                yield f"a stream tells of an error of the server: {value!r}"


def _json(body: bytes) -> Iterator[str]:
    try:
        value = json.loads(body, parse_constant=lambda name: 1 / 0)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, ZeroDivisionError) as error:
        yield f"an answer is not JSON ({error!r}): {body[:200]!r}"


def attack(
    server: Server, seed: int, numbers: range, heavy: bool, every: int = 4
) -> tuple[dict[str, list[int]], Counter[Any]]:
    """Run cases, several at once.

    Args:
        every: after so many cases of a client, it makes the normal request.

    Returns:
        {finding: numbers of the cases that have it}, and how many answers had which status.
    """
    want, statuses = server.text(), Counter()
    found: dict[str, list[int]] = {}
    lock = threading.Lock()

    def run(number: int) -> None:
        case = wires.make(seed, number, heavy)
        try:
            data, seconds = exchange(server.port, case.steps)
            findings = [*judge(case, data, seconds)]
        except OSError as error:
            findings = [f"no connection: {error!r}"]
            data = b""
        if number % every == 0:
            findings += [*_normal(server, want)]
        with lock:
            statuses.update(re.findall(rb"HTTP/1\.1 (\d{3})", data) or ["none"])
            for finding in findings:
                found.setdefault(finding, []).append(number)

    with ThreadPoolExecutor(CLIENTS) as pool:
        for future in [pool.submit(run, number) for number in numbers]:
            future.result()
    for finding in _normal(server, want):
        found.setdefault(f"afterwards: {finding}", []).append(numbers[-1])
    return found, statuses


def _normal(server: Server, want: str) -> Iterator[str]:
    try:
        got = server.text()
    except (AssertionError, OSError, ValueError) as error:
        yield f"a normal request: {error!r}"
        return
    if got != want:
        yield f"a normal request got {got!r} in place of {want!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--case", type=int, help="run this one, and show it whole")
    parser.add_argument("--heavy", action="store_true", help="with automata that take seconds")
    parser.add_argument("--model", help="folder of another model than the embedded one")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(serving(given.model or chat_model(work / "model"), work))
        if given.case is not None:
            case = wires.make(given.seed, given.case, given.heavy)
            print(*case.notes, sep="\n")
            for step in case.steps:
                print(repr(step)[:3000])
            data, seconds = exchange(server.port, case.steps)
            findings = [*judge(case, data, seconds)]
            print(f"--- {seconds:.2f} s\n{data[:20_000].decode('latin-1')}\n--- {findings}")
            print(server.log.read_text()[-3000:])
            return bool(findings)
        began = time.monotonic()
        found, statuses = attack(server, given.seed, range(given.count), given.heavy)
        for finding, numbers in sorted(found.items(), key=lambda f: -len(f[1])):
            print(f"{len(numbers)} x {finding}  (cases {numbers[:5]})")
        print(f"{given.count} cases in {time.monotonic() - began:.0f} s: {dict(statuses)}")
        print(*server.bugs(), sep="\n")
        print(f"memory: {server.rss() >> 20} MB; the server runs: {server.process.poll() is None}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
