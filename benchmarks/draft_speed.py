"""Wall-clock of a draft adapter against plain AR decoding, with what it is made of beside it.

    python benchmarks/draft_speed.py DRAFT_FOLDER [--prompts FILE | demo] [--new 96] [--rounds 5]

One thread, batches of 1 and 8 (copies of one prompt), greedy; the ways are run in turn, one
round after the other, and the fastest of each counts: transformers generate on the base, our AR
mode, and the adapter as the folder ships (the number of drafts chosen while decoding). Every text
must be the same. Also: tokens per forward, and the milliseconds of a forward by its slots.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULT = Path(__file__).parent / "results" / "draft_speed.jsonl"
SLOTS = (1, 2, 4, 8, 12, 20, 40, 72)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument(
        "--prompts", help="a file with one prompt a line, or demo; default: tinystories/valid"
    )
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    from drafts import load

    checkpoint = load(asked.folder)
    checkpoint.model.eval()
    rows = _rows(checkpoint, asked)
    found: dict[str, Any] = {"folder": Path(asked.folder).name, "new": asked.new}
    found["ms_by_slots"] = _by_slots(checkpoint.model, rows[0])
    for batch in (1, 8):
        found[f"batch_{batch}"] = _compare(checkpoint, rows, batch, asked.new, asked.rounds)
    print(json.dumps(found, indent=1))
    with RESULT.open("a") as out:
        out.write(json.dumps(found) + "\n")


def _rows(checkpoint: Any, asked: Any) -> list[list[int]]:
    if asked.prompts is None:
        from drafts import prompts

        return prompts(checkpoint.tokenizer, 0)[: asked.count]
    if asked.prompts == "demo":
        from ar2diff.demo.corpus import corpus, text

        stories = [text(e) for e in corpus(16 + asked.count, 5, (1, 2), "valid")][16:]
        lines = [" ".join(story.split()[:8]) for story in stories]
    else:
        lines = Path(asked.prompts).read_text().splitlines()[: asked.count]
    return [checkpoint.tokenizer(line).input_ids for line in lines]


def _compare(
    checkpoint: Any, rows: list[list[int]], batch: int, new: int, rounds: int
) -> dict[str, Any]:
    """Each way on every prompt, in batches of copies of it."""
    from ar2diff.core.generate import generate

    model, forwards = checkpoint.model, [0, 0]

    def stock(ids: torch.Tensor) -> Any:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
            pad_token_id=0,
        )  # fmt: skip

    def ours(ids: torch.Tensor, **settings: Any) -> Any:
        made = generate(
            ids, model=model, draft=checkpoint.draft, max_new_tokens=new,
            return_dict_in_generate=True, do_sample=False, pad_token_id=0, **settings,
        )  # fmt: skip
        if settings["mode"] == "speculative":
            forwards[0] += int((made.tokens_per_forward * made.forwards).sum().round())
            forwards[1] += int(made.forwards.sum())
        return made.sequences

    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "transformers": stock,
        "ar": lambda ids: ours(ids, mode="ar"),
        "draft": lambda ids: ours(ids, mode="speculative"),
    }
    seconds = {name: [0.0] * rounds for name in ways}
    same = True
    for turn in range(-1, rounds):  # the first one warms up
        for row in rows:
            ids = torch.tensor([row] * batch)
            texts = {}
            for name, way in ways.items():
                start = time.perf_counter()
                texts[name] = way(ids)
                if turn >= 0:
                    seconds[name][turn] += time.perf_counter() - start
            same &= all(torch.equal(texts["transformers"], text) for text in texts.values())
    best = {name: min(times) for name, times in seconds.items()}
    return {
        "seconds": {name: round(value, 3) for name, value in best.items()},
        "ar_over_transformers": round(best["transformers"] / best["ar"], 3),
        "draft_over_transformers": round(best["transformers"] / best["draft"], 3),
        "draft_over_ar": round(best["ar"] / best["draft"], 3),
        "tokens_per_forward": round(forwards[0] / forwards[1], 3),
        "same": same,
    }


def _by_slots(model: Any, row: list[int]) -> dict[int, float]:
    """Milliseconds of a forward after a context, the fastest of thirty."""
    from transformers import DynamicCache

    cache, found = DynamicCache(), {}
    ids = torch.tensor([row])
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        for slots in SLOTS:
            times = []
            tokens = torch.full((1, slots), row[0])
            place = torch.full((1, slots), len(row))
            for _ in range(30):
                start = time.perf_counter()
                model(
                    input_ids=tokens, position_ids=place, past_key_values=cache, use_cache=True,
                    attention_mask=torch.ones(1, 1, slots, len(row) + slots, dtype=torch.bool),
                )  # fmt: skip
                times.append(time.perf_counter() - start)
                cache.crop(-slots)
            found[slots] = round(1e3 * min(times), 2)
    return found


if __name__ == "__main__":
    main()
