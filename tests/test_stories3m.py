"""Self-speculation on a real conversion: `make stories3m` makes it, `make slow` runs this."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.core.denoise import denoise
from ar2diff.core.generate import canvas_of
from ar2diff.data.sources import read_texts
from ar2diff.generation.complete import settings_of

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, NEW, BATCH = 200, 128, 20


@pytest.fixture(scope="module")
def stories():
    """The converted checkpoint; `$AR2DIFF_STORIES3M` names another folder."""
    folder = Path(os.environ.get("AR2DIFF_STORIES3M") or ROOT / "runs" / "stories3m")
    if not (folder / "config.json").exists():
        pytest.skip(f"{folder} is not here; 'make stories3m' makes it")
    return load_checkpoint(str(folder))


@pytest.mark.slow
def test_speculation_writes_what_the_ar_mode_writes_in_fewer_forwards(stories, shared_data):
    """200 prompts x 128 tokens in float32: the same texts, more than 1.5 tokens a forward."""
    texts = read_texts(shared_data("tinystories/valid.jsonl.gz"), "text")[:PROMPTS]
    prompts = [stories.tokenizer(" ".join(text.split()[:12])).input_ids for text in texts]
    written, forwards = {}, {}
    for mode in ("ar", "speculative"):
        settings = {"mode": mode, "max_new_tokens": NEW, "temperature": 0, "eos_token_id": [-1]}
        spec, options = settings_of(stories, settings)
        written[mode], forwards[mode] = [], 0
        for first in range(0, PROMPTS, BATCH):
            canvas = canvas_of(stories.model, spec, prompts[first : first + BATCH], options)
            for _ in denoise(stories.model, spec, canvas, options):
                pass
            written[mode] += [canvas.new_ids(row) for row in range(BATCH)]
            forwards[mode] += int(canvas.forwards.sum())
    assert written["speculative"] == written["ar"]
    assert all(len(new) == NEW for new in written["ar"])
    assert forwards["ar"] == PROMPTS * NEW
    assert PROMPTS * NEW / forwards["speculative"] > 1.5
    print(f"mean accepted length {PROMPTS * NEW / forwards['speculative']:.3f}")
    own = stories.model.generate(  # and the AR mode is that of transformers
        torch.tensor([prompts[0]]), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert own[0, len(prompts[0]) :].tolist() == written["ar"][0]
