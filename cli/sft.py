"""`ar2diff sft`."""

from __future__ import annotations

from .training import training_verb

sft = training_verb(
    "sft",
    "Tune a converted model on conversations, or on prompts and completions.",
    "runs/qwen --recipe stories-chat --data chats.jsonl",
    model="the converted model to tune",
    data="Conversations, or prompts and completions, to train on",
)
