"""A small BERT, trained as a masked language model on stories, then adapted: its bound before and
after, and texts to read.

    AR2DIFF_DATA=path/to/data python benchmarks/masked_lm.py [--recipe bert] [--name mask]

The base is a stock `BertForMaskedLM` of 0.8M parameters with a WordPiece vocabulary of 1,024 of its
own, trained by a plain loop of torch and transformers as Devlin et al. 2018 did: 15 % of the tokens
are predicted, of which 80 % are masked, 10 % are any token, 10 % are shown. Rows are the beginnings
of stories of tinystories/train, [CLS] + up to 126 tokens + [SEP]. It is trained once, and kept in
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

from ar2diff.data.sources import read_texts

DATA = Path(os.environ.get("AR2DIFF_DATA", ""))
RESULTS = Path(__file__).parent / "results" / "masked_lm.jsonl"
ROWS, LENGTH, VOCABULARY, PEAK, WARMUP, LOGGED = 8, 128, 1024, 2e-3, 500, 500
SHAPE = {
    "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 384, "max_position_embeddings": 256,
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


def train_base(folder: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Train the masked language model for a time on one core, and save it. Returns what was
    measured."""
    torch.manual_seed(seed)
    texts = read_texts("tinystories/train", "text")
    tokenizer = train_tokenizer(texts[:4000], folder)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SHAPE))
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    began, losses, tokens, spent = time.process_time(), [], 0, 0.0
    while spent < seconds:
        step = len(losses)
        some = [texts[(step * ROWS + i) % len(texts)] for i in range(ROWS)]
        rows = tokenizer(some, truncation=True, max_length=LENGTH).input_ids
        batch = collate([{"input_ids": row} for row in rows])
        share = min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * spent / seconds)))
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


def main() -> None:
    """Train the base unless it is there, adapt it, judge both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/masked-lm"))
    parser.add_argument("--base-seconds", type=float, default=900)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not (args.runs / "base" / "training.json").exists():
        train_base(args.runs / "base", args.base_seconds, args.seed)


if __name__ == "__main__":
    main()
