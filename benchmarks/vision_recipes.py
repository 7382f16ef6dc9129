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

Tokens per forward are tokens of answers, their end included, over forwards of the rows. The
threshold of use is chosen on the training handwriting (`--split train`), not on what judges it.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.core.generate import generate
from ar2diff.demo.vision import scenes
from ar2diff.demo.vision.build import MODEL_DIR
from ar2diff.training.adapt import adapt
from ar2diff.training.sft import sft

RESULTS = Path(__file__).parent / "results" / "vision_recipes.jsonl"
BATCH, NEW, PICTURES, TURNS = 40, 64, 4000, 3
THRESHOLDS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)
DRAFTS = {"mode": "speculative", "draft_length": 7}
RECIPES = ("demo-vision", "fast-dvlm", "diffusionvl", "sdar-vl", "llada-v", "dimple", "ar")
SMALL = [
    "data.max_length=192", "train.per_device_train_batch_size=8",
    "train.gradient_accumulation_steps=1", "train.learning_rate=1.0e-3", "train.warmup_steps=30",
    "train.schedule=cosine", "train.precision=fp32", "train.gradient_checkpointing=false",
    "train.frozen=[tower]", "train.logging_steps=50", "train.save_steps=1000", "eval.steps=0",
]  # fmt: skip
STEPS = 400  # of the table
COUNT, SHOWN = 150, 1


def ways_of(checkpoint: Any) -> dict[str, dict[str, Any]]:
    """Settings by the name of a way of decoding."""
    spec = checkpoint.spec
    if spec is None:
        return {"AR": {"mode": "ar"}}
    size = spec.block_length or NEW
    found = {"AR": {"mode": "ar"}, "lossless": DRAFTS} if spec.lossless else {}
    found["one token a forward"] = {"mode": "diffusion", "steps_per_block": size}
    return found | {f"threshold {t}": {"mode": "diffusion", "threshold": t} for t in THRESHOLDS}


def answers(
    checkpoint: Any, rows: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> Iterator[tuple[str, int, int]]:
    """Text, tokens and forwards of the answer to the first question of each row."""
    processor, tokenizer = checkpoint.processor, checkpoint.tokenizer
    full = checkpoint.spec is not None and checkpoint.spec.attention == "full"
    if full and settings["mode"] == "diffusion":  # its blocks are those of the call
        settings = settings | {"block_length": NEW}
    for first in range(0, len(rows), BATCH):
        inputs = processor.apply_chat_template(
            [row["messages"][:1] for row in rows[first : first + BATCH]],
            tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
            processor_kwargs={"padding": True, "padding_side": "left"},
        )  # fmt: skip
        width = inputs["input_ids"].shape[1]
        if checkpoint.spec is None:
            out = checkpoint.model.generate(
                **inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            forwards = None
        else:
            found = generate(
                model=checkpoint.model, **inputs, max_new_tokens=NEW,
                return_dict_in_generate=True, **settings,
            )  # fmt: skip
            out, forwards = found.sequences, found.forwards.tolist()
        for number, row in enumerate(out[:, width:].tolist()):
            ends = [place for place, token in enumerate(row) if token in checkpoint.end_ids]
            size = ends[0] + 1 if ends else len(row)
            text = tokenizer.decode(row[:size], skip_special_tokens=True)
            yield text, size, size if forwards is None else forwards[number]


def judge(checkpoint: Any, count: int, split: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Exact match by kind of question, and tokens per forward, of each way."""
    found: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    for way, settings in ways_of(checkpoint).items():
        right, tokens, forwards, start = {}, 0, 0, time.perf_counter()
        texts[way] = []
        for kind in kinds:
            rows = list(scenes.scenes(count, 1, split, [kind]))
            got = list(answers(checkpoint, rows, settings))
            pairs = zip(got, rows, strict=True)
            right[kind] = sum(text == scenes.right_answer(row) for (text, *_), row in pairs) / count
            tokens += sum(size for _, size, _ in got)
            forwards += sum(number for *_, number in got)
            texts[way] += [text for text, *_ in got]
        found[way] = {
            "exact_match": right,
            "mean": sum(right.values()) / len(right),
            "tokens_per_forward": tokens / forwards,
            "seconds": round(time.perf_counter() - start, 1),
        }
        if way == "lossless":
            same = [a == b for a, b in zip(texts["AR"], texts[way], strict=True)]
            found[way]["same_as_ar"] = sum(same) / len(same)
        print(f"  {way:22}", line(found[way]), flush=True)
    show(texts, count, split, kinds)
    return found


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    each = "  ".join(f"{kind} {share:6.1%}" for kind, share in row["exact_match"].items())
    return f"{row['mean']:6.1%} at {row['tokens_per_forward']:5.2f} tokens a forward   {each}"


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
        found = judge(checkpoint, args.count, args.split, args.kinds)
        row = {
            "model": name or str(folder), "overrides": overrides, "steps": args.steps,
            "seconds": seconds and round(seconds, 1), "count": args.count, "split": args.split,
            "ways": found,
        }  # fmt: skip
        with args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
