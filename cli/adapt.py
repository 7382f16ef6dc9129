"""`ar2diff adapt`."""

from __future__ import annotations

from .training import training_verb

adapt = training_verb(
    "adapt",
    "Convert an autoregressive model into a diffusion model, and train it.",
    "Qwen/Qwen3-0.6B --recipe qwen3-0.6b --data stories.jsonl",
)
