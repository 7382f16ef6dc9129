"""Throughput and latency of `ar2diff serve` beside those of `transformers serve` on the base.

    AR2DIFF_DATA=path/to/data python benchmarks/serving.py
    AR2DIFF_DATA=path/to/data python benchmarks/serving.py --models demo --repeats 2    # quick

Models: the embedded default, and stories3M-hf where AR2DIFF_DATA names it. Our server has the
base with its draft adapter and writes the base's own text without loss; `ar2diff, ar` is the same
server, asked not to draft. Theirs has the base alone, in an environment of its own (`--venv`, made
where it is missing, with the versions of constraints.txt). It is tried in two modes, one answer
after the other and `--continuous-batching` in the settings that were found to be its best here
(`--dtype float32` in both, as half precision changes the text); at each concurrency the faster
mode, by core time in three tries, is the one that we are compared with; `trial` keeps both figures.

Each server is pinned to one core and one thread, the clients to another core. A server that is not
measured is stopped by SIGSTOP, so that it takes no time from the other. N clients ask one request
after the other, greedily, always of the same prompts with the same limit; so both servers' caches
of beginnings know them. Every answer is compared with the one that its server gave when it was
asked nothing else, which is also the warm-up, and those of both servers with each other. Answers
are asked for whole (throughput, latency) and as streams (time to the first text). Every repeat
measures all sides, in an order of its own; ratios are taken within a repeat. Tokens are those that
their server counts, for both. The ratio of core time is that of tokens by seconds that the server's
process computed: it hardly depends on what else the machine does.

Results replace the model's rows in benchmarks/results/serving.jsonl; `--table` prints them, and
writes benchmarks/results/serving.md.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "serving.jsonl"
TABLE = RESULTS.with_suffix(".md")
REQUESTS = {1: 16, 8: 96, 32: 192}  # of a measurement, by the number of clients, and of these
TIMES = {"demo": 4, "stories3m": 1}  # so many: some answers are short
PROMPTS = 48
CORES = sorted(os.sched_getaffinity(0))  # the first one for servers, the last for clients
SEQUENTIAL = ("--dtype", "float32")
BATCHING = (*SEQUENTIAL, "--continuous-batching", "--cb-num-blocks", "512", "--cb-block-size", "32")
THEIRS = {"one at a time": SEQUENTIAL, "continuous batching": BATCHING}
OURS: dict[str, dict[str, Any]] = {"ar2diff": {}, "ar2diff, ar": {"mode": "ar"}}
LIMITS = {"demo": 48, "stories3m": 96}  # new tokens of an answer


@dataclass
class Served:
    """A server that runs.

    Attributes:
        extra: fields that its requests have beside the common ones.
        lone: its answers when it is asked nothing else.
    """

    name: str
    process: subprocess.Popen[Any]
    port: int
    model: str
    limit: int
    extra: dict[str, Any] = field(default_factory=dict)
    lone: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def body(self, prompt: str, **more: Any) -> bytes:
        common = {"model": self.model, "prompt": prompt, "max_tokens": self.limit, "temperature": 0}
        return json.dumps({**common, **self.extra, **more}).encode()

    def cpu(self) -> float:
        """Seconds of a core that it has taken."""
        found = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(found[11]) + int(found[12])) / os.sysconf("SC_CLK_TCK")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run; it is stopped outside of this."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)


def asked(connection: http.client.HTTPConnection, body: bytes, stream: bool) -> tuple[str, float]:
    """The text that a server answers with, and when its first part came."""
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {answer.read()[:500]!r}")
    if not stream:
        value = json.loads(answer.read())
        return value["choices"][0]["text"], time.perf_counter()
    parts, first = [], math.nan
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        value = json.loads(line[6:])
        if "error" in value:
            raise RuntimeError(str(value["error"]))
        if value["choices"] and (part := value["choices"][0]["text"]):
            first = first if parts else time.perf_counter()
            parts.append(part)
    return "".join(parts), first


def measured(
    server: Served, prompts: list[str], clients: int, requests: int, stream: bool
) -> dict[str, Any]:
    """Figures of a number of clients that ask one request after the other."""
    left, lock = iter(range(requests)), threading.Lock()
    latencies: list[float] = []
    firsts: list[float] = []
    texts: list[tuple[str, str]] = []
    errors: list[BaseException] = []
    bodies = {prompt: server.body(prompt, stream=stream) for prompt in prompts}

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        try:
            while (number := taken()) is not None:
                prompt = prompts[number % len(prompts)]
                start = time.perf_counter()
                text, first = asked(connection, bodies[prompt], stream)
                latencies.append(time.perf_counter() - start)
                firsts.append(first - start)
                texts.append((prompt, text))
        except BaseException as error:
            errors.append(error)
        finally:
            connection.close()

    def taken() -> int | None:
        with lock:
            return next(left, None)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    own, cpu, start = time.process_time(), server.cpu(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if errors:
        raise errors[0]
    tokens = sum(server.tokens[prompt] for prompt, _ in texts)
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / (server.cpu() - cpu),
        "latency": statistics.median(latencies),
        "latency_p95": p95(latencies),
        **({"first": statistics.median(firsts), "first_p95": p95(firsts)} if stream else {}),
        "different": sum(text != server.lone[prompt] for prompt, text in texts),
        "answers": len(texts),
        "clients_load": (time.process_time() - own) / seconds,
    }


def p95(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def prompts_of(name: str) -> list[str]:
    """Held-out questions of the embedded model, or beginnings of held-out stories."""
    if name == "demo":
        from ar2diff.demo.corpus import corpus, prompt

        return [prompt(example) for example in corpus(PROMPTS, 9, (1, 2), "valid")]
    from ar2diff.data.sources import find_file, read_texts

    texts = read_texts(find_file("tinystories/valid"), "text")
    return [" ".join(text.split()[:24]) for text in texts if len(text.split()) > 48][:PROMPTS]


def folders_of(name: str, work: Path) -> tuple[Path, Path]:
    """The base, and its draft adapter, which names the base by its path."""
    if name == "demo":
        from ar2diff.demo.__main__ import DRAFT, MODEL

        return MODEL, DRAFT
    base = Path(os.environ["AR2DIFF_DATA"]).resolve() / "stories3M-hf"
    source, draft = ROOT / "benchmarks" / "drafts_stories3m", work / "draft"
    draft.mkdir()
    (draft / "draft.safetensors").write_bytes((source / "draft.safetensors").read_bytes())
    named = json.loads((source / "draft.json").read_text()) | {"base": str(base)}
    (draft / "draft.json").write_text(json.dumps(named))
    return base, draft


def environment(folder: Path) -> Path:
    """Where `transformers serve` is installed; installs it if it is missing."""
    command = folder / "bin" / "transformers"
    if not command.exists():
        print(f"installing transformers[serving] in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(folder / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", "-c"]
        pip.append(str(ROOT / "constraints.txt"))
        subprocess.run([*pip, "torch"], check=True)
        subprocess.run([*pip, "transformers[serving]"], check=True)
    return command


@contextlib.contextmanager
def serving(name: str, words: list[Any], model: str, limit: int, work: Path) -> Iterator[Served]:
    """A server on the first core, stopped until it is measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (work / f"{name}.log").open("w+") as log:
        process = subprocess.Popen(
            [*map(str, words), "--host", "127.0.0.1", "--port", str(port)],
            env=env, stdout=log, stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, CORES[:1]),
        )  # fmt: skip
        try:
            wait(process, port, work / f"{name}.log")
            yield Served(name, process, port, model, limit)
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(60)


