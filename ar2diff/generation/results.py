"""The results of generating, and writing them to a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import Ar2DiffError, first_line, option
from ..core.spec import Spec


@dataclass(frozen=True)
class Drift:
    """What an approximate cache does to the logits, over the forwards of a batch.

    Attributes:
        mean, largest: error of a cached logit, relative to the largest logit.
        same_token: share of the tokens whose likeliest candidate is the same without the cache.
    """

    mean: float
    largest: float
    same_token: float


@dataclass(frozen=True)
class Candidate:
    """A length that was tried for a gap, and the text that filled it.

    Attributes:
        length: in tokens.
        mean_logprob: mean log-probability of the tokens, each taken when it was decided.
    """

    length: int
    mean_logprob: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Completion:
    """An answer to a prompt, or a prompt with its gaps filled.

    Attributes:
        prompt: as it was given, gaps written `{mask:N}`; None after messages.
        text: the answer alone; if the prompt has gaps, the whole text.
        token_ids: tokens after the prompt, the end token included.
        new_tokens: tokens that were decided, in the gaps too.
        forwards: forwards of the model that the row took part in.
        tokens_per_forward: new_tokens / forwards.
        seconds: wall-clock time, of a batch the row's share.
        drift: with `check_cache`.
        matches: whether the text matches the constraint as a whole; False if it was stopped before
            it did, None without a constraint.
        filled: the text of each gap, without the spaces that the prompt has around it.
        filled_at: where in `text` each of them begins.
        suffix_tokens: given tokens after the last gap.
        unread_tokens: those of them that the model does not read when it fills the gap.
        length, mean_logprob, candidates: of `infill`, the chosen length and all that were tried,
            the best first.
    """

    prompt: str | None = None
    text: str
    token_ids: list[int] = field(repr=False)
    new_tokens: int
    forwards: int
    tokens_per_forward: float = field(repr=False)
    seconds: float = field(repr=False)
    drift: Drift | None = field(default=None, repr=False)
    matches: bool | None = field(default=None, repr=False)
    filled: tuple[str, ...] | None = field(default=None, repr=False)
    filled_at: tuple[int, ...] | None = field(default=None, repr=False)
    suffix_tokens: int | None = field(default=None, repr=False)
    unread_tokens: int | None = field(default=None, repr=False)
    length: int | None = field(default=None, repr=False)
    mean_logprob: float | None = field(default=None, repr=False)
    candidates: tuple[Candidate, ...] | None = field(default=None, repr=False)

    @property
    def whole_text(self) -> str:
        """The prompt and the answer."""
        return self.text if self.filled is not None else (self.prompt or "") + self.text

    def to_dict(self) -> dict[str, Any]:
        """All fields that are set, for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def summary(results: Sequence[Completion]) -> str:
    """A line on how much was decoded and how fast."""
    tokens = sum(result.new_tokens for result in results)
    forwards = sum(result.forwards for result in results)
    seconds = sum(result.seconds for result in results)
    many = f"{len(results)} prompts, " if len(results) > 1 else ""
    return (
        f"{many}{tokens} tokens, {forwards} forwards, {tokens / max(forwards, 1):.2f} tokens per "
        f"forward, {tokens / max(seconds, 1e-9):.0f} tokens/s, {seconds:.2f} s"
        + _drift_of([result.drift for result in results if result.drift is not None])
    )


def _drift_of(drifts: Sequence[Drift]) -> str:
    if not drifts:
        return ""
    mean = sum(drift.mean for drift in drifts) / len(drifts)
    same = sum(drift.same_token for drift in drifts) / len(drifts)
    largest = max(drift.largest for drift in drifts)
    return (
        f"; the cache changes logits by {mean:.1e} of the largest on average and {largest:.1e} at "
        f"most; the likeliest token stays the same at {100 * same:.1f} % of the positions"
    )


def unread_note(spec: Spec | None, results: Sequence[Completion]) -> str | None:
    """A line about given text that a block model does not read when it fills the gap before it;
    None if it reads all of it."""
    unread = [result for result in results if result.unread_tokens]
    if spec is None or not unread:
        return None
    count = sum(result.unread_tokens or 0 for result in unread)
    given = sum(result.suffix_tokens or 0 for result in unread)
    where = "" if len(results) == 1 else f" (in {len(unread)} of {len(results)} prompts)"
    return (
        f"{count} of the {given} suffix tokens lie in later blocks than the gap, which "
        f"{spec.attention} attention does not read{where}"
    )


def unmatched_note(results: Sequence[Completion]) -> str | None:
    """A line about texts that do not match their constraint; None if all do."""
    count = sum(result.matches is False for result in results)
    if not count:
        return None
    where = "the text" if len(results) == 1 else f"{count} of {len(results)} texts"
    return f"{where} was stopped before it matched the constraint"


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a file that results cannot be written to. Changes nothing.

    Raises:
        Ar2DiffError: it exists, is a folder, or cannot be written.
    """
    name = f"{option('output')} {path}"
    try:
        folder, taken = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # too long a name
        raise Ar2DiffError(
            f"{name} is not a file name ({first_line(error)})", "choose another name"
        ) from None
    if folder:
        raise Ar2DiffError(f"{name} is a folder", "give the name of a file, for example out.jsonl")
    if taken and not overwrite:
        raise Ar2DiffError(
            f"{name} already exists",
            f"replace it with {option('overwrite', True)}, or choose another name",
        )
    if not path.parent.is_dir():
        raise Ar2DiffError(
            f"{name}: the folder {path.parent} does not exist", "create the folder first"
        )
    if not os.access(path.parent, os.W_OK):
        raise Ar2DiffError(
            f"{name}: the folder {path.parent} is not writable", "choose another folder"
        )


def write_results(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines to a temporary file and rename it, so that readers never see half a file.

    Raises:
        Ar2DiffError: the file system refuses.
    """
    beside = path.with_name(path.name + ".partial")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise Ar2DiffError(
            f"{path} cannot be written: {error.strerror or error}", "choose another place"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
