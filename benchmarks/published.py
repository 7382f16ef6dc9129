"""The published recipes on one small model: one table, and ten generations of each.

    AR2DIFF_DATA=path/to/data python benchmarks/published.py [stories260K-hf] [--only NAME ...]
    AR2DIFF_DATA=path/to/data python benchmarks/published.py stories3M-hf \\
      --only sdar tiny-a2d fast-dllm-v2 --steps 2000 --learning-rate 3e-4

What a recipe keeps is its method: attention, prediction, anneal, noise, objective. Rows, data,
steps and optimisation, the learning rate too, are for all of them those of the recipe that was
chosen for the model (`stories260k`, `stories3m`). An anneal takes the same part of the steps as
published; two views of each row take half the steps, so that the tokens are the same for all.

The protocol is that of benchmarks/stories260k.py: float32 on a CPU, tinystories/train and
stories3M-samples; judged on the first 64 stories of tinystories/valid with >= 128 tokens, BOS +
127, position 0 never scored, 8 exact-k draws a window, mask id suppressed. Rows are appended to
benchmarks/results/published.jsonl as they come, an interrupted run goes on where it was; the models
stay in runs/published. `--table` prints the table that is in published.md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROWS, TABLE = RESULTS / "published.jsonl", RESULTS / "published.md"
RUNS = Path("runs") / "published"
OWN = {"stories260K-hf": "stories260k", "stories3M-hf": "stories3m"}  # what was chosen for a model
# SFT recipes run on the stories as texts: the method is in what they do with a row. llada-sft is
# llada's method on answers.
PUBLISHED = (
    "diffugpt",
    "diffullama",
    "dream",
    "llada",
    "sdar",
    "fast-dllm-v2",
    "llada2",
    "tiny-a2d",
)
WRITTEN, WORDS = 10, 14  # stories that are continued, and words of each that are the prompt
SOURCES = [{"path": "tinystories/train"}, {"path": "stories3M-samples"}]


def recipe_of(name: str, model: str, steps: int | None, learning_rate: float | None) -> Any:
    """A recipe's method with the sizes, data and optimisation of the model's own recipe."""
    from ar2diff.config.recipe import load_recipe, with_values

    published, own = load_recipe(name), load_recipe(OWN[model])
    steps = steps or own.train.max_steps
    share = published.anneal.steps / published.train.max_steps
    steps = steps // 2 if published.noise.complementary else steps
    sections = {
        "train": own.train.model_dump()
        | {"max_steps": steps, "learning_rate": learning_rate or own.train.learning_rate},
        "data": own.data.model_dump() | {"sources": SOURCES, "cut_share": published.data.cut_share},
        "anneal": {"steps": round(share * steps)},
        "eval": {"steps": 0, "panel_steps": 0},
    }
    return with_values(published, **sections)


def run(name: str, model: str, recipe: Any, folder: Path) -> dict[str, Any]:
    """Train and judge a recipe, and write its generations."""
    from ar2diff.checkpoint.io import load_checkpoint
    from ar2diff.evaluation.evaluate import evaluate
    from ar2diff.training.adapt import adapt

    base = str(Path(os.environ["AR2DIFF_DATA"]) / model)
    resumed, start = folder.exists(), time.process_time()
    record = adapt(base, recipe, folder, resume=True)
    seconds = None if resumed else round(time.process_time() - start)
    checkpoint = load_checkpoint(str(folder))
    result = evaluate(checkpoint, "tinystories/valid", limit=64)
    settings = {"max_new_tokens": 80, "threshold": 0.9}
    lines = list(generations(checkpoint, **settings))
    texts = RESULTS / f"published-{OWN[model]}-{name}.txt"
    texts.write_text("\n".join(lines).strip() + "\n", encoding="utf-8")
    return {
        "model": model,
        "recipe": name,
        "attention": recipe.convert.attention,
        "block_length": recipe.convert.block_length,
        "prediction": recipe.convert.prediction,
        "steps": recipe.train.max_steps,
        "learning_rate": recipe.train.learning_rate,
        "tokens": record.tokens,
        "cpu_seconds": seconds,
        "bound": result.bound.nats_per_token,
        "se": result.bound.standard_error,
        "ar_nll": result.ar_nll and result.ar_nll.nats_per_token,
        "tokens_a_forward": float(lines[-1].split()[-3]),
    }


def generations(checkpoint: Any, **settings: Any) -> Iterator[str]:
    """Lines: the starts of held-out stories, what each mode writes after them, and the diffusion
    mode's tokens per forward."""
    from ar2diff.data.sources import find_file, read_texts
    from ar2diff.generation.complete import complete

    modes = ("ar", "diffusion") if checkpoint.spec.ar_mode else ("diffusion",)
    tokens = forwards = 0
    for text in read_texts(find_file("tinystories/valid"), "text")[:WRITTEN]:
        prompt = " ".join(text.split()[:WORDS])
        yield f"\n{prompt} ..."
        for mode in modes:
            result = complete(checkpoint, prompt, mode=mode, **settings)
            yield f"  {mode:9} |{' '.join(result.text.split())}"
        tokens, forwards = tokens + result.new_tokens, forwards + result.forwards
    yield f"\ndiffusion: {tokens} tokens in {forwards} forwards, {tokens / forwards:.2f} a forward"


def base_row(model: str) -> dict[str, Any]:
    """The AR NLL of the unconverted model."""
    from ar2diff.checkpoint.io import load_checkpoint
    from ar2diff.evaluation.evaluate import evaluate

    checkpoint = load_checkpoint(str(Path(os.environ["AR2DIFF_DATA"]) / model))
    result = evaluate(checkpoint, "tinystories/valid", limit=64)
    return {"model": model, "recipe": "base", "ar_nll": result.ar_nll.nats_per_token}


def rows() -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def table() -> str:
    """A row a recipe, the best bound of a model first."""
    lines = [
        "| model | recipe | attention | steps | tokens | CPU s | bound | AR NLL | tokens/forward |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows(), key=lambda row: (row["model"], row.get("bound", 0))):
        ar = f"{row['ar_nll']:.3f}" if row["ar_nll"] else "-"
        if row["recipe"] == "base":
            lines.append(f"| {row['model']} | base | causal | - | - | - | - | {ar} | 1.00 |")
            continue
        blocks = f" {row['block_length']}" if row["block_length"] else ""
        lines.append(
            f"| {row['model']} | {row['recipe']} | {row['attention']}{blocks}, {row['prediction']} "
            f"| {row['steps']} | {row['tokens']:,} | {row['cpu_seconds'] or '-'} "
            f"| {row['bound']:.3f} ± {row['se']:.3f} | {ar} | {row['tokens_a_forward']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=OWN, default="stories260K-hf")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="recipes; else all and our own")
    parser.add_argument("--steps", type=int, help="else those of the model's own recipe")
    parser.add_argument("--learning-rate", type=float, help="of all; else that recipe's")
    parser.add_argument("--table", action="store_true", help="print what was measured")
    args = parser.parse_args()
    for name in [] if args.table else ["base", *(args.only or [*PUBLISHED, OWN[args.model]])]:
        done = {(row["model"], row["recipe"]): row for row in rows()}
        if (args.model, name) in done:
            continue
        folder = RUNS / OWN[args.model] / name
        if name == "base":
            row = base_row(args.model)
        else:
            recipe = recipe_of(name, args.model, args.steps, args.learning_rate)
            row = run(name, args.model, recipe, folder)
        print(json.dumps(row), flush=True)
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        TABLE.write_text(table() + "\n", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
