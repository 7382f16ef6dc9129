"""Generations of a converted model beside its AR mode, to be read by eye.

    python benchmarks/generations.py runs/stories260k --data tinystories/valid [--count 10]

Each prompt is the start of a held-out story; both modes are greedy.
"""

from __future__ import annotations

import argparse

from ar2diff.checkpoint import load_checkpoint
from ar2diff.decoding import complete
from ar2diff.sources import find_file, read_texts


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
    checkpoint = load_checkpoint(args.model)
    totals = {"diffusion": [0, 0], "ar": [0, 0]}
    for text in read_texts(find_file(args.data), "text")[: args.count]:
        prompt = " ".join(text.split()[: args.words])
        print(f"\n{prompt} ...")
        for mode in ("ar", "diffusion"):
            result = complete(
                checkpoint,
                prompt,
                max_new_tokens=args.max_new_tokens,
                mode=mode,
                threshold=args.threshold,
            )
            totals[mode][0] += result["new_tokens"]
            totals[mode][1] += result["forwards"]
            print(f"  {mode:9} |{' '.join(result['text'].split())}")
    tokens, forwards = totals["diffusion"]
    print(f"\ndiffusion: {tokens} tokens in {forwards} forwards, {tokens / forwards:.2f} a forward")


if __name__ == "__main__":
    main()
