"""Speed of training: the trainer of `sft` against that of `adapt` and against trl's own.

    AR2DIFF_DATA=path/to/data python benchmarks/sft_speed.py
    python benchmarks/sft_speed.py --models demo --repeats 3 --steps 8    # quick

Models: the embedded default and, where AR2DIFF_DATA names it, stories3M; each converted without
training. One process. Every repeat runs every way once, one after the other (interleaved), each
time from a new trainer and in another order; the first `--warmup` steps do not count. Figures are
medians over the repeats; ratios are taken within a repeat, and their median is printed.

Every way sees the same texts in rows of exactly `--length` tokens, so that none pads and packing
has nothing to do. A token counts once, however many copies of it a way computes: `adapt` and `sft`
run a noisy copy beside the clean one. Two shapes of the rows:

    text   all of a row is learned: `sft` computes what `adapt` does
    pairs  the second half is a completion: `sft` has noisy copies of that half alone

Ways: `adapt`; `sft`; `sft, ar` is the control (`objective.kind: ar`) on the AR base; `trl` is
trl.SFTTrainer as it comes on that base, its default loss and metrics included, with the same
batch, optimizer, precision and no gradient checkpointing. Results replace
benchmarks/results/sft_speed.jsonl; `--table` prints them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ar2diff.cli.output import quiet
from transformers import PrinterCallback, TrainerCallback

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import Recipe, load_recipe
from ar2diff.data.sources import find_file, read_texts
from ar2diff.demo.__main__ import MODEL
from ar2diff.demo.corpus import PRETRAIN_LEVELS, corpus, text
from ar2diff.training.adapt import ADAPT, adapt, make_trainer
from ar2diff.training.arguments import training_arguments
from ar2diff.training.sft import SFT

RESULTS = Path(__file__).parent / "results" / "sft_speed.jsonl"
WAYS = ("adapt", "sft", "sft, ar", "trl")
SHAPES = ("text", "pairs")


class Stopwatch(TrainerCallback):
    """Tokens a second of a trainer, its first steps not counted."""

    def __init__(self, trainer: Any, warmup: int):
        self.warmup, self.tokens, self.ends = warmup, [], []
        step = trainer.training_step

        def counted(model: Any, inputs: dict[str, Any], *args: Any) -> Any:
            real = inputs["tokens"] if "tokens" in inputs else inputs["attention_mask"].sum()
            self.tokens.append(int(real))
            return step(model, inputs, *args)

        trainer.training_step = counted
        trainer.add_callback(self)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def rate(self) -> float:
        seconds = self.ends[-1] - self.ends[self.warmup - 1]
        return sum(self.tokens[self.warmup :]) / seconds


def texts_of(name: str, count: int) -> list[str]:
    if name == "demo":
        return [text(example) for example in corpus(count, 1, PRETRAIN_LEVELS)]
    return read_texts(find_file("tinystories/valid"), "text")


def rows_of(texts: list[str], tokenizer: Any, shape: str, length: int, count: int) -> list[dict]:
    """Texts, joined until they are longer than a row; `pairs` are cut at half of its tokens."""
    rows, whole = [], ""
    for one in texts:
        whole = f"{whole} {one}".strip()
        found = tokenizer(whole, return_offsets_mapping=True)
        if len(found.input_ids) <= length:
            continue
        at = found.offset_mapping[length // 2][0]
        pair = {"prompt": whole[:at], "completion": whole[at:]}
        rows.append({"text": whole} if shape == "text" else pair)
        whole = ""
        if len(rows) == count:
            return rows
    raise SystemExit(f"only {len(rows)} rows of {length} tokens, wanted {count}")


def recipe_for(args: argparse.Namespace, data: Path, *more: str) -> Recipe:
    settings = [
        f"data.sources=[{data}]", f"data.max_length={args.length}", "data.overlong=truncate",
        "data.assistant_only=false", f"train.max_steps={args.steps + args.warmup}",
        f"train.per_device_train_batch_size={args.rows}", "train.logging_steps=1000000",
        "train.save_steps=1000000", f"train.gradient_checkpointing={args.gradient_checkpointing}",
    ]  # fmt: skip
    return load_recipe(None, [*settings, *more])


def trainer_of(way: str, base: Path, args: argparse.Namespace, work: Path) -> Any:
    """A new trainer of a way; `work` holds the converted model and the rows of both forms."""
    if way == "adapt":
        plan = ADAPT.prepare(work / "converted", recipe_for(args, work / "texts.jsonl"))
        return make_trainer(plan, work / "run", [])
    if way == "trl":
        return stock_trainer(base, args, work)
    control = way == "sft, ar"
    more = ["objective.kind=ar"] if control else []
    recipe = recipe_for(args, work / "rows.jsonl", *more)
    plan = SFT.prepare(base if control else work / "converted", recipe)
    return plan.make_trainer(plan, work / "run", [])


def stock_trainer(base: Path, args: argparse.Namespace, work: Path) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    recipe, checkpoint = recipe_for(args, work / "rows.jsonl"), load_checkpoint(str(base))
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    config = training_arguments(recipe, work / "run", kind=SFTConfig, max_length=args.length)
    tokenizer = checkpoint.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return SFTTrainer(
        checkpoint.model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def measure(name: str, base: Path, shape: str, args: argparse.Namespace) -> Iterator[dict]:
    """A row of results for each way and repeat."""
    tokenizer = load_checkpoint(str(base)).tokenizer
    texts = texts_of(name, 40 * args.examples)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        adapt(str(base), load_recipe(None, ["train.max_steps=0"]), work / "converted")
        for form, file in (("text", "texts.jsonl"), (shape, "rows.jsonl")):
            rows = rows_of(texts, tokenizer, form, args.length, args.examples)
            (work / file).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        for repeat in range(args.repeats):
            turn = repeat % len(WAYS)
            for way in WAYS[turn:] + WAYS[:turn]:
                torch.manual_seed(repeat)
                trainer = trainer_of(way, base, args, work)
                trainer.remove_callback(PrinterCallback)
                watch = Stopwatch(trainer, args.warmup)
                trainer.train()
                yield {
                    "model": name,
                    "shape": shape,
                    "way": way,
                    "repeat": repeat,
                    "tokens_per_second": round(watch.rate, 1),
                    "tokens_per_step": statistics.mean(watch.tokens),
                    "length": args.length,
                    "rows": args.rows,
                    "steps": args.steps,
                    "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                    "threads": torch.get_num_threads(),
                }


def table(results: list[dict]) -> str:
    lines = [
        "| model | rows | way | tokens/s | of adapt's | of trl's | tokens a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, shape in dict.fromkeys((r["model"], r["shape"]) for r in results):
        of = [r for r in results if (r["model"], r["shape"]) == (model, shape)]
        rates = {way: {r["repeat"]: r for r in of if r["way"] == way} for way in WAYS}
        for way in WAYS:
            mine = rates[way].values()
            cells = [statistics.median(r["tokens_per_second"] for r in mine)]
            for other in ("adapt", "trl"):
                pairs = [
                    (r, rates[other][r["repeat"]]) for r in mine if r["repeat"] in rates[other]
                ]
                cells.append(
                    statistics.median(
                        a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs
                    )
                )
            step = statistics.mean(r["tokens_per_step"] for r in mine)
            lines.append(
                f"| {model} | {shape} | {way} | {cells[0]:,.0f} | {cells[1]:.2f}x "
                f"| {cells[2]:.2f}x | {step:,.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = {"demo": MODEL}
    if "AR2DIFF_DATA" in os.environ:
        found["stories3M"] = Path(os.environ["AR2DIFF_DATA"]) / "stories3M-hf"
    parser.add_argument("--models", nargs="+", choices=found, default=list(found))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3, help="steps that do not count")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int, default=128, help="different rows")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(line) for line in args.output.read_text().splitlines()]))
        return
    quiet()
    warnings.simplefilter("ignore", FutureWarning)
    results = []
    for name in args.models:
        for shape in args.shapes:
            results += measure(name, found[name], shape, args)
    args.output.write_text("".join(f"{json.dumps(row)}\n" for row in results))
    print(table(results))


if __name__ == "__main__":
    main()
