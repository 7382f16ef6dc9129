"""Control by a classifier (Diffusion-LM) against hard constraints, on stories260K: how often a text
does what is asked, what the base says of it, and what that costs.

    AR2DIFF_DATA=path/to/data python benchmarks/guidance.py [--runs runs/noises]
    python benchmarks/guidance.py --table

The models are `embedding-0` and `mask-0` of benchmarks/noises.py, which that script trains.
Protocol: the first 32 stories of tinystories/valid with >= 64 tokens, their first 16 tokens as
prompts, at most 48 new tokens, mode diffusion with 8 forwards for a block of 8 tokens, temperature
0.7. Two things are asked for:

* length: the end token is the 44th new token, and there is none before it;
* words: one of eight words, in turns, stands in the new text (four prompts to a batch).

A classifier says how likely either is, given what is decided and the probabilities in the open
slots; `--guide` forbids everything else where the length is asked for, and `--regex` holds a text
to its word. NLL is the base's, in nats per new token; time is that of the processor, on one core,
as a ratio to the same model's without control. Results are appended to
benchmarks/results/guidance.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.data.sources import read_texts
from ar2diff.diffusion.likelihood import ar_nll
from ar2diff.evaluation.score import windows
from ar2diff.training.rollouts import sample

DATA = Path(os.environ.get("AR2DIFF_DATA", ""))
RESULTS = Path(__file__).parent / "results" / "guidance.jsonl"
PROMPT, NEW, TEXTS, END = 16, 48, 32, 44
WORDS = ("happy", "friend", "play", "mom", "big", "day", "little", "time")
COMMON = {
    "mode": "diffusion", "steps_per_block": 8, "temperature": 0.7, "max_new_tokens": NEW,
}  # fmt: skip
CLASSIFIED = {
    "classifier": {},
    "classifier, fluency 1": {"fluency": 1.0},
}


def ends_at(place: int, end: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A classifier: log p(the end token stands in this place of the answer, and none before)."""

    def classifier(p: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        own = p[..., end].clamp(max=1 - 1e-6)
        at = torch.arange(p.shape[1]) - prompt[:, None]
        before = ((at >= 0) & (at < place)) * torch.log1p(-own)
        here = (at == place) * own.clamp(min=1e-30).log()
        return before.sum(1) + here.sum(1)

    return classifier


def has(token: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A classifier: log p(the answer has this token)."""

    def classifier(p: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        behind = torch.arange(p.shape[1]) >= prompt[:, None]
        own = p[..., token].clamp(max=1 - 1e-6) * behind
        return (-torch.expm1(torch.log1p(-own).sum(1))).clamp(min=1e-30).log()

    return classifier


def exactly_at(place: int, end: int) -> Callable[..., torch.Tensor]:
    """A guide that allows the end token in one place of an answer, and nothing else there."""

    def guide(logprob: torch.Tensor, _: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        added = torch.zeros_like(logprob)
        here = position == PROMPT + place
        added[here] = -torch.inf
        added[~here, end] = -torch.inf
        added[here, end] = 0.0
        return added

    return guide


def measured(
    found: Any,
    base: Any,
    prompts: list[list[int]],
    settings: list[dict[str, Any]],
    fits: Callable[[int, list[int]], bool],
) -> dict[str, Any]:
    """What comes of prompts, of which the settings are those of every so many."""
    common = {**COMMON, "suppress_tokens": [found.spec.mask_token_id]}

    def write() -> list[Any]:
        rows: list[Any] = [None] * TEXTS
        for first, own in enumerate(settings):
            some = [*range(first, TEXTS, len(settings))]
            part = [prompts[n] for n in some]
            wrote = sample(found, part, some, {**common, **own}, TEXTS)
            rows[first :: len(settings)] = wrote
        return rows

    seconds = []
    for _ in range(2):
        start = time.process_time()
        rows = write()
        seconds.append(time.process_time() - start)
    new = [row.answer_ids for row in rows]
    whole = [p + text for p, text in zip(prompts, new, strict=True)]
    nats = ar_nll(base.model, whole, base.suppressed, starts=[PROMPT] * TEXTS).nats
    length = torch.tensor([float(len(text)) for text in new])
    texts = [found.tokenizer.decode(ids) for ids in whole]
    return {
        "success": sum(fits(n, text) for n, text in enumerate(new)) / TEXTS,
        "nll": float((nats / length).mean()), "seconds": min(seconds), "texts": texts[:10],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/noises"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        with RESULTS.open("a") as file:
            for row in run(args.runs):
                file.write(json.dumps(row) + "\n")
    print(table())


def run(runs: Path) -> list[dict[str, Any]]:
    base = load_checkpoint(str(DATA / "stories260K-hf"))
    models = {kind: load_checkpoint(str(runs / f"{kind}-0")) for kind in ("embedding", "mask")}
    tokenizer = base.tokenizer
    texts = read_texts("tinystories/valid", "text")
    prompts = [s[:PROMPT] for s in windows(texts, tokenizer, PROMPT + NEW, TEXTS)]
    (end,) = models["mask"].end_ids[:1]
    ids = [tokenizer.convert_tokens_to_ids(f"▁{word}") for word in WORDS]

    def of_length(_: int, text: list[int]) -> bool:
        return len(text) == END + 1 and text[-1] == end

    def with_word(n: int, text: list[int]) -> bool:
        return f" {WORDS[n % len(WORDS)]}" in f" {tokenizer.decode(text)}"

    tasks = {
        "length": (of_length, [ends_at(END, end)], "--guide", [{"guide": exactly_at(END, end)}]),
        "words": (with_word, [*map(has, ids)], "--regex",
                  [{"regex": rf"(.|\n)* {word}(.|\n)*"} for word in WORDS]),
    }  # fmt: skip
    rows = []
    for task, (fits, classifiers, name, hard) in tasks.items():
        for kind, found in models.items():
            controls = {"none": [{} for _ in hard]}
            for how, own in CLASSIFIED.items() if kind == "embedding" else ():
                controls[how] = [{"classifier": one, **own} for one in classifiers]
            controls[name] = hard
            for control, settings in controls.items():
                row = measured(found, base, prompts, settings, fits)
                rows.append({"task": task, "model": kind, "control": control, **row})
                print(task, kind, control, row["success"], row["nll"], row["seconds"], flush=True)
    return rows


def table() -> str:
    latest = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        latest[row["task"], row["model"], row["control"]] = row
    lines = ["| asked | model | control | success | NLL | time |", "|---|---|---|---|---|---|"]
    for (task, model, control), row in latest.items():
        ratio = row["seconds"] / latest[task, model, "none"]["seconds"]
        lines.append(
            f"| {task} | {model} | {control} | {row['success']:.0%} | {row['nll']:.2f} | "
            f"{ratio:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
