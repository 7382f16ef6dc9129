"""`ar2diff draft`."""

from __future__ import annotations

from .training import training_verb

draft = training_verb(
    "draft",
    "Train a draft adapter, with which a frozen model writes the same text in fewer forwards.",
    "Qwen/Qwen3-0.6B --data stories.jsonl",
    model="the model to write drafts for, converted or not",
    data="Texts to train on",
)
