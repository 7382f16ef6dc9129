"""Scoring a model on held-out text: the bound of the diffusion mode and the NLL of the AR mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from typing import Any

from ..checkpoint.io import load_checkpoint
from ..checkpoint.model import Checkpoint
from ..config.section import MOST_SAMPLES
from ..core.errors import Ar2DiffError, option, shortened
from ..core.forward import context_length
from ..data.sources import Document, read_texts
from ..diffusion.likelihood import Estimate, ar_nll, bound, scored
from ..generation.tokens import closing_tokens


@dataclass(frozen=True)
class Bound:
    """Upper bound on the negative log-likelihood in the diffusion mode.

    Attributes:
        standard_error: standard error of `nats_per_token`, due to the noise draws alone; None for a
            single draw.
    """

    nats_per_token: float
    standard_error: float | None
    bits_per_byte: float


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Exact negative log-likelihood in the AR mode."""

    nats_per_token: float
    bits_per_byte: float


@dataclass(frozen=True)
class Score:
    """Likelihood of token rows.

    Attributes:
        tokens: number of scored tokens, which excludes mask tokens and the first token of each row.
        bytes: UTF-8 length of the text of the rows.
        bound: None for an unconverted model.
        ar_nll: None if the AR mode was not trained.
    """

    tokens: int
    bytes: int
    bound: Bound | None
    ar_nll: NegativeLogLikelihood | None

    def logs(self) -> dict[str, float]:
        """What a training run logs of it."""
        found = {"eval_bound": self.bound, "eval_ar_nll": self.ar_nll}
        return {name: value.nats_per_token for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values, without modes that the model lacks."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Evaluation(Score):
    """Likelihood of a model on windows of text.

    Attributes:
        model: folder or Hub id.
        data: the file; None for texts.
        rows: number of windows. length: tokens in each.
        samples: noise draws for each window. seed: seed of the draws.
    """

    model: str
    data: str | None
    rows: int
    length: int
    samples: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values, settings first, without modes that the model lacks."""
        found = super().to_dict()
        settings = ("model", "data", "rows", "length", "samples", "seed")
        return {name: found.pop(name) for name in settings if name in found} | found


def evaluate(
    model: str | Path | Checkpoint,
    data: str | Path | Sequence[str],
    *,
    text_field: str = "text",
    length: int = 128,
    samples: int = 8,
    limit: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Likelihood of a model on windows of held-out text, in nats per token and bits per byte.

    Args:
        model: folder or Hub id, or a loaded checkpoint; it may be unconverted.
        data: a file of rows, `-` for standard input, a Hub data set, or the texts themselves.
        text_field: the field of a row that holds the text.
        length: tokens per window; shorter texts are skipped.
        samples: noise draws per window, which one forward takes together.
        limit: maximum number of windows, from the start of the file; None for all.

    Raises:
        Ar2DiffError: the model does not load, the data cannot be read, no text is long enough, or
            nothing in the windows can be scored.
    """
    for name, value, least in (("length", length, 2), ("samples", samples, 1)):
        if value < least:
            raise Ar2DiffError(f"{option(name)} is {value}", f"set it to {least} or more")
    if samples > MOST_SAMPLES:
        raise Ar2DiffError(
            f"{option('samples')} is {shortened(samples)}", f"set it to {MOST_SAMPLES} or less"
        )
    source = str(data) if isinstance(data, str | Path) else None
    name = f"{option('data')} {source}" if source else option("data")
    checkpoint = model if isinstance(model, Checkpoint) else _load(model)
    check_length(checkpoint, length, "length")
    texts = read_texts(source, text_field) if source else data
    rows = windows(texts, checkpoint.tokenizer, length, limit)
    if not rows:
        raise Ar2DiffError(
            f"{name}: no text has {length} tokens", f"lower {option('length')}, or use longer texts"
        )
    try:
        found = score(checkpoint, rows, samples=samples, seed=seed)
    except Ar2DiffError as error:
        raise error.about(name) from None
    return Evaluation(
        **vars(found),
        model=str(checkpoint.path if isinstance(model, Checkpoint) else model),
        data=source,
        rows=len(rows),
        length=length,
        samples=samples,
        seed=seed,
    )


def _load(model: str | Path) -> Checkpoint:
    return load_checkpoint(str(model), device="auto")


def windows(
    texts: Sequence[Document], tokenizer: Any, length: int, limit: int | None
) -> list[list[int]]:
    """The first `length` tokens of each text that has as many, for at most `limit` texts; with the
    tokenizer's own BOS, but without an EOS. A text may also be given as its token ids."""
    rows: list[list[int]] = []
    closing = closing_tokens(tokenizer)
    for text in texts:
        ids = text
        if isinstance(text, str):
            ids = tokenizer(text, verbose=False).input_ids
            ids = ids[: len(ids) - closing]
        if len(ids) >= length:
            rows.append(ids[:length])
            if limit is not None and len(rows) == limit:
                break
    return rows


def check_length(checkpoint: Checkpoint, length: int, name: str) -> None:
    """Refuse rows that are longer than the model's context.

    Args:
        name: the option that sets the length.
    """
    context = context_length(checkpoint.model.config)
    if context is not None and length > context:
        raise Ar2DiffError(
            f"{option(name, length)} exceeds the model's context of {context} tokens",
            f"set it to {context} or less",
        )


def score(checkpoint: Checkpoint, rows: list[list[int]], *, samples: int, seed: int = 0) -> Score:
    """Bound (for a converted model) and AR NLL (if there is an AR mode) of token rows.

    Raises:
        Ar2DiffError: no token of the rows can be scored.
    """
    model, spec, tokenizer = checkpoint.model, checkpoint.spec, checkpoint.tokenizer
    suppressed = checkpoint.suppressed
    tokens = sum(int(scored(row, suppressed).sum()) for row in rows)
    size = sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in rows)
    if not tokens:
        raise Ar2DiffError(
            "no token can be scored: the text consists of special tokens", "use other text"
        )

    def bits_per_byte(estimate: Estimate) -> float:
        return estimate.nats.sum().item() / size / log(2) if size else float("nan")

    diffusion = autoregressive = None
    if spec is not None:
        estimate = bound(model, spec, rows, suppressed, samples, seed)
        error = estimate.error if samples > 1 else None
        diffusion = Bound(estimate.mean, error, bits_per_byte(estimate))
    if spec is None or spec.ar_mode:
        estimate = ar_nll(model, rows, suppressed, spec.local_window if spec else "kept")
        autoregressive = NegativeLogLikelihood(estimate.mean, bits_per_byte(estimate))
    return Score(tokens, size, diffusion, autoregressive)
