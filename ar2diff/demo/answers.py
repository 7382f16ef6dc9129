"""Counting questions as prompts and completions, for tuning and for evaluation.

python -m ar2diff.demo.answers train.jsonl --count 4000 --levels 1 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .corpus import MAX_NUMBER, corpus, prompt, text


def examples(
    count: int,
    seed: int,
    levels: Sequence[int],
    split: str = "train",
    largest: tuple[int, int] = (0, MAX_NUMBER),
) -> Iterator[dict]:
    """Documents of the corpus.

    Args:
        largest: range, both ends included, in which the largest number of the worked answer lies.
    """
    drawn = corpus(sys.maxsize, seed, tuple(levels), split)
    fitting = (e for e in drawn if largest[0] <= largest_number(e) <= largest[1])
    return itertools.islice(fitting, count)


def largest_number(example: dict) -> int:
    """The largest number in the worked answer."""
    return max(map(int, re.findall(r"\d+", example["answer_work"])), default=0)


def answers(
    count: int,
    seed: int,
    levels: Sequence[int],
    split: str = "train",
    largest: tuple[int, int] = (0, MAX_NUMBER),
) -> Iterator[dict[str, str]]:
    """Rows of `prompt` and `completion`, a story of the corpus in two, and `answer`, the right
    number."""
    for example in examples(count, seed, levels, split, largest):
        question = prompt(example)
        completion = text(example).removeprefix(question)
        yield {"prompt": question, "completion": completion, "answer": str(example["answer"])}


def write_answers(file: Path, *wanted: Any) -> None:
    """Write `answers(*wanted)` to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in answers(*wanted)))


def main() -> None:
    """Write a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--largest", type=int, nargs=2, default=[0, MAX_NUMBER], metavar=("FROM", "TO"),
        help="range in which the largest number of the worked answer lies",
    )  # fmt: skip
    parser.add_argument("--split", default="train", choices=["train", "valid"])
    args = parser.parse_args()
    write_answers(args.file, args.count, args.seed, args.levels, args.split, args.largest)


if __name__ == "__main__":
    main()
