"""What the approximate caches of a `full` model cost: drift of the logits, and answers.

    python benchmarks/cache_drift.py runs/demo-full [--block-length 8] [--prompts 100]

Questions of the embedded corpus, greedy, threshold 0.9, blocks of the canvas decided in turn. Every
cached step is computed without the cache too. Drift: largest error of a step's logits in parts of
the largest logit, mean and maximum over the steps; agreement: share of masked tokens whose
likeliest one is the same. Block models are exact: their rows are the control.
"""

from __future__ import annotations

import argparse

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.core.denoise import denoise
from ar2diff.core.generate import canvas_of
from ar2diff.demo import corpus
from ar2diff.generation.complete import settings_of

BATCH = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--block-length", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.model)
    examples = list(corpus.corpus(args.prompts, 2, (1, 2), "valid"))
    prompts = [checkpoint.tokenizer(corpus.prompt(e)).input_ids for e in examples]
    full = checkpoint.spec.attention == "full"
    print("| cache | tokens/forward | right | drift, mean | drift, largest | agreement |")
    print("|---|---|---|---|---|---|")
    for cache in ("none", "prefix", "dual") if full else ("none", "dynamic", "static"):
        settings = {
            "cache_implementation": cache, "block_length": args.block_length, "temperature": 0,
            "max_new_tokens": args.max_new_tokens, "check_cache": True,
        }  # fmt: skip
        spec, options = settings_of(checkpoint, settings)
        right, tokens, forwards, drift = 0.0, 0, 0, []
        for first in range(0, len(prompts), BATCH):
            batch = prompts[first : first + BATCH]
            canvas = canvas_of(checkpoint.model, spec, batch, options)
            for _ in denoise(checkpoint.model, spec, canvas, options):
                pass
            for row, example in enumerate(examples[first : first + BATCH]):
                new = canvas.new_ids(row)
                tokens += len(new)
                text = checkpoint.tokenizer.decode(new, skip_special_tokens=True)
                right += corpus.score(example, text)
            forwards += int(canvas.forwards.sum())
            drift += canvas.drift
        errors, same = zip(*drift, strict=True)
        print(
            f"| {cache} | {tokens / forwards:.2f} | {right / len(prompts):.3f} "
            f"| {sum(errors) / len(errors):.2g} | {max(errors):.2g} | {sum(same) / len(same):.3f} |"
        )


if __name__ == "__main__":
    main()
