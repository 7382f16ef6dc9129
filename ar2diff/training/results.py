"""What the training verbs return: of a dry run what the run will be, else what it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will be; `adapt`, `sft` and `rl` return it where `dry_run` is set.

    Attributes:
        output_dir: folder that the run will write.
        parameters, trainable_parameters: of the converted model.
        diffusion: the spec that its config.json will hold; None of an AR model.
        mask_token, pad_token: their texts.
        steps: optimiser steps. rows_per_step: rows of one, over all processes.
        tokens_at_most: tokens of all steps if every row were full.
        eval_rows: rows on which the model is evaluated during the run and after it.
        notes: what the conversion could not keep of the base, a sentence each.
        dry_run: True.
    """

    output_dir: str
    parameters: int
    trainable_parameters: int
    diffusion: dict[str, Any] | None
    mask_token: str | None
    pad_token: str | None
    steps: int
    rows_per_step: int
    tokens_at_most: int
    eval_rows: int
    notes: list[str]
    dry_run: bool = True


@dataclass(frozen=True)
class SftExample:
    """The first conversation that teaches something.

    Attributes:
        text: with what is learned between ⟦ and ⟧.
        tokens, supervised_tokens: of all of it, and of what is learned.
    """

    text: str
    tokens: int
    supervised_tokens: int


@dataclass(frozen=True, kw_only=True)
class SftPlan(RunPlan):
    """A `RunPlan` of `sft`.

    Attributes:
        turns: the number and lengths of the supervised turns, in a sentence.
        example: the first of them.
    """

    turns: str
    example: SftExample


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model will see it: its text, and how many tokens it has."""

    text: str
    tokens: int


@dataclass(frozen=True, kw_only=True)
class RlPlan(RunPlan):
    """A `RunPlan` of `rl`.

    Attributes:
        prompts: how many there are. first_prompt: the first of them.
        rewards: names of the rewards.
    """

    prompts: int
    first_prompt: Prompt
    rewards: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run was, as its `ar2diff.json` holds it.

    Attributes:
        output_dir: folder that holds the model.
        ar2diff, versions: versions of ar2diff, Python and libraries.
        base_model, base_commit: what was trained: folder or Hub id, and the commit of the latter.
        recipe: the resolved recipe.
        sharding: what the optimizer's state was cut by; None if it was whole.
        parameters, trainable_parameters, diffusion, mask_token, pad_token, steps, rows_per_step,
            tokens_at_most, eval_rows, notes: as of `RunPlan`.
        tokens: real tokens that were trained on; None if nothing was trained.
        answers: sft: numbers and lengths of the supervised turns.
        eval: bound and AR NLL of the evaluation rows after the run; None without any.
        dry_run: False.
    """

    output_dir: str
    ar2diff: str
    base_model: str
    base_commit: str | None
    versions: dict[str, str]
    recipe: dict[str, Any]
    sharding: str | None
    parameters: int
    trainable_parameters: int
    diffusion: dict[str, Any] | None
    mask_token: str | None
    pad_token: str | None
    steps: int
    rows_per_step: int
    tokens_at_most: int
    eval_rows: int
    notes: list[str]
    tokens: int | None = None
    answers: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None
    dry_run: bool = False

    @classmethod
    def of(cls, record: Mapping[str, Any], output_dir: Path) -> RunResult:
        """The result of a run with the given record, which may have more keys."""
        known = {f.name for f in fields(cls)} & record.keys()
        return cls(**{name: record[name] for name in known} | {"output_dir": str(output_dir)})
