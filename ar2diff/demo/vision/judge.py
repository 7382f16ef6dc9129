"""What a model answers about held-out pictures, in each way of decoding: exact match, and tokens
per forward."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from ...core.generate import generate
from . import scenes

BATCH, NEW = 40, 64  # rows decoded together, tokens of an answer at most
THRESHOLDS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)
DRAFTS = {"mode": "speculative", "draft_length": 7}


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


def judge(
    checkpoint: Any,
    count: int,
    split: str = "held_out",
    kinds: Sequence[str] = scenes.KINDS,
    ways: dict[str, dict[str, Any]] | None = None,
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Exact match by kind of question, and tokens per forward, of each way; and its texts. Prints
    a line for each.

    Args:
        count: pictures for each kind of question. ways: of `ways_of`; None: all.
    """
    found: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    for way, settings in (ways or ways_of(checkpoint)).items():
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
    return found, texts


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    each = "  ".join(f"{kind} {share:6.1%}" for kind, share in row["exact_match"].items())
    return f"{row['mean']:6.1%} at {row['tokens_per_forward']:5.2f} tokens a forward   {each}"
