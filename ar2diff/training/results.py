"""What the training verbs return: for a dry run, the planned run; otherwise, the completed run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DataSize:
    """How much data a run has.

    Attributes:
        kind: what is counted: `documents`, `conversations` or `prompts`.
        count: how many there are; None for a stream.
        tokens: how many tokens they have; None for a stream.
        exact: whether `tokens` was counted; else it is estimated from some of them.
        held_out: how many of them are kept out of training, to evaluate the model on.
    """

    kind: str
    count: int | None
    tokens: int | None
    exact: bool
    held_out: int = 0


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A planned run, which `adapt`, `sft` and `rl` return if `dry_run` is set.

    Attributes:
        output_dir: folder that the run will write to.
        parameters, trainable_parameters: numbers of parameters in the converted model.
        diffusion: the spec that its config.json will hold; None for an AR model.
        mask_token, pad_token: the tokens as text.
        steps: optimizer steps. rows_per_step: rows per step, over all processes.
        tokens_at_most: tokens in all steps if every row were full.
        data: how much data there is; None if nothing is trained, or the model will write it.
        eval_rows: rows on which the model is evaluated during the run and after it.
        notes: what the conversion could not keep from the base, one sentence each.
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
    data: DataSize | None = None
    dry_run: bool = True


@dataclass(frozen=True)
class SftExample:
    """The first conversation that teaches something.

    Attributes:
        text: its text, with what is learned between ⟦ and ⟧.
        tokens, supervised_tokens: how many tokens it has, and how many of them are learned.
    """

    text: str
    tokens: int
    supervised_tokens: int


@dataclass(frozen=True, kw_only=True)
class SftPlan(RunPlan):
    """A `RunPlan` for `sft`.

    Attributes:
        turns: the number and lengths of the supervised turns, in a sentence.
        example: the first conversation with one.
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
    """A `RunPlan` for `rl`.

    Attributes:
        prompts: number of prompts. first_prompt: the first one.
        rewards: names of the rewards.
    """

    prompts: int
    first_prompt: Prompt
    rewards: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A completed run, as recorded in its `ar2diff.json`.

    Attributes:
        output_dir: folder that holds the model.
        ar2diff, versions: the versions of ar2diff, and of Python and the libraries.
        base_model, base_commit: the model that was trained: folder or Hub id, and the Hub commit.
        recipe: the resolved recipe.
        sharding: how the optimizer state was sharded; None if it was not.
        parameters, trainable_parameters, diffusion, mask_token, pad_token, steps, rows_per_step,
            tokens_at_most, data, eval_rows, notes: as in `RunPlan`.
        verb: the command that trained it.
        tokens: real tokens that were trained on; None if nothing was trained.
        answers: sft only: the number and lengths of the supervised turns.
        eval: bound and AR NLL of the evaluation rows after the run; None if there are none.
        before, after: what was reached, by names as in `log/metrics.jsonl`: what a verb evaluates
            (`eval_bound`, `eval_ar_nll`, `eval_tokens_per_forward`), else the means of its first
            and last logs (`loss`, `reward`, `stop_rate`). `before` also has the AR NLL of the base,
            `base_ar_nll`, where the conversion gives up its AR mode.
        seconds: time of training. peak_memory: bytes that the first process held at most.
        warnings: what a person should act on, one sentence each.
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
    verb: str | None = None
    data: dict[str, Any] | None = None
    tokens: int | None = None
    answers: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None
    seconds: float | None = None
    peak_memory: int | None = None
    warnings: list[str] = field(default_factory=list)
    dry_run: bool = False

    @classmethod
    def of(cls, record: Mapping[str, Any], output_dir: Path) -> RunResult:
        """The result for a run with the given record, which may have additional keys."""
        known = {f.name for f in fields(cls)} & record.keys()
        return cls(**{name: record[name] for name in known} | {"output_dir": str(output_dir)})
