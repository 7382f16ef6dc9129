"""What the embedded vision-language checkpoint answers right, greedily, on held-out handwriting.

    python benchmarks/vision_base.py      # writes results/vision_base.json

By kind of question and number of digits in the picture, 400 questions each, as the weights are
stored, in float32 and in bfloat16; and how many tokens the right answers to each kind have.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ar2diff.demo.vision import build, scenes

RESULTS = Path(__file__).parent / "results"
COUNT = 400


def tokens(processor, kind: str) -> dict[str, float]:
    """Tokens of the right answers, the end of the turn included."""
    rows = list(scenes.scenes(COUNT, 0, "held_out", [kind]))
    lengths = [len(processor.tokenizer(scenes.right_answer(r))["input_ids"]) + 1 for r in rows]
    return {"fewest": min(lengths), "mean": sum(lengths) / COUNT, "most": max(lengths)}


def main() -> None:
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(build.MODEL_DIR)
    result = {"command": "python benchmarks/vision_base.py", "questions": COUNT, "exact_match": {}}
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        model = AutoModelForImageTextToText.from_pretrained(build.MODEL_DIR, dtype=dtype)
        began = time.process_time()
        name = str(dtype).removeprefix("torch.")
        result["exact_match"][name] = {
            level: build.exact_match(model, processor, COUNT, digits)
            for level, digits in build.LEVELS.items()
        }
        print(json.dumps(result["exact_match"][name], indent=2), time.process_time() - began)
    result["answer_tokens"] = {kind: tokens(processor, kind) for kind in scenes.KINDS}
    result["parameters"] = model.num_parameters()
    result["bytes"] = {f.name: f.stat().st_size for f in sorted(build.MODEL_DIR.iterdir())}
    RESULTS.joinpath("vision_base.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
