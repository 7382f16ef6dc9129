"""Seconds until `ar2diff --help` and a recipe error answer, beside an empty Python interpreter.

python benchmarks/startup.py [--runs 10]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

CASES = {
    "python -c pass": ["-c", "pass"],
    "ar2diff --help": ["-m", "ar2diff", "--help"],
    "ar2diff adapt --help": ["-m", "ar2diff", "adapt", "--help"],
    "a recipe error": ["-m", "ar2diff", "adapt", "model", "train.learning_rat=1"],
    "ar2diff recipes ls": ["-m", "ar2diff", "recipes", "ls"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    print("| command | median s | slowest s |\n|---|---|---|")
    for name, arguments in CASES.items():
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
            seconds.append(time.perf_counter() - start)
        print(f"| {name} | {statistics.median(seconds):.2f} | {max(seconds):.2f} |")


if __name__ == "__main__":
    main()
