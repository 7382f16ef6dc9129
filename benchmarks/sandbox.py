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
from typing import Any

from ar2diff.config.rl import Reward
from ar2diff.config.sections import Source
from ar2diff.core.errors import Ar2DiffError
from ar2diff.data.sources import read_source
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
    print("| what | median ms | slowest ms | processor ms |\n|---|---|---|---|")
    table("python -I -S -c pass, no sandbox", timed(bare, given.runs))
    job = Job(["def one(): return 1"], "assert one() == 1")
    worker = Worker(lambda: timed(lambda: judge(job, 60), given.runs), sandbox.enter)
    table("a program with its test", worker.values(600, {}))
    table("the check before a run", timed(sandbox.check_sandbox, max(1, given.runs // 4)), False)
    try:
        rows = [row for _, row in read_source(Source(path=given.data))]
    except Ar2DiffError as error:
        print(f"\nno program was judged: {error.what}")
        return
    judged(given.data, rows)


def bare() -> None:
    subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)


def timed(call: Callable[[], object], runs: int) -> Iterator[tuple[float, float]]:
    """Milliseconds of each call on the clock, and of the processes it has waited for on a
    processor, after one that does not count."""
    for run in range(runs + 1):
        began, used = time.perf_counter(), os.times()
        call()
        took, now = time.perf_counter() - began, os.times()
        if run:
            spent = now.children_user + now.children_system
            yield 1000 * took, 1000 * (spent - used.children_user - used.children_system)


def table(name: str, values: Iterator[tuple[float, float]], waited: bool = True) -> None:
    took, used = zip(*(value for value in values if value), strict=True)
    spent = f"{statistics.mean(used):.0f}" if waited else ""
    print(f"| {name} | {statistics.median(took):.0f} | {max(took):.0f} | {spent} |", flush=True)


def judged(data: str, rows: list[dict[str, Any]]) -> None:
    """The given solutions of HumanEval, and functions that return nothing."""
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
