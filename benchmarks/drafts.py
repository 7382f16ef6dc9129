"""Draft adapters: what each choice is worth, and tokens per forward of the ones that were chosen.

    AR2DIFF_DATA=path/to/data python benchmarks/drafts.py [--only NAME ...] [--seeds 0 1 2]
    AR2DIFF_DATA=path/to/data python benchmarks/drafts.py --judge FOLDER [--new 96]
    AR2DIFF_DATA=path/to/data python benchmarks/drafts.py --exact FOLDER [--new 128]
    python benchmarks/drafts.py --questions 400

The first form is the ablation on stories260K: each row trains the recipe `draft` with some
overrides, on tinystories/train and stories3M-samples (or on text of the model's own), in less than
ten minutes of one core, and decodes 100 prompts of tinystories/valid (the first 32 tokens of the
stories 101 to 200 that have them) for 96 tokens. Rows are appended to results/drafts.jsonl as they
come. `--judge` decodes the stories 1 to 100 instead, which no choice has seen, and appends to
results/drafts_judged.jsonl. `--table` prints the ablation. `--questions` decodes held-out questions
with the adapter that ships beside the embedded model, up to 48 tokens each, into the same file.

`--exact` compares 200 texts: greedy ones with those of transformers' generate on the base alone,
sampled ones (temperature 0.8) with our AR mode under the same seed: where one differs, the gap
between the two likeliest tokens at the first difference is computed in float64.

Tokens per forward are all new tokens over all forwards, the first of each row, which has no drafts,
among them. Each text is compared with that of the AR mode (with the same seed where it is sampled).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROWS, JUDGED = RESULTS / "drafts.jsonl", RESULTS / "drafts_judged.jsonl"
EXACT = RESULTS / "drafts_exact.jsonl"
PROMPTS, PROMPT = 100, 32
SETTINGS = {
    "chain": {"draft_length": 7},
    "tree15": {"draft_length": 7, "draft_nodes": 15},
    "chain_T0.8": {"draft_length": 7, "temperature": 0.8, "seed": 1},
    "tree15_T0.8": {"draft_length": 7, "draft_nodes": 15, "temperature": 0.8, "seed": 1},
}

VARIANTS: dict[str, list[str]] = {
    "recipe": [],
    "no head": ["draft.head_rank=0"],
    "head 64": ["draft.head_rank=64"],
    "head 128": ["draft.head_rank=128"],
    "head 512": ["draft.head_rank=512"],
    "ce": ["draft.loss={ce: 1}"],
    "kl": ["draft.loss={kl: 1}"],
    "tv": ["draft.loss={tv: 1}"],
    "lk": ["draft.loss={lk: 1}"],
    "0.1 ce + 0.9 tv": ["draft.loss={ce: 0.1, tv: 0.9}"],
    "0.1 kl + 0.9 tv": ["draft.loss={kl: 0.1, tv: 0.9}"],
    "no decay": ["draft.decay=null"],
    "decay 2": ["draft.decay=2"],
    "dpace": ["draft.decay=dpace"],
    "attention-output": ["draft.targets=attention-output"],
    "attention-output, rank 64": ["draft.targets=attention-output", "draft.rank=64"],
    "rank 64": ["draft.rank=64"],
    "lr 8e-3": ["train.learning_rate=8e-3"],
    "lr 2e-3": ["train.learning_rate=2e-3"],
    "visible 0.5": ["draft.visible=0.5"],
    "1600 steps": ["train.max_steps=1600"],
    "1600 steps, rank 64": ["train.max_steps=1600", "draft.rank=64"],
    "tinystories alone": [],
    "own text": ["data.self={tokens: 400000, max_new_tokens: 127}"],
}  # fmt: skip
SOURCES = ["tinystories/train", "stories3M-samples"]
DATA = {"tinystories alone": SOURCES[:1], "own text": None}  # of the variants with other data


def prompts(tokenizer: Any, first: int) -> list[list[int]]:
    """The first tokens of held-out stories."""
    from ar2diff.data.sources import find_file, read_texts

    found = (
        tokenizer(text).input_ids for text in read_texts(find_file("tinystories/valid"), "text")
    )
    return [ids[:PROMPT] for ids in found if len(ids) >= PROMPT][first : first + PROMPTS]


def decoded(checkpoint: Any, rows: list[list[int]], new: int, **settings: Any) -> tuple[list, int]:
    """Texts, and the forwards that they took."""
    from ar2diff.generation.complete import begin, settings_of

    texts, forwards = [], 0
    for start in range(0, len(rows), 10):
        spec, options = settings_of(checkpoint, {"max_new_tokens": new, **settings})
        canvas, states = begin(checkpoint, spec, options, rows[start : start + 10])
        for _ in states:
            pass
        texts += [canvas.new_ids(row) for row in range(len(canvas.ids))]
        forwards += int(canvas.forwards.sum())
    return texts, forwards


def load(folder: str) -> Any:
    """A draft adapter on its base, which may be one of the folders in AR2DIFF_DATA."""
    from ar2diff.checkpoint.draft import load_drafting
    from ar2diff.checkpoint.io import load_checkpoint

    named = json.loads((Path(folder) / "draft.json").read_text())["base"]
    base = Path(os.environ.get("AR2DIFF_DATA", "")) / named
    if Path(named).is_absolute() or not base.is_dir():
        return load_checkpoint(folder)
    return load_drafting(Path(folder), base=str(base))


def questions(tokenizer: Any, count: int) -> list[list[int]]:
    """Held-out questions of the embedded model."""
    from ar2diff.demo.corpus import corpus, prompt

    return [tokenizer(prompt(e)).input_ids for e in corpus(count, 9, (1, 2), "valid")]


def judged(checkpoint: Any, rows: list[list[int]], new: int) -> dict[str, Any]:
    """Tokens per forward in each setting, and how many texts are not those of the AR mode."""
    checkpoint.model.eval()
    found, plain = {}, {}
    for name, setting in SETTINGS.items():
        sampled = {key: setting[key] for key in ("temperature", "seed") if key in setting}
        key = json.dumps(sampled)
        if key not in plain:
            plain[key], _ = decoded(checkpoint, rows, new, mode="ar", **sampled)
        texts, forwards = decoded(checkpoint, rows, new, **setting)
        found[name] = round(sum(map(len, texts)) / forwards, 3)
        different = sum(a != b for a, b in zip(texts, plain[key], strict=True))
        found["different"] = found.get("different", 0) + different
    return found


def exact(folder: str, new: int) -> dict[str, Any]:
    """How many of 200 texts differ from the base's own, and the float64 gaps where they do."""
    import torch

    checkpoint = load(folder)
    model = checkpoint.model.eval()
    rows = prompts(checkpoint.tokenizer, 0) + prompts(checkpoint.tokenizer, PROMPTS)
    ends = checkpoint.end_ids
    stock = []
    for row in rows:
        ids = torch.tensor([row])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
            pad_token_id=0, eos_token_id=ends,
        )  # fmt: skip
        stock.append(made[0, len(row) :].tolist())
    found: dict[str, Any] = {"prompts": len(rows), "new": new}
    double = None
    for name, setting in {"default": {}, **SETTINGS}.items():
        sampled = {key: setting[key] for key in ("temperature", "seed") if key in setting}
        want = stock
        if sampled:
            want, _ = decoded(checkpoint, rows, new, mode="ar", **sampled)
        texts, _ = decoded(checkpoint, rows, new, mode="speculative", **setting)
        gaps = []
        for row, text, other in zip(rows, texts, want, strict=True):
            if text != other:
                double = double or copy.deepcopy(model).double()
                at = next(
                    (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b),
                    min(len(text), len(other)),
                )
                with torch.no_grad():
                    logits = double(input_ids=torch.tensor([row + text[:at]])).logits[0, -1]
                top = logits.topk(2).values
                gaps.append((top[0] - top[1]).item())
        found[name] = {"different": len(gaps), "float64_gaps": gaps}
    return found


