"""Generations of a converted model beside its AR mode, where it has one, to be read by eye.

    python benchmarks/generations.py runs/stories260k --data tinystories/valid [--count 10]

Each prompt is the start of a held-out story; both modes are greedy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.checkpoint.model import Checkpoint
from ar2diff.data.sources import find_file, read_texts
from ar2diff.generation.complete import complete


def generations(
    checkpoint: Checkpoint, data: str, count: int, words: int, **settings: Any
) -> Iterator[str]:
    """Lines: a prompt of so many words, what each mode writes after it, and tokens per forward."""
    modes = ("ar", "diffusion") if checkpoint.spec.ar_mode else ("diffusion",)
    tokens = forwards = 0
    for text in read_texts(find_file(data), "text")[:count]:
        prompt = " ".join(text.split()[:words])
        yield f"\n{prompt} ..."
        for mode in modes:
            result = complete(checkpoint, prompt, mode=mode, **settings)
            yield f"  {mode:9} |{' '.join(result.text.split())}"
        tokens, forwards = tokens + result.new_tokens, forwards + result.forwards
    yield f"\ndiffusion: {tokens} tokens in {forwards} forwards, {tokens / forwards:.2f} a forward"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument(
        "--words", type=int, default=14, help="words of a story that are the prompt"
    )
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--threshold", type=float, default=0.9)
    args = parser.parse_args()
    settings = {"max_new_tokens": args.max_new_tokens, "threshold": args.threshold}
    checkpoint = load_checkpoint(args.model)
    for line in generations(checkpoint, args.data, args.count, args.words, **settings):
        print(line)


if __name__ == "__main__":
    main()
