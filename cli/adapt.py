"""`ar2diff adapt`."""

from __future__ import annotations

from .training import training_verb

adapt = training_verb(
    "adapt",
    "Turn an autoregressive checkpoint into a diffusion model.",
    "Qwen/Qwen3-0.6B --recipe qwen3-0.6b --data stories.jsonl",
)