def run(name: str, overrides: list[str], seed: int) -> dict[str, Any]:
    """Train and judge a variant."""
    from ar2diff import draft

    base = str(Path(os.environ["AR2DIFF_DATA"]) / "stories260K-hf")
    with tempfile.TemporaryDirectory() as scratch:
        start = time.process_time()
        result = draft(
            base, "draft", Path(scratch) / "draft", data=DATA.get(name, SOURCES),
            overrides=[*overrides, f"train.seed={seed}", "eval.steps=0"],
        )  # fmt: skip
        seconds = time.process_time() - start
        checkpoint = load(str(Path(scratch) / "draft"))
        found = judged(checkpoint, prompts(checkpoint.tokenizer, PROMPTS), 96)
    return {
        "variant": name, "seed": seed, "tokens": result.tokens,
        "parameters": result.trainable_parameters, "seconds": round(seconds), **found,
    }  # fmt: skip


def table() -> str:
    """The ablation in markdown."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in ROWS.read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["variant"], []).append(row)
    lines = [
        "| variant | seeds | tokens | parameters | core-seconds | " + " | ".join(SETTINGS) + " |",
        "|---" * (5 + len(SETTINGS)) + "|",
    ]
    for name, found in rows.items():
        mean = [statistics.mean(row[key] for row in found) for key in SETTINGS]
        facts = [len(found), *(found[0][key] for key in ("tokens", "parameters", "seconds"))]
        cells = [name, *(f"{fact:,}" for fact in facts), *(f"{value:.3f}" for value in mean)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--judge")
    parser.add_argument("--exact")
    parser.add_argument("--questions", type=int)
    parser.add_argument("--new", type=int)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if asked.table:
        print(table())
        return
    if asked.judge:
        new = asked.new or 96
        checkpoint = load(asked.judge)
        found = judged(checkpoint, prompts(checkpoint.tokenizer, 0), new)
        _append(JUDGED, {"folder": Path(asked.judge).name, "prompts": PROMPTS, "new": new, **found})
        return
    if asked.questions:
        folder = Path(__file__).parents[1] / "ar2diff" / "demo" / "draft"
        checkpoint = load(str(folder))
        found = judged(checkpoint, questions(checkpoint.tokenizer, asked.questions), 48)
        _append(JUDGED, {"folder": "demo", "questions": asked.questions, "new": 48, **found})
        return
    if asked.exact:
        found = exact(asked.exact, asked.new or 128)
        _append(EXACT, {"folder": Path(asked.exact).name, **found})
        return
    done = (
        {(r["variant"], r["seed"]) for r in map(json.loads, ROWS.open())}
        if ROWS.exists()
        else set()
    )
    for seed in asked.seeds:
        for name in asked.only:
            if (name, seed) not in done:
                _append(ROWS, run(name, VARIANTS[name], seed))


def _append(file: Path, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
