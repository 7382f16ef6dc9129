"""Digits in steps ("1,7,3:5" asks for the next five of a sequence modulo 10), by rewards.

    python benchmarks/digits.py runs/demo      # the embedded default, adapted; needs AR2DIFF_DATA

The model is tuned on sequences that go on for an even number of digits, and on some of those that
go on for an odd number: where the step is 1. The task asks for 3, 5 or 7 more at all steps:
recipe `digits` trains on the prompts of rl-digits/train and is told whether an answer is right.
Judged on the prompts of both files, greedily and as it samples, one seed. No prompt of the test
file is in either training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from rl import write_rows
from sft import decoded, distinct_2

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.config.sections import Source
from ar2diff.data.sources import read_source
from ar2diff.training.rl import rl
from ar2diff.training.sft import sft

RESULTS = Path(__file__).parent / "results"
LENGTHS, ODD_STEPS = range(1, 9), (1,)


def sequences() -> list[dict[str, str]]:
    """Rows of SFT."""
    held_out = {row["prompt"] for row in rows_of("test")}
    rows = []
    for start, step, length in itertools.product(range(10), range(1, 10), LENGTHS):
        if length % 2 and step not in ODD_STEPS:
            continue
        digits = [str((start + step * k) % 10) for k in range(3 + length)]
        prompt = f"{','.join(digits[:3])}:{length}"
        rows.append({"prompt": prompt, "completion": f" {','.join(digits[3:])}"})
    return [row for row in rows if row["prompt"] not in held_out]


def rows_of(split: str) -> list[dict[str, str]]:
    """Prompts and answers of rl-digits."""
    return [row for _, row in read_source(Source(path=f"rl-digits/{split}"))]


def judged(folder: Path, split: str, show: int = 0) -> dict[str, Any]:
    """Shares of right answers to a split's prompts."""
    checkpoint = load_checkpoint(str(folder))
    rows = rows_of(split)
    ids = [checkpoint.tokenizer(row["prompt"]).input_ids for row in rows]
    found: dict[str, Any] = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        result = decoded(checkpoint, ids, 1, 50, max_new_tokens=24, temperature=temperature,
                         threshold=0.9, seed=0)  # fmt: skip
        texts = [text.strip() for (text,) in result["texts"]]
        right = [text == row["answer"] for text, row in zip(texts, rows, strict=True)]
        found[name] = {
            "exact": sum(right) / len(rows), "length": result["tokens"] / len(rows),
            "stop": sum(s[0] for s in result["stopped"]) / len(rows),
            "distinct_2": distinct_2(texts), "tokens_per_forward": result["tokens_per_forward"],
        }  # fmt: skip
        for row, text in list(zip(rows, texts, strict=True))[:show]:
            print(f"   {split}, {name}: {row['prompt']} -> {text} ({row['answer']})", flush=True)
    return found


def main() -> None:
    """Tune, train, judge before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the embedded default, converted")
    parser.add_argument("overrides", nargs="*", help="recipe fields, of RL")
    parser.add_argument("--sft-steps", type=int, default=220)
    parser.add_argument("--show", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/digits"))
    parser.add_argument("--output", type=Path, default=RESULTS / "digits.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = write_rows(args.work / "sequences.jsonl", sequences())
    tuned, trained = args.work / "tuned", args.work / "trained"
    fields = [f"data.sources=[{data}]", f"train.max_steps={args.sft_steps}",
              "train.per_device_train_batch_size=3"]  # fmt: skip
    if not (tuned / "config.json").exists():
        sft(args.model, load_recipe("demo-sft", fields), tuned)
    result = {"before": {s: judged(tuned, s, args.show) for s in ("test", "train")}}
    print(json.dumps(result), flush=True)
    start = time.process_time()
    recipe = load_recipe("digits", ["data.sources=[rl-digits/train]", *args.overrides])
    rl(str(tuned), recipe, trained, overwrite=True)
    result |= {"seconds": round(time.process_time() - start), "steps": recipe.train.max_steps}
    result["after"] = {s: judged(trained, s, args.show) for s in ("test", "train")}
    print(json.dumps(result), flush=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
