"""A draft adapter for a chat model: does its text stay that of the tuned model, and what is its own
text worth as training data?

    AR2DIFF_DATA=path/to/data python benchmarks/draft_chat.py [--work FOLDER]

stories3M is tuned on conversations as the AR control of `stories-chat` is. Two draft adapters are
then trained for it alike: one on answers that the tuned model writes itself to the prompts of the
training file (`data.self`), one on plain stories. Each decodes held-out conversations and plain
stories, greedily, and is compared with the AR mode of the tuned model. 15 minutes of one core.
The row is appended to results/draft_chat.jsonl. Models are kept in --work and used again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from drafts import decoded, prompts

RESULTS = Path(__file__).parent / "results" / "draft_chat.jsonl"
PROMPTS, NEW = 20, 96
SFT = {"train.max_steps": 50, "objective.kind": "ar", "train.save_steps": 50}
DRAFT = {
    "train.max_steps": 400, "train.learning_rate": 3e-3, "train.warmup_steps": 50,
    "train.per_device_train_batch_size": 4, "data.max_length": 256, "eval.steps": 0,
}  # fmt: skip
OWN = {"tokens": 160_000, "temperature": 1.0, "max_new_tokens": 160}


def made(folder: Path, make: Any) -> tuple[str, float]:
    """A folder, made if it is not there, and the seconds that it took."""
    start = time.monotonic()
    if not (folder / "tokenizer.json").exists():
        make(folder)
    return str(folder), round(time.monotonic() - start, 1)


def chat_prompts(checkpoint: Any, file: Path) -> list[list[int]]:
    """Held-out conversations, up to their last answer."""
    from ar2diff.config.sections import SelfData
    from ar2diff.generation.tokens import prompt_ids
    from ar2diff.training.own_text import read_prompts

    rows = read_prompts(SelfData(prompts=str(file)), "text").rows[:PROMPTS]
    return [prompt_ids(checkpoint.tokenizer, messages) for _, messages, _ in rows]


def judged(folder: str, valid: Path) -> dict[str, Any]:
    """Tokens per forward of chat and of plain text, and how many texts differ from the AR mode."""
    from ar2diff.checkpoint.io import load_checkpoint

    checkpoint, found = load_checkpoint(folder), {}
    checkpoint.model.eval()
    length = checkpoint.draft.spec.block_length - 1
    texts = {
        "chat": chat_prompts(checkpoint, valid),
        "plain": prompts(checkpoint.tokenizer, 0)[:PROMPTS],
    }
    for name, rows in texts.items():
        ar, _ = decoded(checkpoint, rows, NEW, mode="ar")
        drafted, forwards = decoded(checkpoint, rows, NEW, draft_length=length)
        found[f"{name}_tokens_per_forward"] = round(sum(map(len, drafted)) / forwards, 3)
        found[f"{name}_texts"] = len(rows)
        found[f"{name}_different"] = sum(a != b for a, b in zip(ar, drafted, strict=True))
    return found


def main() -> None:
    from ar2diff import draft, sft
    from ar2diff.data.sources import find_file

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/draft_chat"))
    work = parser.parse_args().work
    base = find_file("tinystories/train").parents[1] / "stories3M-hf"
    train, valid = (find_file(f"tinystories-chat/{part}") for part in ("train", "valid"))
    row: dict[str, Any] = {"sft_steps": SFT["train.max_steps"], "draft": DRAFT, "own": OWN}
    tuned, row["sft_seconds"] = made(
        work / "tuned",
        lambda out: sft(base, "stories-chat", out, data=train, overrides=SFT, resume=out.exists()),
    )
    variants = {
        "own": {"overrides": DRAFT | {"data.self": OWN | {"prompts": str(train)}}},
        "plain": {"overrides": DRAFT, "data": find_file("tinystories/train")},
    }
    for name, call in variants.items():
        folder, seconds = made(
            work / f"draft-{name}",
            lambda out, call=call: draft(tuned, "draft", out, resume=out.exists(), **call),
        )
        row[name] = {"seconds": seconds, **judged(folder, valid)}
        print(json.dumps({name: row[name]}), flush=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
