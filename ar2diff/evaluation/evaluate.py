"""`evaluate`: the likelihood of held-out text under a model and, with a draft adapter, how many
tokens it drafts right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.io import load_checkpoint
from ..checkpoint.model import Checkpoint, refuse_unconverted
from ..config.section import MOST_SAMPLES
from ..core.errors import Ar2DiffError, option, shortened
from ..data.sources import read_texts
from .drafts import Drafted, drafts_of
from .score import Score, check_length, score, windows


@dataclass(frozen=True)
class Evaluation(Score):
    """Likelihood of a model on windows of text.

    Attributes:
        model: folder or Hub id.
        data: the file; None for texts.
        rows: number of windows. length: tokens in each.
        samples: noise draws for each window. seed: seed of the draws.
        drafts: how well a draft adapter drafts, on the text with which the model greedily
            continues the first quarter of each window; None without one.
    """

    model: str
    data: str | None
    rows: int
    length: int
    samples: int
    seed: int
    drafts: Drafted | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values, settings first, without modes that the model lacks."""
        found = super().to_dict()
        if self.drafts is not None:
            found["drafts"] = self.drafts.to_dict()
            del found["drafts"]["ar_nll"]  # it is beside them
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
    dtype: str = "auto",
) -> Evaluation:
    """Likelihood of a model on windows of held-out text, in nats per token and bits per byte.

    Args:
        model: folder or Hub id, or a loaded checkpoint; it may be unconverted, or a draft adapter.
        data: a file of rows, `-` for standard input, a Hub data set, or the texts themselves.
        text_field: the field of a row that holds the text.
        length: tokens per window; shorter texts are skipped.
        samples: noise draws per window, which one forward takes together.
        limit: maximum number of windows, from the start of the file; None for all.
        dtype: number type to compute in, for a model that is not loaded yet; as for `load`.

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
    checkpoint = model if isinstance(model, Checkpoint) else _load(model, dtype)
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
    drafts = None
    if checkpoint.draft is not None:
        drafts = drafts_of(checkpoint, rows, found.ar_nll)
    return Evaluation(
        **vars(found),
        model=str(checkpoint.path if isinstance(model, Checkpoint) else model),
        data=source,
        rows=len(rows),
        length=length,
        samples=samples,
        seed=seed,
        drafts=drafts,
    )


def _load(model: str | Path, dtype: str) -> Checkpoint:
    checkpoint = load_checkpoint(str(model), device="auto", dtype=dtype)
    refuse_unconverted(checkpoint)
    return checkpoint
