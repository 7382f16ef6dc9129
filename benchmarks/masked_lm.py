"""A small BERT, trained as a masked language model on stories, then adapted: its bound before and
after, and texts to read.

    AR2DIFF_DATA=path/to/data python benchmarks/masked_lm.py
    AR2DIFF_DATA=path/to/data python benchmarks/masked_lm.py --name NAME [--recipe R] [KEY=VALUE]

The base is a stock `BertForMaskedLM` of 0.3M parameters with a WordPiece vocabulary of 512 of its
own, trained by a plain loop of torch and transformers as Devlin et al. 2018 did: 15 % of the tokens
are predicted, of which 80 % are masked, 10 % are any token, 10 % are shown; rows are short in the
first 80 % of the time (32 tokens) and long after it (128). It is trained once, and kept in
--runs/base; the adapted model is kept in --runs/NAME.

Protocol of the bound: the first 64 stories of tinystories/valid with >= 128 tokens, [CLS] + 127,
8 draws a window. `before` is that of the base converted without training (`--max-steps 0`): what a
masked language model that has seen 15 % of masks makes of any share of them.
Texts: 64 tokens after the first 8 of ten stories, at --steps forwards and temperature 0.7.
Results are appended to benchmarks/results/masked_lm.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    DataCollatorForLanguageModeling,
)

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.config.recipe import load_recipe
from ar2diff.data.sources import read_texts
from ar2diff.evaluation.evaluate import evaluate
from ar2diff.evaluation.score import windows
from ar2diff.generation.tokens import text_after
from ar2diff.training.rollouts import sample

DATA = Path(os.environ.get("AR2DIFF_DATA", ""))
RESULTS = Path(__file__).parent / "results" / "masked_lm.jsonl"
BATCH, LENGTH, SHORT, SHORT_SHARE = 1024, 128, 32, 0.8  # tokens of a step and of its rows
VOCABULARY, PEAK, WARMUP, LOGGED = 512, 3e-3, 100, 500
STORIES, TEXTS, PROMPT, NEW = 64, 10, 8, 64
TRAINED_ON = ["tinystories/train", "stories3M-samples"]
TRAINING = [  # that of recipes/stories260k.yaml, but for what an AR base alone has
    "objective.weight=uniform", "objective.normaliser=tokens", "data.max_length=128",
    "data.overlong=truncate", "train.precision=fp32", "train.max_steps=1600",
    "train.per_device_train_batch_size=8", "train.learning_rate=2.0e-3", "train.schedule=cosine",
    "train.warmup_steps=50", "train.weight_decay=0.0", "train.adam_beta2=0.95",
    "train.logging_steps=100", "train.save_steps=400",
]  # fmt: skip
SHAPE = {
    "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 384, "max_position_embeddings": 256, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def train_tokenizer(texts: list[str], folder: Path) -> Any:
    """A WordPiece vocabulary of the texts, as BERT's own: lower case, [CLS] and [SEP] around a
    text."""
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
    folder.mkdir(parents=True)
    pieces.save(str(folder / "pieces.json"))
    found = BertTokenizerFast(tokenizer_file=str(folder / "pieces.json"), model_max_length=256)
    (folder / "pieces.json").unlink()
    return found


def rows_of(texts: list[list[int]], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """An endless stream of the stories in parts of at most `length` tokens, [CLS] and [SEP] around
    each."""
    inner = length - 2
    for ids in cycle(texts):
        for start in range(0, len(ids), inner):
            yield [tokenizer.cls_token_id, *ids[start : start + inner], tokenizer.sep_token_id]


def train_base(folder: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Train the masked language model for a time on one core, and save it. Returns what was
    measured."""
    torch.manual_seed(seed)
    texts = [text for name in TRAINED_ON for text in read_texts(name, "text")]
    tokenizer = train_tokenizer(texts[:4000], folder)
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SHAPE))
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    streams = {length: rows_of(ids, tokenizer, length) for length in (SHORT, LENGTH)}
    began, losses, tokens, spent = time.process_time(), [], 0, 0.0
    while spent < seconds:
        length = SHORT if spent < SHORT_SHARE * seconds else LENGTH
        rows = list(islice(streams[length], BATCH // length))
        batch = collate([{"input_ids": row} for row in rows])
        share = min((len(losses) + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * spent / seconds)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK * share
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens += sum(map(len, rows))
        spent = time.process_time() - began
        if len(losses) % LOGGED == 0:
            said = f"step {len(losses)}  loss {statistics.mean(losses[-LOGGED:]):.3f}"
            print(f"{said}  {spent:.0f} s", flush=True)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = {
        "parameters": sum(p.numel() for p in model.parameters()), "steps": len(losses),
        "tokens": tokens, "cpu_seconds": round(spent),
        "masked_lm_loss": statistics.mean(losses[-LOGGED:]),
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(found) + "\n")
    return found


def adapted(base: Path, folder: Path, recipe: str | None, settings: list[str], seed: int) -> float:
    """Adapt the base, unless it is done. Returns CPU seconds; 0 if it was done before."""
    from ar2diff.training.adapt import adapt

    if (folder / "config.json").exists():
        return 0.0
    began = time.process_time()
    overrides = [*([] if recipe else TRAINING), f"train.seed={seed}", "eval.steps=0", *settings]
    adapt(str(base), load_recipe(recipe, overrides), folder, data=TRAINED_ON)
    return time.process_time() - began


def judged(folder: Path) -> dict[str, float]:
    """The bound on held-out stories."""
    found = evaluate(str(folder), "tinystories/valid", limit=STORIES).bound
    return {"bound": found.nats_per_token, "se": found.standard_error,
            "bits_per_byte": found.bits_per_byte}  # fmt: skip


def texts_of(folder: Path, steps: int) -> list[str]:
    """Continuations of ten held-out stories."""
    found = load_checkpoint(str(folder))
    stories = windows(read_texts("tinystories/valid", "text"), found.tokenizer, PROMPT + NEW, TEXTS)
    prompts = [story[:PROMPT] for story in stories]
    settings = {
        "mode": "diffusion", "steps_per_block": steps, "temperature": 0.7, "max_new_tokens": NEW,
        "suppress_tokens": [*found.end_ids, found.spec.mask_token_id],
    }  # fmt: skip
    rows = sample(found, prompts, [*range(TEXTS)], settings, TEXTS)
    return [
        found.tokenizer.decode(prompt)
        + " |"
        + text_after(found.tokenizer, prompt, row.ids[PROMPT : PROMPT + NEW].tolist())
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def main() -> None:
    """Train the base unless it is there, adapt it, judge both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", help="recipe fields, such as noise.kind=spindle")
    parser.add_argument("--recipe", help="name or file; by default that of this benchmark")
    parser.add_argument("--name", default="mask", help="of the adapted model's folder and result")
    parser.add_argument("--runs", type=Path, default=Path("runs/masked-lm"))
    parser.add_argument("--base-seconds", type=float, default=600)
    parser.add_argument("--steps", type=int, default=NEW, help="forwards of a text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base, folder = args.runs / "base", args.runs / args.name
    if not (base / "training.json").exists():
        train_base(base, args.base_seconds, args.seed)
    unadapted = args.runs / "unadapted"
    adapted(base, unadapted, None, ["train.max_steps=0"], args.seed)
    seconds = adapted(base, folder, args.recipe, args.settings, args.seed)
    record = json.loads((folder / "ar2diff.json").read_text())
    row = {
        "name": args.name, "recipe": args.recipe, "settings": args.settings, "seed": args.seed,
        "base": json.loads((base / "training.json").read_text()),
        "tokens": record["tokens"], "steps": record["steps"], "cpu_seconds": round(seconds),
        "before": judged(unadapted), "after": judged(folder),
        "forwards": args.steps, "texts": texts_of(folder, args.steps),
    }  # fmt: skip
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