def wait(process: subprocess.Popen[Any], port: int, log: Path) -> None:
    """Until a server says that it is healthy; stop it then."""
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"the server ended: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                process.send_signal(signal.SIGSTOP)
                return
        time.sleep(0.2)
    raise SystemExit(f"the server does not answer: {log.read_text()[-2000:]}")


def warm(server: Served, prompts: list[str]) -> None:
    """Ask for every answer alone, then for some of them together."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    for prompt in prompts:
        connection.request(
            "POST", "/v1/completions", server.body(prompt), {"Content-Type": "application/json"}
        )
        value = json.loads(connection.getresponse().read())
        server.lone[prompt] = value["choices"][0]["text"]
        server.tokens[prompt] = value["usage"]["completion_tokens"]
    connection.close()
    for clients in REQUESTS:
        measured(server, prompts, clients, 2 * clients, stream=clients == 8)


def run(name: str, asked_for: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Measure a model; a row for each side and concurrency."""
    prompts, (base, draft), limit = prompts_of(name), folders_of(name, work), LIMITS[name]
    other = [environment(asked_for.venv), "serve", base, "--device", "cpu"]
    own = [Path(sys.executable).parent / "ar2diff", "serve", draft, "--model-name", "model"]
    with contextlib.ExitStack() as stack:
        theirs = [
            stack.enter_context(serving(mode, [*other, *flags], str(base), limit, work))
            for mode, flags in THEIRS.items()
        ]
        drafting = stack.enter_context(serving("ar2diff", own, "model", limit, work))
        ours = [
            Served(side, drafting.process, drafting.port, "model", limit, extra)
            for side, extra in OURS.items()
        ]
        for server in (*theirs, *ours):
            with server.awake():
                warm(server, prompts)
            server.tokens = theirs[0].tokens
        rows = []
        for clients in asked_for.clients:
            requests = REQUESTS[clients] * TIMES[name]
            trial = trial_of(theirs, prompts, clients, max(2 * clients, requests // 6))
            best = max(theirs, key=lambda s: trial[s.name])
            cells = repeated([best, *ours], prompts, clients, requests, asked_for.repeats)
            for server in (best, *ours):
                rows.append(row_of(name, clients, server, best, cells[server.name]))
                if server is best:
                    rows[-1]["trial"] = rounded(trial)
                print(json.dumps(rows[-1]), flush=True)
    return rows


def trial_of(
    servers: list[Served], prompts: list[str], clients: int, requests: int
) -> dict[str, float]:
    """Tokens by seconds that each server computed, the median of three tries in turn."""
    found: dict[str, list[float]] = {server.name: [] for server in servers}
    for server in servers * 3:
        with server.awake():
            cell = measured(server, prompts, clients, requests, stream=False)
        found[server.name].append(cell["tokens_per_cpu_second"])
    return {name: statistics.median(each) for name, each in found.items()}


def repeated(
    servers: list[Served], prompts: list[str], clients: int, requests: int, repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Every side's figures in every repeat, whole answers and streams."""
    cells: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
    for repeat in range(repeats):
        turn = repeat % len(servers)
        for server in [*servers[turn:], *servers[:turn]]:
            with server.awake():
                whole = measured(server, prompts, clients, requests, stream=False)
                parts = measured(server, prompts, clients, requests, stream=True)
            cells[server.name].append({"whole": whole, "stream": parts})
    return cells


def row_of(
    name: str, clients: int, server: Served, best: Served, cells: list[dict[str, Any]]
) -> dict[str, Any]:
    """What is kept of a side: medians over the repeats, and every repeat's throughput."""
    told: dict[str, Any] = {"model": name, "clients": clients, "side": server.name}
    told["other_texts"] = sum(
        # their server leaves out the space that an answer begins with
        text.removeprefix(" ") != best.lone[prompt].removeprefix(" ")
        for prompt, text in server.lone.items()
    )
    told["prompts"] = len(server.lone)
    for kind in ("whole", "stream"):
        found = [cell[kind] for cell in cells]
        means = {key: statistics.median(c[key] for c in found) for key in found[0]}
        means |= {key: sum(c[key] for c in found) for key in ("different", "answers")}
        told[kind] = rounded(means)
        told[kind]["each"] = [round(c["tokens_per_second"], 1) for c in found]
        told[kind]["each_cpu"] = [round(c["tokens_per_cpu_second"], 1) for c in found]
    return told


def rounded(cell: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, int) else float(f"{v:.4g}") for k, v in cell.items()}


def ratio(row: dict[str, Any], other: dict[str, Any], key: str) -> str:
    """Mean and standard error of the ratios within the repeats, for whole answers."""
    each = [a / b for a, b in zip(row["whole"][key], other["whole"][key], strict=True)]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return f"{statistics.mean(each):.2f} ± {error:.2f}x"


def replace(name: str, rows: list[dict[str, Any]]) -> None:
    """Write a model's rows in place of those that there are."""
    about = {package: version(package) for package in ("torch", "transformers")}
    kept = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    kept = [line for line in kept if json.loads(line)["model"] != name]
    new = [json.dumps(row | {"versions": about}) for row in rows]
    RESULTS.write_text("".join(f"{line}\n" for line in (*kept, *new)))


def table() -> str:
    """The results in markdown."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    lines = [
        "| model | clients | server | tokens/s | ratio | ratio of core time | latency, p95 (s) | "
        "first text, p95 (s) | answers that differ |",
        "|---" * 9 + "|",
    ]
    theirs: dict[str, Any] = {}
    for row in rows:
        ours = row["side"] in OURS
        theirs = theirs if ours else row
        name = row["side"] if ours else f"transformers, {row['side']}"
        by = [ratio(row, theirs, key) if ours else "1" for key in ("each", "each_cpu")]
        whole, parts = row["whole"], row["stream"]
        differ = whole["different"] + parts["different"]
        of = whole["answers"] + parts["answers"]
        lines.append(
            f"| {row['model']} | {row['clients']} | {name} | {whole['tokens_per_second']:,.0f} | "
            f"{by[0]} | {by[1]} | {whole['latency']:.3f}, {whole['latency_p95']:.3f} | "
            f"{parts['first']:.3f}, {parts['first_p95']:.3f} | {differ} of {of} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=LIMITS)
    parser.add_argument("--clients", nargs="+", type=int, choices=REQUESTS, default=list(REQUESTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--venv", type=Path, default=ROOT / "runs" / "transformers-serve")
    parser.add_argument("--table", action="store_true")
    asked_for = parser.parse_args()
    if not asked_for.table:
        os.sched_setaffinity(0, CORES[-1:])
        names = asked_for.models or (
            ["demo", "stories3m"] if "AR2DIFF_DATA" in os.environ else ["demo"]
        )
        for name in names:
            with tempfile.TemporaryDirectory() as work:
                rows = run(name, asked_for, Path(work))
            about = {"versions": {n: version(n) for n in ("torch", "transformers")}}
            kept = RESULTS.read_text().splitlines() if RESULTS.exists() else []
            kept = [line for line in kept if json.loads(line)["model"] != name]
            RESULTS.write_text(
                "".join(f"{line}\n" for line in [*kept, *(json.dumps(row | about) for row in rows)])
            )
    TABLE.write_text(table())
    print(table())


if __name__ == "__main__":
    main()
