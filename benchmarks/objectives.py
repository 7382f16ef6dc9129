"""What a conversion is worth by what it is trained on: the table of docs/conversions.md.

    AR2DIFF_DATA=path/to/data python benchmarks/objectives.py stories260k [--only NAME ...]
    AR2DIFF_DATA=path/to/data python benchmarks/objectives.py stories3m --only NAME ...
    python benchmarks/objectives.py demo --only NAME ...

Each row trains a model's recipe with the overrides of a variant, on one core: stories260K for 1.64M
tokens, stories3M for 0.8M (490 steps), the embedded model for 0.69M (the recipe `demo`). The
results are appended to benchmarks/results/MODEL-objectives.jsonl; `--table` prints them.

The bound and the AR NLL are those of 64 held-out stories of 128 tokens at least, BOS + 127,
position 0 never scored, 8 exact-k draws a window, mask id suppressed (64 tokens for the embedded
model). What a forward pass is worth is compared at the same quality, since a lower threshold writes
more tokens in a forward, and worse ones:

* stories: 64 of them, cut to 16 tokens, are continued by 48 tokens (temperature 0, no end token) at
  thresholds from 0.99 to 0.2, and the base scores the text: tokens per forward, interpolated to
  where the text costs 1 nat a token more than the base's own greedy text. Beside it stands what it
  costs at exactly 2 and 4 tokens per forward. The results also hold the entropy of the tokens,
  because dull text is cheap.
* the embedded model: 400 held-out questions of one and two steps, answered in up to 48 tokens at
  the same thresholds: tokens per forward, interpolated to where 95 % of the answers are right.
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

RESULTS = Path(__file__).parent / "results"
STORIES = ["data.sources=[tinystories/train, stories3M-samples]"]
# Of each model: its recipe and what is changed in it.
MODELS = {
    "stories260k": [*STORIES, "eval.steps=0"],  # no row of the table is held out
    "stories3m": [*STORIES, "train.max_steps=490"],
    "demo": ["eval.panel_steps=0"],
}
PROMPTS, GIVEN, WRITTEN = 64, 16, 48  # continuations; tokens of a prompt, and after it
QUESTIONS, RIGHT = 400, 0.95  # of the embedded model; the share of right answers
THRESHOLDS = (0.99, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2)
FIXED = (2, 4)  # tokens per forward
LOSS = 1.0  # nats a token above the base's own greedy text, at which speeds are compared

DISTIL = "objective.distil={target: %s, loss: %s, visible: %s, weight: %s}"
GROW = ["anneal.kind=grow", "anneal.steps=400"]
JOINT = ["objective.normaliser=masked+ar"]
OBJECTIVES: dict[str, list[str]] = {
    "recipe": [],
    "head rank 64": ["convert.head_rank=64"],
    "head rank 64, distil clean kl left 1": [
        "convert.head_rank=64", DISTIL % ("clean", "kl", "left", 1),
    ],
    "head rank 64, its rate x20": ["convert.head_rank=64", "train.lr_scale.diffusion_head=20"],
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


def run(model: str, name: str, seed: int) -> dict[str, Any]:
    """Train a variant and judge it."""
    from ar2diff.checkpoint.io import load_checkpoint
    from ar2diff.config.recipe import load_recipe
    from ar2diff.training.adapt import adapt

    base = str(base_of(model))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        sources = stories_of(Path(scratch)) if model == "demo" else []
        settings = [*sources, f"train.seed={seed}", *MODELS[model], *OBJECTIVES[name]]
        start = time.monotonic()
        record = adapt(base, load_recipe(model, settings), folder)
        seconds = time.monotonic() - start
        checkpoint, before = load_checkpoint(str(folder)), load_checkpoint(base)
        judge = answered if model == "demo" else continued
        found = judge(checkpoint, before)
    return {
        "variant": name, "overrides": OBJECTIVES[name], "seed": seed, "tokens": record.tokens,
        "seconds": round(seconds), **found,
    }  # fmt: skip


def base_of(model: str) -> Path:
    """The folder of an AR model."""
    if model == "demo":
        from ar2diff.demo.__main__ import MODEL

        return MODEL
    return Path(os.environ["AR2DIFF_DATA"]) / {"stories260k": "stories260K-hf"}.get(
        model, "stories3M-hf"
    )


def stories_of(folder: Path) -> list[str]:
    """The stories that `make demo` trains on, as an override."""
    from ar2diff.demo.__main__ import TRAIN_STORIES
    from ar2diff.demo.corpus import write_stories

    write_stories(folder / "stories.jsonl", TRAIN_STORIES)
    return [f"data.sources=[{{path: {folder / 'stories.jsonl'}}}]"]


def likelihoods(checkpoint: Any, base: Any, rows: list[list[int]]) -> dict[str, float]:
    """Bound and AR NLL of rows of tokens, and the base's NLL of them, in nats per token."""
    from ar2diff.evaluation.score import score

    after, before = score(checkpoint, rows, samples=8), score(base, rows, samples=8)
    return {
        "bound": after.bound.nats_per_token,
        "se": after.bound.standard_error,
        "ar_nll": after.ar_nll.nats_per_token,
        "base_nll": before.ar_nll.nats_per_token,
    }


