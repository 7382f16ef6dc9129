"""`ar2diff adapt`."""

from __future__ import annotations

from .training import training_verb

adapt = training_verb(
    "adapt",
    "Convert an autoregressive model into a diffusion model, and train it.",
    "Qwen/Qwen3-0.6B --recipe qwen3-0.6b --data stories.jsonl",
    model="the autoregressive model to convert, or of a converted one to train on",
    data="Texts to train on",
    steps="; with 0, the model is converted without training",
)
