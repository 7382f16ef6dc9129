"""Counting questions as prompts and completions, to tune on or to be judged by.

python -m ar2diff.demo.answers train.jsonl --count 4000 --levels 1 2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from .corpus import corpus, prompt, text


def answers(
    count: int, seed: int, levels: Sequence[int], split: str = "train"
) -> Iterator[dict[str, str]]:
    """Rows of `prompt` and `completion`, a story of the corpus in two, and `answer`, the right
    number."""
    for example in corpus(count, seed, tuple(levels), split):
        question = prompt(example)
        completion = text(example).removeprefix(question)
        yield {"prompt": question, "completion": completion, "answer": str(example["answer"])}


def main() -> None:
    """Write a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--split", default="train", choices=["train", "valid"])
    args = parser.parse_args()
    args.file.parent.mkdir(parents=True, exist_ok=True)
    rows = answers(args.count, args.seed, args.levels, args.split)
    args.file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


if __name__ == "__main__":
    main()