def answered(checkpoint: Any, base: Any) -> dict[str, Any]:
    """The embedded model: likelihoods, and answers by threshold."""
    from ar2diff.demo.corpus import PRETRAIN_LEVELS, corpus, prompt, score, text
    from ar2diff.evaluation.score import windows
    from ar2diff.generation.complete import decode_rows, settings_of

    held_out = [text(e) for e in corpus(4 * PROMPTS, 0, PRETRAIN_LEVELS, "valid")]
    rows = windows(held_out, base.tokenizer, 64, PROMPTS)
    examples = list(corpus(QUESTIONS, 2, (1, 2), "valid"))
    prompts = [base.tokenizer(prompt(e)).input_ids for e in examples]
    curve = []
    for threshold in THRESHOLDS:
        settings = {"mode": "diffusion", "threshold": threshold, "max_new_tokens": WRITTEN}
        found = decode_rows(checkpoint, *settings_of(checkpoint, settings), prompts)
        texts = base.tokenizer.batch_decode([f.token_ids for f in found], skip_special_tokens=True)
        right = [score(e, t) for e, t in zip(examples, texts, strict=True)]
        tokens = sum(len(f.token_ids) for f in found)
        curve.append(
            {
                "threshold": threshold,
                "tokens_per_forward": tokens / sum(f.forwards for f in found),
                "wrong": 1 - statistics.mean(right),
            }
        )
    return likelihoods(checkpoint, base, rows) | {"curve": curve}


def continued(checkpoint: Any, base: Any) -> dict[str, Any]:
    """Likelihoods, and what the base says of its own greedy text and of that of a converted model
    by threshold."""
    from ar2diff.data.sources import find_file, read_texts
    from ar2diff.evaluation.score import windows

    texts = read_texts(find_file("tinystories/valid"), "text")
    rows = windows(texts, base.tokenizer, 128, PROMPTS)
    prompts = [row[:GIVEN] for row in rows]
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
    more = {"base": own, "curve": curve, "fixed": fixed}
    return likelihoods(checkpoint, base, rows) | more


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


def at_level(curve: list[dict[str, float]], key: str, level: float) -> str:
    """Tokens per forward where a curve first exceeds a level, by linear interpolation."""
    points = sorted((p["tokens_per_forward"], p[key]) for p in curve)
    if points[0][1] > level:
        return f"< {points[0][0]:.2f}"
    for (slow, good), (fast, bad) in itertools.pairwise(points):
        if bad > level:
            return f"{slow + (fast - slow) * (level - good) / (bad - good):.2f}"
    return f"> {points[-1][0]:.2f}"


def table(model: str) -> str:
    """The rows of a model in markdown."""
    rows = [json.loads(line) for line in results_of(model).read_text().splitlines()]
    base, of_variant = rows[0]["base_nll"], {}
    for row in rows:
        of_variant.setdefault(row["variant"], []).append(row)
    speeds = (
        [f"tokens per forward at {RIGHT:.0%} right"]
        if model == "demo"
        else [*(f"nats at {n} a forward" for n in FIXED), f"tokens per forward at +{LOSS} nats"]
    )
    heads = ["variant", "seeds", "bound - base", "AR NLL / base", *speeds]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, runs in of_variant.items():
        cells = [
            name,
            str(len(runs)),
            f"+{statistics.mean(r['bound'] for r in runs) - base:.3f}",
            f"{statistics.mean(r['ar_nll'] for r in runs) / base:.3f}x",
        ]
        if model == "demo":
            cells.append(", ".join(at_level(r["curve"], "wrong", 1 - RIGHT) for r in runs))
        else:
            own = runs[0]["base"]["nll"]
            cells += [
                f"+{statistics.mean(r['fixed'][n]['nll'] for r in runs) - own:.2f}"
                for n in range(len(FIXED))
            ]
            cells.append(", ".join(at_level(r["curve"], "nll", own + LOSS) for r in runs))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def results_of(model: str) -> Path:
    return RESULTS / f"{model}-objectives.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    for seed, name in itertools.product(asked.seeds, [] if asked.table else asked.only):
        row = run(asked.model, name, seed)
        print(json.dumps(row), flush=True)
        with results_of(asked.model).open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(table(asked.model))


if __name__ == "__main__":
    main()
