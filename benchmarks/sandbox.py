"""What the sandbox of code rewards costs: its start, its check before a run, and programs judged.

python benchmarks/sandbox.py [--runs 20] [--data humaneval/HumanEval.jsonl.gz]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from ar2diff.config.rl import Reward
from ar2diff.config.sections import Source
from ar2diff.data.sources import find_file, read_source
from ar2diff.rewards import sandbox
from ar2diff.rewards.loading import make_rewards
from ar2diff.rewards.sandbox import Job, judge
from ar2diff.rewards.workers import Worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--data", default="humaneval/HumanEval.jsonl.gz")
    given = parser.parse_args()
    processors = len(os.sched_getaffinity(0))
    print(
        f"bubblewrap {sandbox.version()}, Python {sys.version.split()[0]}, {processors} "
        f"processors, load {os.getloadavg()[0]:.1f}, {'root' if not os.geteuid() else 'no root'}\n"
    )
    print("| what | median ms | slowest ms |\n|---|---|---|")
    table("python -I -S -c pass, no sandbox", timed(bare, given.runs))
    job = Job(["def one(): return 1"], "assert one() == 1")
    worker = Worker(lambda: timed(lambda: judge(job, 60), given.runs), sandbox.enter)
    table("a program with its test", worker.values(600, {}))
    table("the check before a run", timed(sandbox.check_sandbox, max(1, given.runs // 4)))
    if find_file(given.data):
        judged(given.data)


def bare() -> None:
    subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)


def timed(call: Callable[[], object], runs: int) -> Iterator[float]:
    """Milliseconds of each call, after one that does not count."""
    for run in range(runs + 1):
        began = time.perf_counter()
        call()
        if run:
            yield 1000 * (time.perf_counter() - began)


def table(name: str, took: Iterator[float]) -> None:
    values = [value for value in took if value is not None]
    print(f"| {name} | {statistics.median(values):.0f} | {max(values):.0f} |", flush=True)


def judged(data: str) -> None:
    """The given solutions of HumanEval, and functions that return nothing."""
    rows = [row for _, row in read_source(Source(path=data))]
    reward = make_rewards([Reward(name="code")])[0]
    columns = {name: [row[name] for row in rows] for name in ("test", "entry_point")}
    columns["prompts"] = [row["prompt"] for row in rows]
    for name, completions in (
        ("given solutions", [row["canonical_solution"] for row in rows]),
        ("functions that return None", ["    return None\n"] * len(rows)),
    ):
        began = time.perf_counter()
        values = reward(completions=completions, **columns)
        seconds = time.perf_counter() - began
        print(f"\n{data}: {sum(values):.0f} of {len(rows)} {name} pass, in {seconds:.1f} s")


if __name__ == "__main__":
    main()
