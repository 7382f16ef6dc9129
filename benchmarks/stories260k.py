"""The ablation behind `recipes/stories260k.yaml`: one row of the table per variant and seed.

    AR2DIFF_DATA=path/to/data python benchmarks/stories260k.py [--seeds 0 1 2] [--only NAME ...]

Protocol: 1,638,400 training tokens at most (a second view of a window counts again), float32 on a
CPU; judged on the first 64 stories of tinystories/valid with >= 128 tokens, BOS + 127, position 0
never scored, grid at 0, 8 exact-k draws a window, mask id suppressed. Results are appended to
benchmarks/results/stories260k.jsonl as they come; `--table` prints them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "stories260k.jsonl"
BASE = 1.1302  # AR NLL of the unconverted model under the protocol

FULL = ["convert.attention=full", "convert.block_length=null", "objective.ar_weight=0"]
MIX = "[{path: tinystories/train, weight: 1}, {path: stories3M-samples, weight: 1}]"
VARIANTS: dict[str, list[str]] = {
    "recipe": [],
    "full, same, 1/t / masked": [
        *FULL, "convert.prediction=same", "objective.weight=1/t", "objective.normaliser=masked",
    ],
    "full, shift": FULL,
    "block_causal": ["convert.attention=block_causal", "objective.ar_weight=0"],
    "prediction same": ["convert.prediction=same"],
    "reveal over 400 steps": ["anneal.kind=reveal", "anneal.steps=400"],
    "grow 2, 4 over 400 steps": ["anneal.kind=grow", "anneal.steps=400", "anneal.lengths=[2, 4]"],
    "AR weight 0.3, stories cut to pieces": ["objective.ar_weight=0.3", "data.overlong=split"],
    "AR weight 0.3, pieces, 1/t, lr 3e-3": [
        "objective.ar_weight=0.3", "data.overlong=split", "objective.weight=1/t",
        "train.learning_rate=3e-3",
    ],
    "1/t, AR weight 2": ["objective.weight=1/t", "objective.ar_weight=2"],
    "lr 3e-3": ["train.learning_rate=3e-3"],
    "lr 3e-3, AR weight 1.5": ["train.learning_rate=3e-3", "objective.ar_weight=1.5"],
    "16 rows, 800 steps": ["train.per_device_train_batch_size=16", "train.max_steps=800"],
    "4 rows, 3200 steps": ["train.per_device_train_batch_size=4", "train.max_steps=3200"],
    "sources 1:1": [f"data.sources={MIX}"],
}  # fmt: skip


def run(name: str, overrides: list[str], seed: int) -> dict:
    from ar2diff.checkpoint.io import load_checkpoint
    from ar2diff.config.recipe import load_recipe
    from ar2diff.evaluation.evaluate import evaluate
    from ar2diff.training.adapt import adapt

    base = str(Path(os.environ["AR2DIFF_DATA"]) / "stories260K-hf")
    settings = [
        "data.sources=[tinystories/train, stories3M-samples]", f"train.seed={seed}",
        "eval.steps=0",  # no row of the table is held out
        *overrides,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        record = adapt(base, load_recipe("stories260k", settings), folder)
        seconds = time.monotonic() - start
        result = evaluate(load_checkpoint(folder), "tinystories/valid", limit=64)
    return {
        "variant": name,
        "overrides": overrides,
        "seed": seed,
        "tokens": record.tokens,
        "seconds": round(seconds),
        "bound": result.bound.nats_per_token,
        "se": result.bound.standard_error,
        "ar_nll": result.ar_nll and result.ar_nll.nats_per_token,
    }


def table() -> str:
    rows: dict[str, list[dict]] = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["variant"], []).append(row)
    lines = [
        "| variant | seeds | bound - base | AR NLL / base |",
        "|---|---|---|---|",
    ]
    for name, runs in rows.items():
        gap = statistics.mean(r["bound"] for r in runs) - BASE
        ar = [r["ar_nll"] / BASE for r in runs if r["ar_nll"]]
        ratio = f"{statistics.mean(ar):.3f}x" if ar else "-"
        lines.append(f"| {name} | {len(runs)} | +{gap:.3f} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    for seed in args.seeds:
        for name in [] if args.table else args.only:
            row = run(name, VARIANTS[name], seed)
            print(json.dumps(row), flush=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table())


if __name__ == "__main__":
    main()
