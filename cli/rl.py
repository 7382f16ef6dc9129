"""`ar2diff rl`."""

from __future__ import annotations

from .training import training_verb

rl = training_verb(
    "rl",
    "Tune a converted model with rewards (diffusion-GRPO).",
    "runs/demo --recipe demo-rl --data questions.jsonl",
    model="the converted model to tune",
    data="Prompts to answer, with the columns that the rewards need",
)
