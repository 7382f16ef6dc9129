"""The ablation behind `recipes/stories260k.yaml`: one row of the table per variant and seed.

    AR2DIFF_DATA=path/to/data python benchmarks/stories260k.py [--seeds 0 1 2] [--only NAME ...]
    AR2DIFF_DATA=path/to/data python benchmarks/stories260k.py --objectives [--stories3m] [--only N]

Protocol: 1,638,400 training tokens at most (a second view of a window counts again), float32 on a
CPU; judged on the first 64 stories of tinystories/valid with >= 128 tokens, BOS + 127, position 0
never scored, grid at 0, 8 exact-k draws a window, mask id suppressed. Results are appended to
benchmarks/results/stories260k.jsonl as they come; `--table` prints them.

`--objectives` runs variants of the recipe that change what is learned, and also measures what a
forward pass is worth: the first 64 of those stories, cut to 16 tokens, are continued by 48 tokens
(temperature 0, no end token) at thresholds from 0.99 to 0.2, and the text is scored by the base. A
lower threshold writes more tokens in a forward, and worse ones, so variants are compared at the
same quality: tokens per forward, interpolated to where the text costs 1 nat a token more than
the base's own greedy text. Beside it stands what the text costs at exactly 2 and 4 tokens per
forward. The results, in benchmarks/results/stories260k-objectives.jsonl, also hold the entropy of
the tokens, because dull text is cheap. `--stories3m` runs variants on stories3M instead, its own
recipe with 490 steps (0.8M tokens), into benchmarks/results/stories3m-objectives.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "stories260k.jsonl"
OBJECTIVE_RESULTS = RESULTS.with_stem("stories260k-objectives")
BASE = 1.1302  # AR NLL of the unconverted model under the protocol
STORIES3M = {"results": RESULTS.with_stem("stories3m-objectives"), "base": 1.014}
SHORT = ["train.max_steps=490"]  # of stories3M
PROMPTS, GIVEN, WRITTEN = 64, 16, 48  # continuations; tokens of a prompt, and after it
THRESHOLDS = (0.99, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2)
FIXED = (2, 4)  # tokens per forward
LOSS = 1.0  # nats a token above the base's own greedy text, at which speeds are compared

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

DISTIL = "objective.distil={target: %s, loss: %s, visible: %s, weight: %s}"
GROW = ["anneal.kind=grow", "anneal.steps=400"]
JOINT = ["objective.normaliser=masked+ar"]
OBJECTIVES: dict[str, list[str]] = {
    "recipe": [],
    "head rank 64": ["convert.head_rank=64"],
    "head rank 64, distil clean kl left 1": [
        "convert.head_rank=64", DISTIL % ("clean", "kl", "left", 1),
    ],
    "head rank 64, law bell": ["convert.head_rank=64", "noise.law=bell"],
    "distil clean kl left 1": [DISTIL % ("clean", "kl", "left", 1)],
    "distil clean kl left 0.5": [DISTIL % ("clean", "kl", "left", 0.5)],
    "law bell": ["noise.law=bell"],
    "law all 0.5": ["noise.law=all", "noise.all_share=0.5"],
    "masked+ar, AR weight 1": [*JOINT, "objective.ar_weight=1"],
    "distil teacher kl left 1": [DISTIL % ("teacher", "kl", "left", 1)],
    "masked+ar, AR weight 3.3": [*JOINT, "objective.ar_weight=3.3"],
    "masked+ar, AR weight 0.3": [*JOINT, "objective.ar_weight=0.3"],
    "distil clean kl any 1": [DISTIL % ("clean", "kl", "any", 1)],
    "distil clean tv left 1": [DISTIL % ("clean", "tv", "left", 1)],
    "on policy 0.5, distil clean kl any 1": [
        "noise.on_policy=0.5", DISTIL % ("clean", "kl", "any", 1),
    ],
    "block 16, grown": [
        "convert.block_length=16", *GROW, "anneal.lengths=[4, 8]",
    ],
    "block 32, grown": [
        "convert.block_length=32", *GROW, "anneal.lengths=[4, 8, 16]",
    ],
}  # fmt: skip


def run(
    name: str, overrides: list[str], seed: int, speed: bool = False, large: bool = False
) -> dict:
    from ar2diff.checkpoint.io import load_checkpoint
    from ar2diff.config.recipe import load_recipe
    from ar2diff.evaluation.evaluate import evaluate
    from ar2diff.training.adapt import adapt

    data = Path(os.environ["AR2DIFF_DATA"])
    sources = "data.sources=[tinystories/train, stories3M-samples]"
    base = str(data / ("stories3M-hf" if large else "stories260K-hf"))
    watch = SHORT if large else ["eval.steps=0"]  # no row of the table is held out
    settings = [sources, f"train.seed={seed}", *watch, *overrides]
    recipe = load_recipe("stories3m" if large else "stories260k", settings)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        record = adapt(base, recipe, folder)
        seconds = time.monotonic() - start
        checkpoint = load_checkpoint(folder)
        result = evaluate(checkpoint, "tinystories/valid", limit=64)
        more = speeds(checkpoint, load_checkpoint(base)) if speed else {}
    return {
        "variant": name,
        "overrides": overrides,
        "seed": seed,
        "tokens": record.tokens,
        "seconds": round(seconds),
        "bound": result.bound.nats_per_token,
        "se": result.bound.standard_error,
        "ar_nll": result.ar_nll and result.ar_nll.nats_per_token,
        **more,
    }


def speeds(checkpoint: Any, base: Any) -> dict:
    """What the base says of its own greedy text, and of that of a converted model by threshold."""
    from ar2diff.data.sources import find_file, read_texts
    from ar2diff.evaluation.score import windows

    texts = read_texts(find_file("tinystories/valid"), "text")
    prompts = [w[:GIVEN] for w in windows(texts, base.tokenizer, 128, PROMPTS)]
    settings = {"temperature": 0, "max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN}
    curve = [
        {"threshold": threshold}
        | written(checkpoint, base, prompts, mode="diffusion", threshold=threshold, **settings)
        for threshold in THRESHOLDS
    ]
    fixed = [
        {"tokens": tokens}
        | written(
            checkpoint, base, prompts, mode="diffusion",
            steps_per_block=checkpoint.spec.block_length // tokens, **settings,
        )
        for tokens in FIXED
    ]  # fmt: skip
    own = written(base, base, prompts, mode="ar", **settings)
    return {"base": own, "curve": curve, "fixed": fixed}


def written(checkpoint: Any, base: Any, prompts: list[list[int]], **settings: Any) -> dict:
    """Continue prompts: tokens per forward; the text's NLL under the base, and the entropy of its
    tokens, both in nats per token."""
    from ar2diff.diffusion.likelihood import ar_nll
    from ar2diff.generation.complete import decode_rows, settings_of

    found = decode_rows(checkpoint, *settings_of(checkpoint, settings), prompts)
    rows = [[*p, *f.token_ids] for p, f in zip(prompts, found, strict=True)]
    whole, given = (ar_nll(base.model, r, base.suppressed).nats for r in (rows, prompts))
    per_row = (whole - given) / WRITTEN
    counts = Counter(token for f in found for token in f.token_ids)
    total = sum(counts.values())
    return {
        "tokens_per_forward": total / sum(f.forwards for f in found),
        "nll": per_row.mean().item(),
        "se": per_row.std().item() / len(rows) ** 0.5,
        "entropy": -sum(n / total * math.log(n / total) for n in counts.values()),
    }


def at_level(curve: list[dict], level: float) -> str:
    """Tokens per forward where a curve first exceeds an NLL, by linear interpolation."""
    points = sorted((p["tokens_per_forward"], p["nll"]) for p in curve)
    if points[0][1] > level:
        return f"< {points[0][0]:.2f}"
    for (slow, good), (fast, bad) in itertools.pairwise(points):
        if bad > level:
            return f"{slow + (fast - slow) * (level - good) / (bad - good):.2f}"
    return f"> {points[-1][0]:.2f}"


def objective_table(results: Path, base: float) -> str:
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    own, of_variant = rows[0]["base"]["nll"], {}
    for row in rows:
        of_variant.setdefault(row["variant"], []).append(row)
    lines = [
        "| variant | seeds | bound - base | AR NLL / base | "
        + " | ".join(f"nats at {n} a forward" for n in FIXED)
        + f" | tokens per forward at +{LOSS} nats |",
        "|" + "---|" * (5 + len(FIXED)),
    ]
    for name, runs in of_variant.items():
        cells = [
            name,
            str(len(runs)),
            f"+{statistics.mean(r['bound'] for r in runs) - base:.3f}",
            f"{statistics.mean(r['ar_nll'] for r in runs) / base:.3f}x",
            *(
                f"+{statistics.mean(r['fixed'][n]['nll'] for r in runs) - own:.2f}"
                for n in range(len(FIXED))
            ),
            ", ".join(at_level(r["curve"], own + LOSS) for r in runs),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    parser.add_argument("--objectives", action="store_true")
    parser.add_argument("--stories3m", action="store_true")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    variants = OBJECTIVES if args.objectives else VARIANTS
    results = OBJECTIVE_RESULTS if args.objectives else RESULTS
    results, base = (STORIES3M["results"], STORIES3M["base"]) if args.stories3m else (results, BASE)
    if not args.table:
        results.parent.mkdir(exist_ok=True)
        for seed in args.seeds:
            for name in args.only or variants:
                row = run(name, variants[name], seed, args.objectives, args.stories3m)
                print(json.dumps(row), flush=True)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print(objective_table(results, base) if args.objectives else table())


if __name__ == "__main__":
    main()
