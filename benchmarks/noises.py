"""Every noise, trained from stories260K on the same 1,638,400 tokens: its own bound, and its texts.

    AR2DIFF_DATA=path/to/data python benchmarks/noises.py [--only NAME ...] [--seed 0]
    python benchmarks/noises.py --table
    AR2DIFF_DATA=path/to/data python benchmarks/noises.py --recipes [NAME ...]

Training is that of `recipes/stories260k.yaml`, with the noise alone changed; nothing is tuned for
any kind. Models are kept in --runs and trained again only if they are not there.

Protocol of the bound: as benchmarks/stories260k.py: the first 64 stories of tinystories/valid with
>= 128 tokens, BOS + 127, 8 draws a window. Each noise has its own bound on the same -log p: those
of tracked noises are exact-k bounds with the noise's fillers in open slots, those of free ones the
integral over time. They bound different models' likelihoods and rank none of them alone.

Protocol of the texts: 64 of the stories, their first 16 tokens as prompts, 96 new tokens, no end
token, mode diffusion with 4 and with 8 forwards for a block of 8 tokens, at temperatures 0.3, 0.7
and 1.0. With edits, a quarter of the forwards may replace tokens and decides none. NLL is the
base's, in nats per new token; entropy that of the tokens within a text (mean over texts); `NLL at
equal entropy` interpolates the NLL linearly between the two temperatures around an entropy of 3.8
nats, which most kinds reach (`outside` marks an extrapolation; the stories' own continuations have
3.89, which few do). distinct-2 is the share of different pairs of neighbouring tokens in a text.
Results are appended to benchmarks/results/noises.jsonl.

--recipes runs 200 steps of each recipe of a noise, and compares its bound, on the same 64 stories,
with that of the converted model before training (after a step with a learning rate of 0, since
fitted noises need texts), and with the NLL of the unigram distribution of the training stories
(benchmarks/results/noise_recipes.jsonl).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections import Counter
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.data.sources import read_texts
from ar2diff.diffusion.likelihood import ar_nll
from ar2diff.evaluation.evaluate import evaluate
from ar2diff.evaluation.score import windows
from ar2diff.training.rollouts import sample

DATA = Path(os.environ.get("AR2DIFF_DATA", ""))
RESULTS = Path(__file__).parent / "results" / "noises.jsonl"
RECIPES = (
    "d3pm-uniform", "gidd", "seed-diffusion", "self-correct", "d3pm-gaussian", "d3pm-nearest",
    "diffusionbert", "diffusion-lm", "sed",
)  # fmt: skip
FIRST_STEPS = 200
TRAINED_ON = "data.sources=[tinystories/train, stories3M-samples]"
PROMPT, NEW, TEXTS, STEPS = 16, 96, 64, (4, 8)
TEMPERATURES = (0.3, 0.7, 1.0)
ENTROPY = 3.8
KINDS: dict[str, list[str]] = {
    "mask": [],
    "uniform, tracked": ["noise.kind=uniform", "noise.form=tracked"],
    "uniform, free": ["noise.kind=uniform", "noise.form=free"],
    "mask_uniform": ["noise.kind=mask_uniform"],
    "self": ["noise.kind=self"],
    "self, with edits": ["noise.kind=self"],
    "mask, edited": ["noise.edits={after: 0.8, most: 0.1}"],
    "spindle": ["noise.kind=spindle"],
    "gaussian": ["noise.kind=gaussian"],
    "nearest": ["noise.kind=nearest"],
    "embedding": ["noise.kind=embedding"],
    "embedding, guessed": ["noise.kind=embedding", "noise.parameters={guessed: 0.5}"],
}
EDITED = ("self, with edits", "mask, edited")


def trained(name: str, seed: int, runs: Path) -> Path:
    """The folder of a trained model."""
    from ar2diff.training.adapt import adapt

    folder = runs / f"{name.removesuffix(', with edits').replace(', ', '-')}-{seed}"
    if (folder / "config.json").exists():
        return folder
    settings = [TRAINED_ON, f"train.seed={seed}", "eval.steps=0", *KINDS[name]]
    recipe = load_recipe("stories260k", settings)
    adapt(str(DATA / "stories260K-hf"), recipe, folder, resume=folder.exists())
    return folder


def entropy(text: list[int]) -> float:
    """Nats of the distribution of tokens within a text."""
    return -sum(n / len(text) * log(n / len(text)) for n in Counter(text).values())


def distinct_2(text: list[int]) -> float:
    """Share of different pairs among the pairs of neighbouring tokens."""
    pairs = list(pairwise(text))
    return len({*pairs}) / len(pairs)


def judged(base: Any, prompts: list[list[int]], texts: list[list[int]]) -> dict[str, float]:
    """What the base and counts say of texts."""
    whole = [p + t for p, t in zip(prompts, texts, strict=True)]
    starts = [len(prompt) for prompt in prompts]
    nats = ar_nll(base.model, whole, base.suppressed, starts=starts).nats
    return {
        "nll": float((nats / NEW).mean()),
        "entropy": statistics.mean(map(entropy, texts)),
        "distinct_2": statistics.mean(map(distinct_2, texts)),
    }


def at_entropy(points: list[dict[str, float]], wanted: float) -> tuple[float, bool]:
    """The NLL at an entropy, and whether that lies outside the points."""
    points = sorted(points, key=lambda point: point["entropy"])
    inside = points[0]["entropy"] <= wanted <= points[-1]["entropy"]
    pairs = list(pairwise(points))
    low, high = next((pair for pair in pairs if pair[1]["entropy"] >= wanted), pairs[-1])
    share = (wanted - low["entropy"]) / max(high["entropy"] - low["entropy"], 1e-9)
    return low["nll"] + share * (high["nll"] - low["nll"]), not inside


def run(name: str, seed: int, runs: Path) -> dict[str, Any]:
    folder = trained(name, seed, runs)
    found = load_checkpoint(str(folder))
    base = load_checkpoint(str(DATA / "stories260K-hf"))
    score = evaluate(found, "tinystories/valid", limit=64)
    texts = read_texts("tinystories/valid", "text")
    stories = windows(texts, found.tokenizer, PROMPT + NEW, TEXTS)
    prompts, own = [s[:PROMPT] for s in stories], [s[PROMPT:] for s in stories]
    target = judged(base, prompts, own)
    barred = [*found.end_ids, found.spec.mask_token_id]
    decoded, shown = {}, []
    for steps in STEPS:
        points = []
        for temperature in TEMPERATURES:
            settings = {
                "mode": "diffusion", "steps_per_block": steps, "temperature": temperature,
                "max_new_tokens": NEW, "suppress_tokens": barred,
            }  # fmt: skip
            if name in EDITED:
                settings["steps_per_block"] = steps * 3 // 4
                settings |= {"edit_threshold": 0.5, "corrector_steps": steps // 4}
            rows = sample(found, prompts, [*range(TEXTS)], settings, 32)
            texts = [row.ids[PROMPT : PROMPT + NEW].tolist() for row in rows]
            points.append({"temperature": temperature, **judged(base, prompts, texts)})
            if steps == STEPS[-1] and temperature == 0.7:
                shown = [found.tokenizer.decode(p + t) for p, t in zip(prompts, texts, strict=True)]
        decoded[steps] = points
    return {
        "kind": name, "seed": seed, "noise": found.spec.noise.to_dict(),
        "bound": score.bound.nats_per_token, "se": score.bound.standard_error,
        "bound_of": "integral over time" if found.spec.noise.free else "exact k",
        "ar_nll": score.ar_nll and score.ar_nll.nats_per_token,
        "decoded": decoded, "stories": target, "texts": shown[:10],
    }  # fmt: skip


def unigram(tokenizer: Any, vocabulary: int) -> float:
    """Nats per token of the judged stories under the frequencies of the training stories."""
    counts = Counter()
    for text in read_texts("tinystories/train", "text")[:20000]:
        counts.update(tokenizer(text).input_ids[1:])
    whole = counts.total() + vocabulary
    rows = windows(read_texts("tinystories/valid", "text"), tokenizer, 128, 64)
    return statistics.mean(-log((counts[t] + 1) / whole) for row in rows for t in row[1:])


def first_steps(name: str, runs: Path) -> dict[str, Any]:
    """The bound of a recipe before training and after its first steps."""
    from ar2diff.training.adapt import adapt

    bounds = {}
    for steps in (0, FIRST_STEPS):
        folder = runs / f"{name}-{steps}"
        if not (folder / "config.json").exists():
            settings = [TRAINED_ON, "eval.steps=0", f"train.max_steps={max(1, steps)}"]
            if not steps:  # a step at the beginning of a warmup, whose learning rate is 0
                settings.append("train.warmup_steps=1")
            recipe = load_recipe(name, settings)
            adapt(str(DATA / "stories260K-hf"), recipe, folder, overwrite=folder.exists())
        found = load_checkpoint(str(folder))
        score = evaluate(found, "tinystories/valid", limit=64)
        bounds[steps] = score.bound.nats_per_token
    vocabulary = found.model.config.vocab_size
    return {
        "recipe": name, "untrained": bounds[0], "steps": FIRST_STEPS, "bound": bounds[FIRST_STEPS],
        "unigram": unigram(found.tokenizer, vocabulary),
    }  # fmt: skip


def table() -> str:
    lines = [
        "| noise | its bound | AR NLL | forwards a block | NLL of texts at equal entropy | "
        "at temperature 1: NLL | entropy | distinct-2 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    latest = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        latest[row["kind"], row["seed"]] = row
    for (kind, _), row in latest.items():
        for steps, points in row["decoded"].items():
            (nll, outside), last = at_entropy(points, ENTROPY), points[-1]
            lines.append(
                f"| {kind} | {row['bound']:.3f} ± {row['se']:.3f} ({row['bound_of']}) | "
                f"{row['ar_nll']:.3f} | {steps} | {nll:.2f}"
                f"{' (outside)' if outside else ''} | {last['nll']:.2f} | "
                f"{last['entropy']:.2f} | {last['distinct_2']:.1%} |"
            )
    own = row["stories"]
    lines.append(
        f"| the stories themselves | | | | | {own['nll']:.2f} | {own['entropy']:.2f} | "
        f"{own['distinct_2']:.1%} |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/noises"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES)
    args = parser.parse_args()
    if args.recipes is not None:
        for name in args.recipes or RECIPES:
            row = first_steps(name, args.runs)
            print(json.dumps(row), flush=True)
            with RESULTS.with_name("noise_recipes.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        return
    for name in [] if args.table else args.only:
        row = run(name, args.seed, args.runs)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(name, round(row["bound"], 3), flush=True)
    print(table())


if __name__ == "__main__":
    main()
