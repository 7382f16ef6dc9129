"""The embedded vision-language base, converted: exact match on held-out handwriting against tokens
per forward, beside its AR mode, and recipes at equal steps.

    python benchmarks/vision_recipes.py                    # the conversion of make demo-vision
    python benchmarks/vision_recipes.py --recipes          # the table: see below
    python benchmarks/vision_recipes.py --model DIR        # a folder that is there, evaluated alone

Protocol: --count held-out pictures (2 to 4 digits; no digit of them occurs in training) for each of
the kinds of questions, one question each, greedy, batches of 40, float32. An answer is right if its
text is that of the rules, letter for letter. Ways of a model:

    AR                    the base, or the AR mode of the converted model
    lossless              mode speculative with 7 drafts: the same text, counted and compared
    one token a forward   mode diffusion with as many forwards a block as it has tokens
    threshold T           mode diffusion

Tokens per forward are tokens of answers, their end included, over forwards of the rows; where a
canvas is longer than the answer, its forwards count all the same.
Training rows: 4,000 pictures with three questions each, of the training handwriting.
The table: the conversion, published recipes and the AR control at the same number of steps, of rows
and peak learning rate, each with the rest of its settings; blocks have 8 tokens. Dimple's second
phase alone is run, since the base has had its first.
Results are appended to benchmarks/results/vision_recipes.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.demo.vision import scenes
from ar2diff.demo.vision.build import MODEL_DIR
from ar2diff.demo.vision.judge import judge
from ar2diff.training.adapt import adapt
from ar2diff.training.sft import sft

RESULTS = Path(__file__).parent / "results" / "vision_recipes.jsonl"
PICTURES, TURNS = 4000, 3
RECIPES = ("demo-vision", "fast-dvlm", "diffusionvl", "sdar-vl", "llada-v", "dimple", "ar")
SMALL = [
    "data.max_length=192", "train.per_device_train_batch_size=8",
    "train.gradient_accumulation_steps=1", "train.learning_rate=1.0e-3", "train.warmup_steps=30",
    "train.schedule=cosine", "train.precision=fp32", "train.gradient_checkpointing=false",
    "train.frozen=[tower]", "train.logging_steps=50", "train.save_steps=1000", "eval.steps=0",
]  # fmt: skip
STEPS = 400  # of the table
COUNT, SHOWN = 150, 1


def show(texts: dict[str, list[str]], count: int, split: str, kinds: Sequence[str]) -> None:
    """Some questions and what each way says."""
    for number, kind in enumerate(kinds):
        for place, row in enumerate(scenes.scenes(SHOWN, 1, split, [kind])):
            print(f"\n  {row['messages'][0]['content'][1]['text']}  {row['digits']}")
            for way, all_texts in texts.items():
                print(f"    {way:22} {all_texts[number * count + place]!r}")


def train(recipe: str, data: Path, folder: Path, steps: int | None, more: Sequence[str]) -> float:
    """Convert the embedded base with a recipe; returns the seconds it took."""
    start = time.perf_counter()
    control = recipe == "ar"
    wanted = load_recipe(None if control else recipe)
    blocks = [] if wanted.convert.attention == "full" else ["convert.block_length=8"]
    small = [] if steps is None else [*SMALL, *blocks]
    small += ["objective.kind=ar"] if control else []
    wanted = load_recipe(None if control else recipe, [*small, *more])
    run = sft if control else adapt
    run(str(MODEL_DIR), wanted, folder, data=str(data), max_steps=steps, overwrite=folder.exists())
    return time.perf_counter() - start


def main() -> None:
    """Convert, evaluate, and note."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder that is evaluated alone")
    parser.add_argument("--recipe", default="demo-vision")
    parser.add_argument("--recipes", action="store_true")
    parser.add_argument("--steps", type=int, help="with the settings of the table")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--split", default="held_out", choices=list(scenes.SPLITS))
    parser.add_argument("--kinds", nargs="+", default=list(scenes.KINDS), choices=scenes.KINDS)
    parser.add_argument("--runs", type=Path, default=Path("runs/vision"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()

    data = args.runs / "scenes.jsonl"
    if not data.is_file() and args.model is None:
        data.parent.mkdir(parents=True, exist_ok=True)
        scenes.write_scenes(data, PICTURES, 5, "train", tuple(args.kinds), scenes.DIGITS, TURNS)
    names = RECIPES if args.recipes else [args.recipe]
    if args.recipes and args.steps is None:
        args.steps = STEPS
    for name in names if args.model is None else [None]:
        folder, seconds, overrides = args.model or args.runs / name, None, list(args.overrides)
        if args.model is None:
            seconds = train(name, data, folder, args.steps, overrides)
        checkpoint = load_checkpoint(str(folder))
        print(f"{folder} ({seconds and round(seconds)} s)")
        found, texts = judge(checkpoint, args.count, args.split, args.kinds)
        show(texts, args.count, args.split, args.kinds)
        row = {
            "model": name or str(folder), "overrides": overrides, "steps": args.steps,
            "seconds": seconds and round(seconds, 1), "count": args.count, "split": args.split,
            "ways": found,
        }  # fmt: skip
        with args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
