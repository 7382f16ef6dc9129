"""LoRA against full tuning: the embedded default, converted, tuned by the recipe `demo` at equal
steps, the diffusion bound before and after.

    python benchmarks/lora.py [--steps 500] [--seeds 0] [key=value ...]

Full tuning has the recipe's learning rate, 2e-3, adapters 1e-2; neither was searched for. Judged
on 64 held-out stories, 64 tokens each, 8 noise draws. Results are appended to
benchmarks/results/lora.jsonl as they come; `--table` prints them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "lora.jsonl"
STORIES, JUDGED, LENGTH = 6000, 64, 64
WAYS: dict[str, list[str]] = {
    "full": [],
    "LoRA r=12": ["peft.r=12", "peft.alpha=24", "train.learning_rate=1e-2"],
    "DoRA r=12": ["peft.method=dora", "peft.r=12", "peft.alpha=24", "train.learning_rate=1e-2"],
    "QLoRA r=12": [
        "peft.r=12", "peft.alpha=24", "train.learning_rate=1e-2", "quantization.kind=nf4",
    ],
}  # fmt: skip


def run(way: str, overrides: list[str], steps: int, seed: int, work: Path) -> dict:
    from ar2diff.checkpoint.io import load_checkpoint
    from ar2diff.config.recipe import load_recipe
    from ar2diff.demo.__main__ import MODEL, write_stories
    from ar2diff.training.adapt import adapt

    data, base = work / "stories.jsonl", work / "base"
    if not base.exists():
        write_stories(data, STORIES)
        adapt(str(MODEL), load_recipe("demo", ["train.max_steps=0", "eval.steps=0"]), base)
    settings = [
        f"data.sources=[{data}]", f"train.max_steps={steps}", f"train.seed={seed}",
        "eval.steps=0", "eval.panel_steps=0", *overrides,
    ]  # fmt: skip
    start = time.monotonic()
    folder = work / f"{way}-{seed}-{start}"
    record = adapt(str(base), load_recipe("demo", settings), folder)
    seconds = time.monotonic() - start
    return {
        "way": way,
        "overrides": overrides,
        "steps": steps,
        "seed": seed,
        "parameters": record.trainable_parameters,
        "share": record.trainable_parameters / record.parameters,
        "seconds": round(seconds),
        "before": bound(load_checkpoint(str(base))),
        "after": bound(load_checkpoint(str(folder))),
    }


def bound(checkpoint) -> float:
    from ar2diff.demo.corpus import PRETRAIN_LEVELS, corpus, text
    from ar2diff.evaluation.score import score, windows

    held_out = [text(e) for e in corpus(JUDGED * 4, 0, PRETRAIN_LEVELS, "valid")]
    rows = windows(held_out, checkpoint.tokenizer, LENGTH, JUDGED)
    return score(checkpoint, rows, samples=8).bound.nats_per_token


def table(rows: list[dict]) -> str:
    lines = [
        "| way | trained | bound before | after | gain / full's | seconds |",
        "|---|---|---|---|---|---|",
    ]
    full = {(r["steps"], r["seed"]): r["before"] - r["after"] for r in rows if r["way"] == "full"}
    for row in rows:
        gain = (row["before"] - row["after"]) / full[row["steps"], row["seed"]]
        lines.append(
            f"| {row['way']}, seed {row['seed']} | {row['parameters']:,} ({row['share']:.1%}) "
            f"| {row['before']:.3f} | {row['after']:.3f} | {gain:.1%} | {row['seconds']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=list(WAYS))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("overrides", nargs="*", help="recipe fields of every way")
    args = parser.parse_args()
    if not args.table:
        with tempfile.TemporaryDirectory() as work:
            for seed in args.seeds:
                for way in args.only:
                    overrides = [*WAYS[way], *args.overrides]
                    row = run(way, overrides, args.steps, seed, Path(work))
                    print(json.dumps(row), flush=True)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(table([json.loads(line) for line in RESULTS.read_text().splitlines()]))


if __name__ == "__main__":
    main()
